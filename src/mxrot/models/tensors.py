"""Does a folder hold the tensors of its config, all of them and no others? Told by headers alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from mxrot.errors import FamilyError
from mxrot.models.ahead import Ahead
from mxrot.models.codes import codes_of
from mxrot.models.family import Family, shapes_apart
from mxrot.models.folder import RESAVE
from mxrot.models.weights import DTYPES, WeightFiles

_OF_QUANTIZED = re.compile(
    r"\.(qweight|qzeros|qscales|scales|g_idx|SCB|weight_scale|weight_scale_inv|weight_scale_2|weight_packed|input_scale|"
    r"weight_format|absmax|quant_map|nested_absmax|quant_state\..*|.*\.absmax|weight_shape|zero_point|k_scale|v_scale)$"
)
"""What AWQ, GPTQ, bitsandbytes, compressed-tensors, ModelOpt and FP8 models call what belongs to their codes."""
_MODELOPT = "hf_quant_config.json"


def quantized_by(config: Any) -> str | None:
    """The key of a config, or of that of its text model, that says that its weights are quantized; None if none does,
    and for codes that are read."""
    if codes_of(config) is not None:
        return None
    keys = ("quantization_config", "compression_config")
    both = (config, config.get_text_config())
    return next((key for key in keys for one in both if getattr(one, key, None) is not None), None)


def check_depth(files: WeightFiles, family: Family, config: Any) -> None:
    """FamilyError unless the files hold as many decoder blocks as the config says, and the experts of each."""
    block = re.compile(rf"{re.escape(family.blocks)}\.(\d+)\.")
    found = {int(match[1]) for name in files.names if (match := block.match(name))}
    expected = config.get_text_config().num_hidden_layers
    if found and len(found) != expected:
        raise FamilyError(
            f"{files.folder}: config.json says num_hidden_layers {expected}, and the files hold {len(found)} decoder "
            f"blocks ({family.block_prefix(min(found))} to {max(found)}); give the config of these weights, or all of "
            "the files"
        )


def tensor_problems(files: WeightFiles, model: PreTrainedModel, family: Family) -> Iterator[FamilyError]:
    """What `files` lack of the tensors of `model`, a skeleton of `family`, have beside them, or store in another way.

    One for each kind of problem; the first is what loading the model would stop at.
    """
    foreign = foreign_type(files)
    if foreign is not None:
        yield foreign
        return
    found = shapes_apart({name: files.shape_of(name) for name in files.names}, family)
    expected = shapes_apart({name: tuple(value.shape) for name, value in model.state_dict().items()}, family)
    head = f"{family.head}.weight"
    is_tied = bool(model.config.tie_word_embeddings)
    if is_tied and head not in found:
        expected.pop(head, None)
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing:
        yield FamilyError(
            f"{files.folder}: tensors do not fit the config: expected {_shown(missing[0], expected)}, got no "
            f"{missing[0]}{_others(missing)}; {_hint(missing, extra, head)}"
        )
    if extra:
        yield FamilyError(no_place(extra[0], family, _others(extra)))
    odd = sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name])
    if odd:
        yield FamilyError(
            f"{files.folder}: tensors do not fit the config: expected {_shown(odd[0], expected)}, got "
            f"{_shown(odd[0], found)}{_others(odd)}{_turned(expected[odd[0]], found[odd[0]])}"
        )
    elif is_tied and head in found and not missing:
        yield from _head_problem(files, family)


def check_for_transformers(model: PreTrainedModel, family: Family, files: Sequence[str]) -> None:
    """FamilyError unless transformers, which is about to fill `model` from these files, will find every tensor in them.

    It makes random numbers of what it does not find, with a warning.
    """
    ahead = Ahead.of(family, model.config)
    source = WeightFiles(Path(files[0]).parent, family.beside, ahead) if files else None
    if source is None or {path.name for path in source.files} != {Path(file).name for file in files}:
        return  # other files than those that are read without being told
    for problem in tensor_problems(source, model, family):
        raise problem
    for name in source.names:
        stored = source.stored_name(name)
        is_theirs = family.beside is not None and family.beside.model_name(stored) == name
        plain = name.removeprefix("model.")
        known = (name, plain, plain if family.stored_stem is None else family.stored_stem + plain)
        if stored not in known and not is_theirs:
            raise FamilyError(
                f"{source.folder}: transformers does not know {source.stored_name(name)} for {name}; quantize the "
                "folder with mxrot.quantize, which does"
            )


def no_place(name: str, family: Family, others: str = "") -> str:
    """What to say of a tensor that belongs to nothing."""
    return (
        f"{name}: a model of family {family.name} and this config has no place for this tensor{others}; if the model "
        f"is complete without it, write it again without: {RESAVE}"
    )


def foreign_type(files: WeightFiles) -> FamilyError | None:
    """An error that names a tensor which is of a quantized model, or in a type that weights are not taken in."""
    for name in files.names:
        stored = files.stored_as(name)
        if stored in DTYPES and not _OF_QUANTIZED.search(name):
            continue
        beside = f", as {_MODELOPT} says" if (files.folder / _MODELOPT).is_file() else ""
        return FamilyError(
            f"{files.stored_name(name)}: stored as {stored}: the model is quantized already{beside}, and config.json "
            f"has no quantization_config for it; give the original, in one of {', '.join(DTYPES)}"
        )
    return None


def _head_problem(files: WeightFiles, family: Family) -> Iterator[FamilyError]:
    head, embedding = f"{family.head}.weight", f"{family.embedding}.weight"
    if files.stored_as(head) != files.stored_as(embedding) or not torch.equal(
        *(value.view(torch.uint8) for value in files.read_all([head, embedding]).values())
    ):
        yield FamilyError(
            f"{files.folder}: {head} differs from {embedding}, and config.json says that they are one "
            "(tie_word_embeddings); set that to false to keep both, as transformers does, or remove one from the files"
        )


def _hint(missing: list[str], extra: list[str], head: str) -> str:
    if missing == [head]:
        return "set tie_word_embeddings in config.json if it is the embedding, else get a whole copy of the model"
    if extra:
        return f"the files hold {extra[0]}, which is no name of this model: were the tensors renamed?"
    return "is the download complete?"


def _turned(expected: tuple[int, ...], found: tuple[int, ...]) -> str:
    return "; it is stored transposed" if len(expected) == 2 and expected == found[::-1] else ""


def _others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _shown(name: str, shapes: dict[str, tuple[int, ...]]) -> str:
    return f"{name} {list(shapes[name])}"
