"""Checkpoints of mxrot in transformers: `AutoModelForCausalLM.from_pretrained(DIR)` after `import mxrot`.

The quantizer puts quantized linears, with the transforms of their sites, into the model that transformers has built,
and transformers fills them by name. `mxrot.autoload` says how it is found.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mxrot import pipeline
from mxrot.checkpoint.config import (
    FORMAT_VERSION,
    MARKER,
    METHOD,
    ON_LOAD,
    check_exportable,
    quantization_config,
)
from mxrot.errors import CheckpointError, ConfigError
from mxrot.formats import FORMATS, Format
from mxrot.layers import TensorQuantizer, prepare_on_gpus, sites_of
from mxrot.models import Site, check_linears, find_family, needed_attention, separate_experts
from mxrot.recipe import TRANSFORM_BLOCK, Recipe, load_recipe
from mxrot.surgery import install_empty_site, scheme_name
from mxrot.transforms.base import STORED_DTYPE


class CheckpointConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint that mxrot has written, kept as it is."""

    def __init__(self, **table: Any) -> None:
        self.quant_method: Any = METHOD
        self.table = table
        version = table.get(MARKER, {}).get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(f"checkpoint format version {version!r}; this mxrot reads version {FORMAT_VERSION}")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(**deepcopy(config_dict))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return deepcopy(self.table)

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    @property
    def format(self) -> Format:
        """Of the weights, and of the inputs where these are quantized."""
        for format in FORMATS.values():
            if format.compressed_tensors == self.table.get("format"):
                return format
        raise CheckpointError(f"quantization_config: unknown format {self.table.get('format')!r}")

    @property
    def activations(self) -> TensorQuantizer | None:
        rule = self.table[MARKER].get("activation_rule")
        return None if rule is None else TensorQuantizer(self.format, self.format.rule(rule))

    @property
    def ignored(self) -> tuple[str, ...]:
        """Full names of the linears that are left as they are."""
        return tuple(self.table.get("ignore", ()))

    @property
    def schemes(self) -> frozenset[str]:
        """Names of the sites' transforms."""
        return frozenset(self.table.get("transform_config", {}).get("config_groups", {}))


class MxrotConfig(QuantizationConfigMixin):
    """`from_pretrained(..., quantization_config=MxrotConfig("hadamard"))`: quantize a model when it has been loaded.

    For recipes that need no text; ConfigError for others, and for what no checkpoint can hold.
    """

    def __init__(self, recipe: str | Recipe = "hadamard") -> None:
        self.quant_method: Any = ON_LOAD
        self.recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
        check_exportable(self.recipe)
        if not self.recipe.is_data_free:
            raise ConfigError(f"recipe {self.recipe.name} needs calibration text: use mxrot.quantize")

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method, "recipe": self.recipe.to_toml()}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class _Quantizer(HfQuantizer):
    """For inference: what it makes can be saved and compiled, not trained."""

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


class OnLoadQuantizer(_Quantizer):
    """Quantizes a model that transformers has loaded in its own type."""

    quantization_config: MxrotConfig

    def validate_environment(self, *_: Any, device_map: Any = None, **options: Any) -> None:
        """ConfigError unless the whole model will be on one device; called again with what "auto" stands for."""
        if isinstance(device_map, dict):
            places = set(device_map.values())  # as transformers does it, which spreads a model over 0 and "cuda:0", too
            if len(places) > 1 or places & {"disk", "meta", torch.device("meta")}:
                raise ConfigError(
                    f"device_map: a model that is quantized while it is loaded must be on one device, got "
                    f"{', '.join(sorted(map(str, places)))}; quantize it into a folder "
                    "(mxrot.quantize(..., output=DIR)), which loads with any device_map"
                )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **options: Any) -> PreTrainedModel:
        find_family(model.config, model.name_or_path or "the model")
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **options: Any) -> PreTrainedModel:
        quantize_in_place(model, self.quantization_config.recipe)
        return model


class MxrotQuantizer(_Quantizer):
    """Puts quantized linears into a model that transformers is about to fill from a checkpoint."""

    requires_calibration = True
    quantization_config: CheckpointConfig

    def update_weight_conversions(self, weight_conversions: list[Any], *model: PreTrainedModel) -> list[Any]:
        """Tensors may be renamed, but linears of experts are not put together. Older transformers give no model."""
        return [conversion for conversion in weight_conversions if not isinstance(conversion, WeightConverter)]

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **options: Any) -> PreTrainedModel:
        install_linears(model, self.quantization_config, options.get("checkpoint_files") or ())
        attention = needed_attention(model.config)
        if attention is not None and model.config._attn_implementation == "sdpa":
            model.set_attn_implementation(attention)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **options: Any) -> PreTrainedModel:
        prepare_on_gpus(model, fast=self.quantization_config.table[MARKER].get("accumulation") == "fast")
        return model


def quantize_in_place(model: PreTrainedModel, recipe: Recipe) -> None:
    """Replace the linears of a loaded model by quantized ones, by a recipe that needs no text.

    The model is written to a temporary folder for it.
    """
    separate_experts(model)
    config = deepcopy(model.config)
    del config.quantization_config
    with tempfile.TemporaryDirectory(prefix="mxrot-") as folder:
        config.save_pretrained(folder)
        tied = {f"{find_family(config, 'the model').head}.weight"} if config.tie_word_embeddings else set()
        tensors = {name: value.contiguous() for name, value in model.state_dict().items() if name not in tied}
        save_file(tensors, Path(folder) / "model.safetensors", {"format": "pt"})
        quantized = pipeline.quantize(Path(folder), recipe, device=model.device).model
    assert quantized is not None
    names = {module: name for name, module in quantized.named_modules()}
    for linears in list(sites_of(quantized)):
        for linear in linears:
            linear.bias = getattr(model.get_submodule(names[linear]), "bias", None)
            model.set_submodule(names[linear], linear)
    with_config(model, recipe)


def with_config(model: PreTrainedModel, recipe: Recipe) -> PreTrainedModel:
    """A model that was quantized in memory, with the config that `save_pretrained` writes for `from_pretrained`.

    None for a recipe whose result no checkpoint can hold.
    """
    try:
        check_exportable(recipe)
    except ConfigError:
        return model
    family = find_family(model.config, "the model")
    blocks = list(model.get_submodule(family.blocks).children())
    ignored = sorted(
        f"{family.block_prefix(index)}.{name}"
        for index, block in enumerate(blocks)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    )
    model.config.quantization_config = CheckpointConfig(**quantization_config(recipe, family, len(blocks), ignored))
    return model


def install_linears(model: PreTrainedModel, config: CheckpointConfig, files: Sequence[str] = ()) -> None:
    """Replace the linears of every site by quantized ones without values, on the meta device."""
    family = find_family(model.config, "config.json")
    separate_experts(model)
    format = config.format
    weights = TensorQuantizer(format, format.rule())
    check_linears(model, family, TRANSFORM_BLOCK, config.ignored)
    shapes = _transform_shapes(files)
    for index, block in enumerate(model.get_submodule(family.blocks).children()):
        for site in family.active_sites(index, config.ignored):
            scheme = scheme_name(index, site)
            stored = None
            if scheme in config.schemes:
                stored = _empty_transform(block, site, config.table[MARKER].get("sharing"), shapes.get(scheme))
            install_empty_site(block, scheme, site, stored, weights, config.activations)


def _transform_shapes(files: Sequence[str]) -> dict[str, list[int]]:
    """The shape of each transform in these safetensors files, by the name of its scheme."""
    found = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, not a dictionary
                if name.endswith("_input.weight"):
                    scheme = name.removesuffix("_input.weight").rpartition(".")[2]
                    found[scheme] = file.get_slice(name).get_shape()
    return found


def _empty_transform(block: nn.Module, site: Site, sharing: str | None, shape: list[int] | None) -> Tensor:
    """sqrt(B) T without values: of the shape that it has in the file, or that `sharing` stands for."""
    linear = block.get_submodule(site.linears[0])
    assert isinstance(linear, nn.Linear)
    groups = linear.in_features // TRANSFORM_BLOCK
    one = [TRANSFORM_BLOCK, TRANSFORM_BLOCK]
    if shape is None:
        shape = [groups, *one] if sharing == "block" and groups > 1 else one
    return torch.empty(shape, dtype=STORED_DTYPE, device="meta")
