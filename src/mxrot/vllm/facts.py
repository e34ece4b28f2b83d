"""The facts that decide how vLLM handles a checkpoint, for an existing checkpoint or a planned one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from mxrot.checkpoint.checked import check_checkpoint
from mxrot.checkpoint.config import is_native
from mxrot.models import Family
from mxrot.recipe import Recipe
from mxrot.scheme import Scheme


@dataclass(frozen=True)
class Facts:
    """The facts about one checkpoint."""

    config: Any
    """The transformers config, without the `quantization_config`."""
    family: Family
    scheme: Scheme
    is_native: bool
    """True if its config has mxrot's own form, which stock vLLM refuses."""
    widths: Mapping[str, int]
    """in_features of the quantized linears, by full name."""
    biased: tuple[str, ...]
    """Quantized linears with a bias."""

    @staticmethod
    def planned(skeleton: PreTrainedModel, family: Family, recipe: Recipe) -> Facts:
        """The facts about the checkpoint that `recipe` would make of a model."""
        scheme = Scheme.of(recipe, family, skeleton)
        return of_model(skeleton, family, scheme, is_native(scheme))

    @staticmethod
    def written(folder: Path, verify: bool | None = None) -> Facts:
        """The facts about the checkpoint in `folder`, from its config and the headers of its files.

        CheckpointError if it is not a checkpoint or contradicts itself. `verify` is as for `mxrot.load`.
        """
        checked = check_checkpoint(folder, verify)
        return of_model(checked.skeleton, checked.family, checked.scheme, checked.layout.is_native)

    @property
    def architecture(self) -> str:
        return str((self.config.architectures or ["none"])[0])

    @property
    def dtype(self) -> str:
        """The dtype that vLLM uses by default."""
        return str(getattr(self.config, "dtype", None) or "float32").removeprefix("torch.")

    @property
    def row_parallel(self) -> list[str]:
        """The quantized linears that vLLM splits along their inputs."""
        endings = tuple(f".{site.linears[0]}" for site in self.family.sites if site.name in ("o", "down"))
        return [name for name in self.scheme.linears if name.endswith(endings)]


def of_model(model: PreTrainedModel, family: Family, scheme: Scheme, native: bool) -> Facts:
    """The facts about a model that has `scheme` installed or will have it. Its linears may be quantized or not."""
    linears: dict[str, Any] = {name: model.get_submodule(name) for name in scheme.linears}
    widths = {name: linear.in_features for name, linear in linears.items()}
    biased = tuple(name for name, linear in linears.items() if isinstance(linear.bias, nn.Parameter))
    return Facts(model.config, family, scheme, native, widths, biased)
