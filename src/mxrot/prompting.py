"""A prompt, and how a model goes on with it."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mxrot.errors import ConfigError
from mxrot.models.positions import position_count as position_count
from mxrot.text import Reader, check_ids, lone_surrogate
from mxrot.tokenizing import reader_for


def prompt_ids(prompt: str, reader: Reader) -> Tensor:
    """The tokens of a prompt, int64 [1, T]; of an empty one the token that begins a text.

    ConfigError if there is no such token, if the prompt is no text, or if a token is beyond the embedding.
    """
    if (half := lone_surrogate(prompt)) is not None:
        raise ConfigError(f"the prompt holds {half}, which is no character; is the terminal set to UTF-8?")
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
    """How many of the tokens that are wanted have a position in the model; ConfigError if the prompt leaves none."""
    positions = position_count(config)
    if positions is None:
        return wanted
    if prompt_tokens >= positions:
        raise ConfigError(f"the prompt has {prompt_tokens} tokens, and the model {positions} positions; shorten it")
    return min(wanted, positions - prompt_tokens)


@torch.no_grad()
def continue_prompt(model: PreTrainedModel, tokenizer: Any, ids: Tensor, count: int) -> str:
    """A greedy continuation of the tokens [1, T] by at most `count`, without them."""
    ids = ids.to(next(model.parameters()).device)
    output = cast(Any, model).generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def generate_text(model: PreTrainedModel, tokenizer: Any, prompt: str, max_tokens: int = 40) -> str:
    """A greedy continuation of `prompt`, without the prompt, as far as the model has positions."""
    rows = cast(Any, model).get_input_embeddings().weight.shape[0]
    ids = prompt_ids(prompt, reader_for(model.config, tokenizer, rows))
    return continue_prompt(model, tokenizer, ids, new_tokens(model.config, ids.shape[1], max_tokens))
