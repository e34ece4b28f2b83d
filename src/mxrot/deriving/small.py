"""A small model of the same class as a given one, fast to run: random weights, few of everything."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from mxrot.errors import FamilyError
from mxrot.models import needed_attention

TOKENS = 12
WINDOW = 4
"""The length of a sliding window, if the model has one: less than `TOKENS`, so that it has an effect."""
MOST_BLOCKS = 12
MOST_NUMBERS = 30_000_000
"""The most parameters of a small model: some keys of a config are widths that are not recognized as such."""
_HEADS, _HEAD_WIDTH, _HIDDEN, _INNER, _VOCABULARY = 4, 16, 64, 96, 50
_INNER_KEYS = ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "shared_intermediate_size")
_TOKEN_KEYS = {"pad_token_id": None, "bos_token_id": 2, "eos_token_id": 1}


def small_config(config: Any, where: str, keeps_blocks: bool = False) -> Any:
    """A config of the same architecture with 4 heads of 16 channels, and all its decoder blocks, or one of each kind,
    at least two.

    FamilyError if there are more than `MOST_BLOCKS` kinds.
    """
    found = deepcopy(config)
    if not keeps_blocks:
        _keep_blocks(found, where)
    width = getattr(found, "head_dim", None) or found.hidden_size // found.num_attention_heads
    sizes = _sizes(found)
    for key, value in sizes.items():
        setattr(found, key, value)
    rope = getattr(found, "rope_parameters", None)
    if isinstance(rope, dict):
        found.rope_parameters = _small_rope(rope, width)
    return found


def _sizes(config: Any) -> dict[str, Any]:
    """The new values for those keys that the config has."""
    heads, kept = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    found: dict[str, Any] = {"hidden_size": _HIDDEN, "num_attention_heads": _HEADS, "vocab_size": _VOCABULARY}
    found["num_key_value_heads"] = _HEADS if kept == heads else 1 if kept == 1 else 2
    found |= {key: _INNER for key in _INNER_KEYS}
    found |= {"head_dim": _HEAD_WIDTH, "max_position_embeddings": 64, "sliding_window": WINDOW}
    return {key: value for key, value in found.items() if getattr(config, key, None) is not None} | {
        key: value for key, value in _TOKEN_KEYS.items() if hasattr(config, key)
    }


def _keep_blocks(config: Any, where: str) -> None:
    """Reduce the config to the first block, the second, and the first of each kind that its lists by block
    distinguish."""
    count = config.num_hidden_layers
    lists = {
        key: value
        for key, value in vars(config).items()
        if isinstance(value, (list, tuple)) and len(value) == count and key != "architectures"
    }
    first: dict[str, int] = {}
    for index in range(count):
        first.setdefault(repr([value[index] for value in lists.values()]), index)
    kept = sorted({*range(min(2, count)), *first.values()})
    if len(kept) > MOST_BLOCKS:
        raise FamilyError(
            f"{where}: its config tells more than {MOST_BLOCKS} kinds of decoder blocks apart "
            f"({', '.join(sorted(lists))}), which is too many to derive a family from"
        )
    config.num_hidden_layers = len(kept)
    for key, value in lists.items():
        setattr(config, key, [value[index] for index in kept])


def _small_rope(rope: dict[str, Any], width: int) -> dict[str, Any]:
    """The parameters of a rotary embedding for heads of `_HEAD_WIDTH` channels, from one for heads of `width`."""
    found = dict(rope)
    for key, value in rope.items():
        if isinstance(value, dict):
            found[key] = _small_rope(value, width)
        elif isinstance(value, list) and value and isinstance(value[0], float):
            found[key] = value[: max(1, len(value) * _HEAD_WIDTH // width)]
    if "original_max_position_embeddings" in rope:
        found["original_max_position_embeddings"] = 16
    return found


def small_model(config: Any, where: str, keeps_blocks: bool = False) -> PreTrainedModel:
    """A model of `small_config` in float64, with random weights that all matter, the same each time.

    FamilyError if transformers cannot build it.
    """
    small = small_config(config, where, keeps_blocks)
    attention = needed_attention(small)
    try:
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(small, trust_remote_code=False, attn_implementation=attention)
        numbers = sum(parameter.numel() for parameter in plain.parameters())
        if numbers > MOST_NUMBERS:
            raise FamilyError(f"{where}: a small model of its class has {numbers:,} weights; which key is its width?")
        with torch.random.fork_rng(devices=[]):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                small, dtype=torch.float64, trust_remote_code=False, attn_implementation=attention
            )
            torch.manual_seed(0)
            model.eval().requires_grad_(False)
            _fill(model)
    except FamilyError:
        raise
    except Exception as error:  # from its checks, which raise many kinds of errors
        said = " ".join(str(error).split())[:200]
        raise FamilyError(f"{where}: no small model of its class can be built: {said}") from error
    return model


def _fill(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.dim() < 2:
            parameter.uniform_(0.5, 1.5)
        else:
            parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
