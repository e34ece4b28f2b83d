"""A folder with a few made-up rows for each of six tasks, as `--task-data` takes it, and how to score them by hand."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from tests.tiny_model import write_tiny_model
from transformers import AutoTokenizer, PreTrainedModel

ROWS = 7
SIX = ("arc_easy", "hellaswag", "piqa", "winogrande", "openbookqa", "lambada_openai")
FOLDERS = {
    "arc_easy": "ai2_arc/ARC-Easy",
    "hellaswag": "hellaswag/none",
    "piqa": "piqa/plain_text",
    "winogrande": "winogrande/winogrande_xl",
    "openbookqa": "openbookqa/main",
}
Choices = tuple[str, list[str], int]
"""A context, its continuations, and which of them is right."""


def phrase(dice: random.Random, words: int) -> str:
    return " ".join(dice.choice(("red", "a stone", "sailing", "under", "milk", "é", "9")) for _ in range(words))


def rows_of(task: str) -> list[dict[str, Any]]:
    """The rows of one task."""
    dice = random.Random(task)
    return [_row(task, dice) for _ in range(ROWS)]


def _row(task: str, dice: random.Random) -> dict[str, Any]:
    four = [phrase(dice, dice.randint(1, 5)) for _ in range(4)]
    options = {"text": four, "label": list("ABCD")}
    if task == "arc_easy":
        return {"id": "0", "question": phrase(dice, 6), "choices": options, "answerKey": dice.choice("ABCD")}
    if task == "openbookqa":
        return {"id": "0", "question_stem": phrase(dice, 6), "choices": options, "answerKey": dice.choice("ABCD")}
    if task == "hellaswag":
        places = {"activity_label": phrase(dice, 2), "ctx_a": phrase(dice, 5) + ".", "ctx_b": phrase(dice, 2)}
        return places | {"endings": [f"{four[0]} [step] {four[1]}", *four[1:]], "label": dice.choice("0123")}
    if task == "piqa":
        return {"goal": phrase(dice, 5), "sol1": four[0], "sol2": four[1], "label": dice.randint(0, 1)}
    if task == "winogrande":
        sentence = f"{phrase(dice, 4)} _ {phrase(dice, 4)}"
        return {"sentence": sentence, "option1": four[0], "option2": four[1], "answer": dice.choice("12")}
    return {"text": f"{phrase(dice, 9)} {dice.choice(('red', 'milk'))}"}


def write_task_folder(folder: Path) -> Path:
    """Write the rows of all tasks; returns `folder`."""
    for task, place in FOLDERS.items():
        datasets.Dataset.from_list(rows_of(task)).save_to_disk(str(folder / place / "validation"))
    lines = "\n".join(json.dumps(row) for row in rows_of("lambada_openai"))
    (folder / "lambada_test.jsonl").write_text(lines + "\n", encoding="utf-8")
    return folder


def write_scorable_model(folder: Path) -> Path:
    """A tiny model that prefers some bytes, and its tokenizer, with the byte 0 for the end of a text."""
    write_tiny_model(folder, initializer_range=0.3)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": chr(256)})
    tokenizer.save_pretrained(folder)
    return folder


def choices_of(task: str, row: dict[str, Any]) -> Choices:
    """What the harness's documentation says is asked, written down a second time."""
    if task == "arc_easy":
        context, options = f"Question: {row['question']}\nAnswer:", row["choices"]
        return context, options["text"], options["label"].index(row["answerKey"])
    if task == "openbookqa":
        return row["question_stem"], row["choices"]["text"], row["choices"]["label"].index(row["answerKey"])
    if task == "hellaswag":
        context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        return context, [ending.replace("[step] ", "") for ending in row["endings"]], int(row["label"])
    return f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"]


@torch.no_grad()
def log_likelihood(model: PreTrainedModel, context: str, continuation: str) -> tuple[float, bool]:
    """Sum over the continuation's bytes, each a token, one forward pass for each; and whether each is the likeliest."""
    before, after = context.encode(), continuation.encode()
    total, greedy = 0.0, True
    for index, byte in enumerate(after):
        logits = model(torch.tensor([list(before + after[:index])]).apply_(byte_to_token)).logits[0, -1]
        token = byte_to_token(byte)
        total += float(logits.double().log_softmax(-1)[token])
        greedy &= int(logits.argmax()) == token
    return total, greedy


def byte_to_token(byte: int) -> int:
    """The tokens of tests.tiny_model are the sorted characters of the byte-level alphabet."""
    return TOKENS[byte]


def _tokens() -> list[int]:
    """GPT-2's bytes: printable ones stand for themselves, the others come after 255."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    characters = {byte: byte for byte in shown} | {byte: 256 + index for index, byte in enumerate(hidden)}
    ordered = sorted(characters.values())
    return [ordered.index(characters[byte]) for byte in range(256)]


TOKENS = _tokens()


def hits_by_hand(model: PreTrainedModel, task: str) -> dict[str, tuple[float, ...]]:
    """Which rows of a task the model gets right."""
    acc, normed = [], []
    for row in rows_of(task):
        if task == "lambada_openai":
            context, _, word = row["text"].rpartition(" ")
            acc.append(float(log_likelihood(model, context, f" {word}")[1]))
            continue
        if task == "winogrande":
            before, _, after = row["sentence"].partition("_")
            asked = [(before + row[f"option{number}"], " " + after.strip()) for number in (1, 2)]
            found, right = [log_likelihood(model, *pair)[0] for pair in asked], int(row["answer"]) - 1
        else:
            context, texts, right = choices_of(task, row)
            found = [log_likelihood(model, context, f" {text}")[0] for text in texts]
            normed.append(float(argmax([value / len(text) for value, text in zip(found, texts, strict=True)]) == right))
        acc.append(float(argmax(found) == right))
    return {"acc": tuple(acc)} | ({"acc_norm": tuple(normed)} if normed else {})


def argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
