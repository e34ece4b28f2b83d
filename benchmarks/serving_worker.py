"""One way to serve, in a process of its own: what benchmarks/serving.py starts with a task in JSON as its argument.

Whatever is measured is put into the task's result file at once, so that what was measured before an error is kept. A
task with `go` measures nothing until a file of that name is there.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from serving_figures import window_mean

SHORT_PROMPT, WARM_TOKENS, DECODED = 32, 8, 64
MIXED_REQUESTS, MIXED_TOKENS, MIXED_PROMPTS, MIXED_NEW = 32, 128, 4, 16
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived",
    "Water boils at 100 degrees Celsius because",
    "def fibonacci(n):\n",
)


class Engine:
    """vLLM's, and what is asked of it. `LLM` and the two classes of its requests may be others in a test."""

    def __init__(self, llm: Any, sampling: Callable[..., Any], prompt: Callable[..., Any], vocabulary: int) -> None:
        self.llm, self.sampling, self.prompt, self.vocabulary = llm, sampling, prompt, vocabulary
        self._drawn = 0

    def random_prompts(self, count: int, length: int) -> list[Any]:
        """Requests of token ids that were never asked before, so that no cache of prefixes could help."""
        import torch

        self._drawn += 1
        generator = torch.Generator().manual_seed(self._drawn)
        ids = torch.randint(10, self.vocabulary - 10, (count, length), generator=generator).tolist()
        return [self.prompt(prompt_token_ids=row) for row in ids]

    def run(self, prompts: list[Any], tokens: int | list[int], **options: Any) -> list[Any]:
        """All requests at once, with so many new tokens each whatever they are."""
        counts = tokens if isinstance(tokens, list) else [tokens] * len(prompts)
        asked = [self.sampling(max_tokens=n, temperature=0, ignore_eos=True, **options) for n in counts]
        found: list[Any] = self.llm.generate(prompts, asked, use_tqdm=False)
        return found

    def seconds(self, prompts: list[Any], tokens: int | list[int]) -> float:
        """For `run`, without making text of what comes out."""
        started = time.perf_counter()
        self.run(prompts, tokens, detokenize=False)
        return time.perf_counter() - started


def window_means(engine: Engine, windows: list[list[int]]) -> list[float]:
    """Mean negative log-likelihood of each window."""
    found = engine.run([engine.prompt(prompt_token_ids=ids) for ids in windows], 1, prompt_logprobs=1, detokenize=False)
    return [window_mean(one.prompt_logprobs, ids) for one, ids in zip(found, windows, strict=True)]


def greedy(engine: Engine) -> list[list[int]]:
    """64 tokens after each of `PROMPTS`."""
    return [list(one.outputs[0].token_ids) for one in engine.run(list(PROMPTS), 64)]


def decode_speed(engine: Engine, requests: int, repeats: int) -> float:
    """New tokens a second of so many requests at once: of DECODED more tokens, so that prompts do not count."""
    prompts = engine.random_prompts(requests, SHORT_PROMPT)
    engine.seconds(prompts, WARM_TOKENS)
    times = []
    for _ in range(repeats):
        short = engine.seconds(prompts, WARM_TOKENS)
        times.append(engine.seconds(prompts, WARM_TOKENS + DECODED) - short)
    return requests * DECODED / statistics.median(times)


def first_token(engine: Engine, length: int, repeats: int) -> float:
    """Seconds from one prompt of so many tokens to its first new one."""
    engine.seconds(engine.random_prompts(1, length), 1)
    return statistics.median(engine.seconds(engine.random_prompts(1, length), 1) for _ in range(repeats))


def mixed_speed(engine: Engine, length: int, repeats: int) -> float:
    """New tokens a second where short requests decode while long prompts come in pieces, in the same batches."""
    counts = [MIXED_TOKENS] * MIXED_REQUESTS + [MIXED_NEW] * MIXED_PROMPTS

    def once() -> float:
        prompts = engine.random_prompts(MIXED_REQUESTS, SHORT_PROMPT) + engine.random_prompts(MIXED_PROMPTS, length)
        return engine.seconds(prompts, counts)

    once()
    return sum(counts) / statistics.median(once() for _ in range(repeats))


def measure(engine: Engine, task: dict[str, Any], keep: Callable[..., None]) -> None:
    """All that the task asks for; `keep` gets each figure by its name. What fails has its error in `errors`, by name,
    and the rest is measured all the same."""
    repeats, errors = task["repeats"], dict[str, str]()
    decode: dict[str, float] = {}
    first: dict[str, float] = {}

    def part(name: str, work: Callable[[], dict[str, Any]]) -> None:
        try:
            keep(**work())
        except Exception as error:
            traceback.print_exc()
            errors[name] = said(error)
            keep(errors=errors)

    def decoded(requests: int) -> dict[str, Any]:
        decode[str(requests)] = decode_speed(engine, requests, repeats)
        return {"decode": decode}

    def answered(length: int) -> dict[str, Any]:
        first[str(length)] = first_token(engine, length, repeats)
        return {"first_token": first}

    if task["windows"]:
        part("perplexity", lambda: {"nlls": window_means(engine, task["windows"])})
        part("greedy", lambda: {"greedy": greedy(engine)})
    for requests in task["requests"]:
        part(f"{requests} requests", partial(decoded, requests))
    for length in task["prompts"]:
        part(f"first token of {length}", partial(answered, length))
    if task["prompts"]:
        longest = max(task["prompts"])
        part("mixed batch", lambda: {"mixed": {str(longest): mixed_speed(engine, longest, repeats)}})


def said(error: Exception) -> str:
    """Its kind, and the first line of its message."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]


def kernel_of(llm: Any) -> str:
    """What computes the first block's down projection, as the engine has it; in one process alone."""
    try:
        model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
        linear = model.model.layers[0].mlp.down_proj
    except AttributeError:
        return ""
    kernel = getattr(getattr(linear, "scheme", None), "kernel", None)
    return type(linear.quant_method).__name__ if kernel is None else type(kernel).__name__


def head_of(llm: Any) -> str:
    """What computes the head, and the path of one row if it is quantized; in one process alone."""
    try:
        head = llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model().lm_head
    except AttributeError:
        return ""
    method = type(head.quant_method).__name__
    return f"{method}, {head.quantized.choose_path(1).path or 'plain'}" if hasattr(head, "quantized") else method


def wait_for(path: str | None) -> None:
    """Until a file is there; None for none. While it waits, the engine leaves the GPU to others."""
    while path is not None and not Path(path).exists():
        time.sleep(0.1)


def engine_of(task: dict[str, Any]) -> Engine:
    """vLLM with the model of the task."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(**task["options"])
    return Engine(llm, SamplingParams, TokensPrompt, llm.llm_engine.model_config.get_vocab_size())


def write_result(path: str, found: dict[str, Any]) -> None:
    """At once: who reads meanwhile finds the old one, or this."""
    unfinished = Path(path).with_suffix(".partial")
    unfinished.write_text(json.dumps(found), encoding="utf-8")
    unfinished.replace(path)


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    result: dict[str, Any] = {}

    def keep(**found: Any) -> None:
        result.update(found)
        write_result(task["result"], result)

    started = time.monotonic()
    try:
        engine = engine_of(task)
        keep(start_seconds=time.monotonic() - started, kernel=kernel_of(engine.llm), head=head_of(engine.llm))
        wait_for(task.get("go"))
        measure(engine, task, keep)
        keep(is_done=True)
    except Exception as error:
        traceback.print_exc()
        keep(error=said(error))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if "error" not in result else 1)  # the result is written; engines can take long, or hang, when they end


if __name__ == "__main__":
    main()
