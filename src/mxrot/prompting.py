"""Prompts, and how a model continues them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, TextStreamer

from mxrot.errors import ConfigError
from mxrot.models.positions import position_count as position_count
from mxrot.text import Reader, check_ids, lone_surrogate
from mxrot.tokenizing import reader_for


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. If `temperature` is 0, the most probable token is taken."""

    temperature: float = 0.0
    top_p: float = 1.0
    """Tokens are drawn only from the smallest set whose probabilities sum to this value."""
    top_k: int = 0
    """Tokens are drawn only from this many of the most probable ones. 0 means all."""
    seed: int = 0

    def options(self) -> dict[str, Any]:
        """The arguments of transformers' `generate`."""
        if not self.temperature:
            return {"do_sample": False}
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
        }


GREEDY = Sampling()


def chat_ids(question: str, system: str | None, reader: Reader) -> Tensor:
    """The tokens of a question in the tokenizer's chat template, int64 [1, T], up to the start of the answer.

    ConfigError if the tokenizer has no template, if the template refuses the question, or as for `prompt_ids`.
    """
    for text in (question, system or ""):
        _check_text(text)
    if not getattr(reader.tokenizer, "chat_template", None):
        raise ConfigError("--chat: the tokenizer has no chat template; leave --chat out to continue the prompt as text")
    turns = [] if system is None else [{"role": "system", "content": system}]
    turns.append({"role": "user", "content": question})
    try:
        ids = reader.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    except Exception as error:  # a template is a program of the model, and can raise any error
        raise ConfigError(f"--chat: the chat template refuses this ({str(error)[:200]})") from error
    found = torch.tensor([ids], dtype=torch.int64)
    check_ids(found, "the prompt", reader)
    return found


def _check_text(prompt: str) -> None:
    if (half := lone_surrogate(prompt)) is not None:
        raise ConfigError(f"the prompt holds {half}, which is not a character; is the terminal set to UTF-8?")


def prompt_ids(prompt: str, reader: Reader) -> Tensor:
    """The tokens of a prompt, int64 [1, T]. An empty prompt is the token that begins a text.

    ConfigError if there is no such token, if the prompt is not valid text, or if a token is beyond the embedding.
    """
    _check_text(prompt)
    ids = reader.tokenizer(prompt, verbose=False)["input_ids"]
    if not ids:
        begin = reader.start if reader.start is not None else getattr(reader.tokenizer, "bos_token_id", None)
        if begin is None:
            raise ConfigError("the prompt is empty, and this tokenizer has no token that begins a text; give some text")
        ids = [begin]
    found = torch.tensor([ids], dtype=torch.int64)
    check_ids(found, "the prompt", reader)
    return found


def new_tokens(config: Any, prompt_tokens: int, wanted: int) -> int:
    """How many of the wanted tokens have a position in the model. ConfigError if the prompt leaves none."""
    positions = position_count(config)
    if positions is None:
        return wanted
    if prompt_tokens >= positions:
        raise ConfigError(f"the prompt has {prompt_tokens} tokens, and the model {positions} positions; shorten it")
    return min(wanted, positions - prompt_tokens)


@torch.no_grad()
def continue_prompt(
    model: PreTrainedModel,
    tokenizer: Any,
    ids: Tensor,
    count: int,
    sampling: Sampling = GREEDY,
    streams: bool = False,
) -> str:
    """A continuation of the tokens [1, T] by at most `count` tokens, without the prompt. `streams` also prints it word
    by word.

    Sampling draws from torch's generator of the device, seeded here. The state of the generator is restored afterwards.
    """
    device = next(model.parameters()).device
    ids = ids.to(device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if streams else None
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(sampling.seed)
        output = cast(Any, model).generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            pad_token_id=tokenizer.eos_token_id,
            streamer=streamer,
            **sampling.options(),
        )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def generate_text(model: PreTrainedModel, tokenizer: Any, prompt: str, max_tokens: int = 40) -> str:
    """The greedy continuation of `prompt`, without the prompt, up to the last position of the model."""
    rows = cast(Any, model).get_input_embeddings().weight.shape[0]
    ids = prompt_ids(prompt, reader_for(model.config, tokenizer, rows))
    return continue_prompt(model, tokenizer, ids, new_tokens(model.config, ids.shape[1], max_tokens))
