"""An embedding and a head that share one tensor are separated, so that a change of one need not affect the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mxrot.errors import FamilyError
from mxrot.models import ChangedSource, Source, build_skeleton


class Untied(ChangedSource):
    """The head is a copy of the embedding, bit for bit. A head that is already in the files stays as it is."""

    def __init__(self, inner: Source) -> None:
        super().__init__(inner, "untied")
        self.config = deepcopy(inner.config)
        self.config.tie_word_embeddings = False
        self.config_changes = {**inner.config_changes, "tie_word_embeddings": False}
        self._head, self._embedding = f"{self.family.head}.weight", f"{self.family.embedding}.weight"

    @property
    def types(self) -> Mapping[str, torch.dtype]:
        found = self.inner.types
        return {self._head: found[self._embedding], **found} if self._embedding in found else found

    def problems(self, model: PreTrainedModel) -> Iterator[FamilyError]:
        """The problems of the inner source, except a missing head, which its own config allows."""
        return self.inner.problems(build_skeleton(self.inner.config))

    def changed_outer(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {self._head: tensors[self._embedding].clone(), **tensors}
