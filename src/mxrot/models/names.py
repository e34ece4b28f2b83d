"""Names of tensors as a model has them, from names that other programs have put something in front of.

`model.layers.0.mlp.down_proj.weight` is the same tensor as `layers.0.mlp.down_proj.weight` (a model saved without its
head, as Qwen3-Embedding), `model.language_model.layers. ...` (the text part of a model of images and text) and
`_orig_mod.model.layers. ...` (saved from torch.compile).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from mxrot.errors import FamilyError
from mxrot.models.beside import Beside

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Parts of a name that torch puts in wherever a module is compiled, sharded or recomputed."""
_LEADING = "module."
"""DistributedDataParallel and DeepSpeed."""
_STEMS = {
    "": "",
    "model.model.": "model.",
    "language_model.": "language_model.",
    "language_model.model.": "language_model.",
    "model.language_model.": "model.",
    "model.text_model.": "model.",
    "backbone.": "backbone.",
    "text_model.": "text_model.",
    "text_model.model.": "text_model.",
    "base_model.model.model.": "base_model.model.",
}
"""What stands in front of `layers.0.` where that is not `model.`, and what may then stand in front of the head."""
_BODY = (
    *("layers.", "embed_tokens.", "norm.", "final_layernorm.", "rotary_emb."),
    *("embeddings.", "norm_f.", "embedding_norm."),  # of Nemotron-H and LFM2
)
_HEAD = "lm_head."
_BLOCK = re.compile(r"(.*?)layers\.\d+\.")


def model_names(stored: Iterable[str], beside: Beside | None = None) -> dict[str, str]:
    """The name in the model for each stored name, which is the same where no known prefix is found.

    `beside` is what a model of more than text has beside its text model.

    FamilyError if two of them stand for one tensor.
    """
    unwrapped = {name: _unwrapped(name) for name in stored}
    stems = {found[1] for name in unwrapped.values() if (found := _BLOCK.match(name))}
    known = [stem for stem in stems if stem in _STEMS]
    if beside is not None:
        named = {name: beside.model_name(plain) for name, plain in unwrapped.items()}
    elif "model." not in stems and len(known) == 1:
        named = {name: _without(known[0], plain) for name, plain in unwrapped.items()}
    else:
        named = unwrapped
    first: dict[str, str] = {}
    for name, plain in named.items():
        if plain in first:
            raise FamilyError(
                f"{name}: stands for the same tensor as {first[plain]}; remove one of them from the files"
            )
        first[plain] = name
    return named


def _unwrapped(name: str) -> str:
    while name.startswith(_LEADING):
        name = name.removeprefix(_LEADING)
    if "_" not in name:
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS).removeprefix(_LEADING)


def _without(stem: str, name: str) -> str:
    for front in ("", _STEMS[stem]):
        if name.startswith(front + _HEAD):
            return name.removeprefix(front)
    rest = name.removeprefix(stem)
    return f"model.{rest}" if name.startswith(stem) and rest.startswith(_BODY) else name
