"""The tensors of a checkpoint compared with its config: names, shapes and types before any value is read, and values as
they are read.

Without these checks no reader would raise an error: a missing tensor would be random, an extra one would be left out,
and a damaged scale or transform would give garbage.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxrot.checkpoint.files import INDEX, TYPE_NAMES
from mxrot.documents import read_json
from mxrot.errors import CheckpointError
from mxrot.layers import InputTransform, QuantLinear, cache_scheme_of, separate_experts
from mxrot.layers.transform import is_of_transform
from mxrot.models import Family, check_linears
from mxrot.models.families import EXPERTS
from mxrot.models.headers import Header, StoredTensor, read_header
from mxrot.models.weights import all_finite
from mxrot.scheme import Scheme, install
from mxrot.transforms.site_transform import tensor_problem

SINGLE = "model.safetensors"
_FLOATS = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class Stored:
    """The safetensors files of a checkpoint, by their headers."""

    headers: tuple[Header, ...]

    @property
    def paths(self) -> list[Path]:
        return [header.path for header in self.headers]

    def tensors(self, family: Family) -> dict[str, StoredTensor]:
        """Every tensor by its name in the model."""
        found = {name: tensor for header in self.headers for name, tensor in header.tensors.items()}
        return {in_model(name, family): tensor for name, tensor in found.items()}


def read_stored(folder: Path) -> Stored:
    """The files that transformers reads: the single file, otherwise the files of the index.

    CheckpointError if there are none, or if the index does not list exactly the tensors of its files.
    """
    if (folder / SINGLE).exists():
        return Stored((read_header(folder / SINGLE),))
    if not (folder / INDEX).exists():
        raise CheckpointError(f"{folder}: no {SINGLE} and no {INDEX}")
    listed = _weight_map(folder / INDEX)
    headers = []
    for name in sorted(set(listed.values())):
        if Path(name).name != name:
            raise CheckpointError(f"{folder / INDEX}: {name!r} is not the name of a file in its folder")
        if not (folder / name).exists():
            raise CheckpointError(f"{folder / name}: is named in {INDEX} and missing")
        headers.append(read_header(folder / name))
    _check_index(folder / INDEX, listed, headers)
    return Stored(tuple(headers))


def _weight_map(path: Path) -> dict[str, str]:
    listed = read_json(path).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise CheckpointError(f"{path}: not a safetensors index (it has no weight_map of file names)")
    return listed


def _check_index(path: Path, listed: dict[str, str], headers: list[Header]) -> None:
    found = [(tensor, header.path.name) for header in headers for tensor in header.tensors]
    if wrong := sorted(set(listed.items()) ^ set(found)):
        tensor, file = wrong[0]
        said = f"lists {tensor} in {file}" if (tensor, file) not in found else f"does not list {tensor} of {file}"
        raise CheckpointError(f"{path}: {said}; the index and the files do not belong together")


def read_files(files: Iterable[str | Path]) -> Stored:
    """The same for the files that transformers has found."""
    headers = [read_header(Path(path)) for path in files]
    index = headers[0].path.with_name(INDEX)
    if headers[0].path.name != SINGLE and index.exists():
        _check_index(index, _weight_map(index), headers)
    return Stored(tuple(headers))


def in_model(name: str, family: Family) -> str:
    """The name in the model of a tensor, which a file may hold under an older name."""
    name = name if family.beside is None else family.beside.model_name(name)
    prefix = f"{family.blocks}."
    if family.experts is None or not name.startswith(prefix):
        return name
    number, _, inner = name.removeprefix(prefix).partition(".")
    for old, new in family.experts.renamed:
        if inner.startswith(old):
            return f"{prefix}{number}.{new}{inner.removeprefix(old)}"
    return name


def check_counts(config: dict[str, Any], stored: Stored) -> None:
    """CheckpointError if a config.json has more decoder blocks or experts than there are tensors for.

    This runs before transformers reads the config, which would allocate memory for all of them.
    """
    most = sum(len(header.tensors) for header in stored.headers)
    text = config.get("text_config")
    tables = [config, text] if isinstance(text, dict) else [config]
    keys = ("num_hidden_layers", *(names.count for names in EXPERTS.values()))
    for key, table in product(keys, tables):
        claimed = table.get(key, 1)
        if type(claimed) is not int or not 0 <= claimed <= most:
            raise CheckpointError(f"config.json: {key} is {_shortly(claimed)}, and there are {most} tensors")


def check_blocks(config: Any, family: Family, tensors: Iterable[str]) -> None:
    """CheckpointError if the config and the tensors have different numbers of decoder blocks."""
    prefix = f"{family.blocks}."
    blocks = {name.removeprefix(prefix).partition(".")[0] for name in tensors if name.startswith(prefix)}
    claimed = config.get_text_config().num_hidden_layers
    if claimed != len(blocks):
        raise CheckpointError(
            f"config.json: num_hidden_layers is {claimed}, and there are tensors of {len(blocks)} decoder blocks"
        )


def install_linears(model: PreTrainedModel, family: Family, scheme: Scheme) -> None:
    """Replace the linears of every site by quantized ones without values, on the meta device.

    CheckpointError if a linear that should be left does not exist. ConfigError for a scheme that cannot be installed.
    """
    separate_experts(model)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name in scheme.left:
        if name not in linears or not name.startswith(f"{family.blocks}."):
            raise CheckpointError(f"config.json: quantization_config: ignore: {name!r} is no linear of a decoder block")
    if scheme.head is not None and model.config.tie_word_embeddings:
        raise CheckpointError(
            "config.json: tie_word_embeddings is true, and quantization_config has a group for the head, which then is "
            "no copy of the embedding"
        )
    left = set(scheme.left)
    check_linears(model, family, lambda name: None if name in left else scheme.input_block(name))
    install(model, scheme, family)


def check_tensors(model: nn.Module, family: Family, tensors: dict[str, StoredTensor], is_tied: bool) -> None:
    """CheckpointError names a tensor that is missing in a model with its linears installed, has no place in it, or has
    another shape or type."""
    types = _types(model)
    expected = {name: (tuple(value.shape), types.get(name, _FLOATS)) for name, value in model.state_dict().items()}
    head = f"{family.head}.weight"
    if is_tied and head not in tensors:
        expected.pop(head, None)
    for name in sorted(expected.keys() - tensors.keys()):
        raise CheckpointError(f"{name}: is missing; config.json says that it is there, {list(expected[name][0])}")
    for name in sorted(tensors.keys() - expected.keys()):
        raise CheckpointError(f"{name}: a model of family {family.name} and this config has no place for this tensor")
    for name, (shape, dtypes) in sorted(expected.items()):
        found = tensors[name]
        if found.shape != shape:
            raise CheckpointError(f"{name}: expected shape {list(shape)}, got {list(found.shape)}")
        if found.dtype not in dtypes:
            raise CheckpointError(f"{name}: expected type {' or '.join(dtypes)}, got {found.dtype}")


def _types(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The types that tensors of quantized linears and caches may have in a file."""
    found: dict[str, tuple[str, ...]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            parts = module.weights.stored_parts(module.out_features, module.in_features)
            found |= {f"{name}.{part}": (TYPE_NAMES[dtype],) for part, (_, dtype) in parts.items()}
        elif isinstance(module, InputTransform):
            found |= {f"{name}.{own}": (TYPE_NAMES[tensor.dtype],) for own, tensor in module.named_parameters()}
        elif (cache := cache_scheme_of(module)) is not None:
            found |= {f"{name}.{own}": (TYPE_NAMES[torch.float32],) for own in cache.stored_names}
    return found


def check_value(name: str, tensor: Tensor) -> None:
    """CheckpointError if a tensor holds a value that no quantization writes: an invalid scale or number, or a transform
    without an inverse."""
    if name.endswith(".weight_scale") and tensor.dtype == torch.uint8:
        if bool((tensor == 255).any()):
            raise CheckpointError(f"{name}: holds the scale NaN (byte 255); the file is damaged")
    elif tensor.is_floating_point() and not bool(all_finite(tensor)):
        raise CheckpointError(f"{name}: the weights hold NaN or Inf; the file is damaged")
    if name.endswith((".key_transform", ".value_transform")) and not _is_invertible(tensor):
        raise CheckpointError(f"{name}: holds a matrix that has no inverse; the file is damaged")
    if is_of_transform(name) and (problem := tensor_problem(name.rpartition(".")[2], tensor)):
        raise CheckpointError(f"{name}: {problem}; the file is damaged")


def _is_invertible(matrices: Tensor) -> bool:
    """True if all matrices [heads, D, D] have an inverse that float64 can find."""
    found, wrong = torch.linalg.inv_ex(matrices.double())
    return not bool(wrong.any()) and bool(torch.isfinite(found).all())


def _shortly(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 100 else f"{shown[:100]}..."
