"""A model as it is read: its config, the tensors outside of its decoder blocks, and block after block.

What is computed with, and all that is written, comes from a `Source` and from nothing beside it. A change of weights
that leaves the model's function as it is (a merged rotation, an untied head, a permutation) is therefore a decorator, a
`ChangedSource`, which nothing else needs to know of.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mxrot.errors import FamilyError
from mxrot.models.ahead import Ahead
from mxrot.models.codes import CodedFiles, codes_of
from mxrot.models.family import Family, shapes_apart
from mxrot.models.skeleton import find_family, read_config
from mxrot.models.tensors import check_depth, tensor_problems
from mxrot.models.weights import WeightFiles


class Source(ABC):
    """A model that can be read piece by piece, as often as needed, always with the same bits."""

    name: str
    """What errors call it."""
    folder: Path
    """Where that lies which is no tensor: tokenizer, generation config, card."""
    config: Any
    family: Family
    changes: tuple[str, ...] = ()
    """What was done to the tensors of the folder, in this order; two changes that differ are called differently."""
    passed_over: str = ""
    """A line on tensors of the folder that are no part of the model; empty where there are none."""
    config_changes: Mapping[str, Any] = {}
    """What config.json must say in place of what it says in the folder."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The type in which most of the weights are stored; FamilyError if it is none that weights are taken in."""

    @property
    @abstractmethod
    def types(self) -> Mapping[str, torch.dtype]:
        """The types of tensors that are stored in another one, by full names, with linears for each expert."""

    def type_of(self, name: str) -> torch.dtype:
        """The type in which the tensor of this full name is stored."""
        return self.types.get(name, self.dtype)

    @abstractmethod
    def outer(self) -> dict[str, Tensor]:
        """Every tensor outside of the decoder blocks by its full name, in the type that it is stored in, on the CPU."""

    @abstractmethod
    def block(
        self, index: int, device: torch.device | str = "cpu", names: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        """The tensors of a decoder block by their names in it, in the types that they are stored in, with one for each
        linear of each expert; only those of `names`, where that is given."""

    @abstractmethod
    def problems(self, model: PreTrainedModel) -> Iterator[FamilyError]:
        """What it lacks of the tensors of `model`, a skeleton of its config, has beside them, or stores in another way;
        told without reading them."""

    @abstractmethod
    def prefetch(self, index: int) -> None:
        """Let a decoder block be read ahead, where that can be done. Changes nothing but how long `block` takes."""


class FolderSource(Source):
    """The model in a folder, as its files hold it, with weights in the place of codes that are read (`codes_of`).

    FamilyError if it is of no known family, or if its files do not hold as many decoder blocks as its config says.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self.folder, self.name = folder, name or str(folder)
        self.config = read_config(folder)
        self.family = find_family(self.config, self.name)
        how = codes_of(self.config)
        beside, ahead = self.family.beside, Ahead.of(self.family, self.config)
        self.files = WeightFiles(folder, beside, ahead) if how is None else CodedFiles(folder, how, beside, ahead)
        self.passed_over = ahead.said(self.files.passed_over)
        self.changes = () if how is None else (how.said,)
        check_depth(self.files, self.family, self.config)

    @cached_property
    def dtype(self) -> torch.dtype:
        return self.files.dtype_of_most()

    @cached_property
    def types(self) -> dict[str, torch.dtype]:
        return other_types(self.files, self.family, self.dtype)

    def outer(self) -> dict[str, Tensor]:
        return read_outer(self.files, self.family)

    def block(
        self, index: int, device: torch.device | str = "cpu", names: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        return read_block(self.files, self.family, index, device, names)

    def problems(self, model: PreTrainedModel) -> Iterator[FamilyError]:
        return tensor_problems(self.files, model, self.family)

    def prefetch(self, index: int) -> None:
        self.files.will_need(self.family.block_prefix(index))


class ChangedSource(Source):
    """Another source with changed tensors; says only what differs.

    Tensors come and go in the types that they are stored in: what is computed from them is rounded once.
    """

    def __init__(self, inner: Source, change: str) -> None:
        self.inner = inner
        self.name, self.folder, self.config, self.family = inner.name, inner.folder, inner.config, inner.family
        self.changes = (*inner.changes, change)
        self.passed_over, self.config_changes = inner.passed_over, inner.config_changes

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

    @property
    def types(self) -> Mapping[str, torch.dtype]:
        return self.inner.types

    def outer(self) -> dict[str, Tensor]:
        return self.changed_outer(self.inner.outer())

    def block(
        self, index: int, device: torch.device | str = "cpu", names: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        found = self.changed_block(index, self.inner.block(index, device))
        return found if names is None else {name: tensor for name, tensor in found.items() if name in names}

    def problems(self, model: PreTrainedModel) -> Iterator[FamilyError]:
        return self.inner.problems(model)

    def prefetch(self, index: int) -> None:
        self.inner.prefetch(index)

    def changed_outer(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `outer` gives in place of these."""
        return tensors

    def changed_block(self, index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `block` gives in place of these, which are all of a block, on the device that was asked for."""
        return tensors


def read_outer(files: WeightFiles, family: Family) -> dict[str, Tensor]:
    """Every tensor outside of the decoder blocks, by its full name."""
    return {name: files.read(name) for name in files.names if not name.startswith(family.blocks + ".")}


def read_block(
    files: WeightFiles,
    family: Family,
    index: int,
    device: torch.device | str = "cpu",
    names: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """The tensors of a decoder block by their names in it, with one for each linear of each expert; those of `names`,
    where that is given."""
    prefix = f"{family.block_prefix(index)}."
    stored = [name for name in files.names if name.startswith(prefix)]
    if names is not None:
        wanted = {prefix + name for name in names}
        stored = [name for name in stored if not wanted.isdisjoint(_apart(files, family, name))]
    tensors = {name.removeprefix(prefix): value for name, value in files.read_all(stored, device).items()}
    found = tensors if family.experts is None else family.experts.apart(tensors)
    return found if names is None else {name: value for name, value in found.items() if name in names}


def other_types(files: WeightFiles, family: Family, most: torch.dtype) -> dict[str, torch.dtype]:
    """The tensors that are stored in another type than `most`, by their names in a model with linears for each expert.

    A float32 norm in a bfloat16 model is common. FamilyError for a type that weights are not taken in.
    """
    found = {name: files.dtype_of(name) for name in files.names if files.dtype_of(name) != most}
    return {whole: own for name, own in found.items() for whole in _apart(files, family, name)}


def _apart(files: WeightFiles, family: Family, stored: str) -> Collection[str]:
    """Full names, in a model with linears for each expert, of what is in the tensor `stored`."""
    return shapes_apart({stored: files.shape_of(stored)}, family).keys()
