"""Checkpoints of mxrot in transformers: `AutoModelForCausalLM.from_pretrained(DIR)` after `import mxrot`.

The quantizer puts quantized linears, with the transforms of their sites, into the model that transformers has built.
transformers then fills them by name. `mxrot.autoload` describes how transformers finds the quantizer.
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
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mxrot import quantizing
from mxrot.checkpoint.agreement import check_layout, check_recipe, settled
from mxrot.checkpoint.checked import checkpoint_errors
from mxrot.checkpoint.config import check_exportable, native_config
from mxrot.checkpoint.contents import (
    Stored,
    check_blocks,
    check_tensors,
    check_value,
    in_model,
    install_linears,
    read_files,
)
from mxrot.checkpoint.files import INDEX
from mxrot.checkpoint.layout import read_layout
from mxrot.checkpoint.verification import check_files, read_records
from mxrot.documents import read_json
from mxrot.errors import ConfigError
from mxrot.layers import separate_experts, sites_of
from mxrot.marker import MARKER, METHOD, ON_LOAD, SAVED_BY
from mxrot.models import WeightFiles, check_for_transformers, find_family, needed_attention
from mxrot.models.skeleton import forget_derived
from mxrot.recipe import Recipe, load_recipe
from mxrot.scheme import Scheme, install_attention, prepare


class CheckpointConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint of mxrot, unchanged."""

    def __init__(self, **table: Any) -> None:
        self.quant_method: Any = METHOD
        self.table = table
        self.layout = read_layout(table)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(**deepcopy(config_dict))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The table, with a note that a run.json beside it may belong to an earlier checkpoint."""
        table = deepcopy(self.table)
        table[MARKER][SAVED_BY] = "transformers"
        return table

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class MxrotConfig(QuantizationConfigMixin):
    """Quantizes a model while transformers loads it: `from_pretrained(..., quantization_config=MxrotConfig(...))`.

    Args:
        recipe: A recipe that needs no calibration text, or its name.

    Raises:
        ConfigError: The recipe needs text, or a checkpoint cannot hold its result.

    Example:
        >>> config = mxrot.MxrotConfig("hadamard")
        >>> model = transformers.AutoModelForCausalLM.from_pretrained("original", quantization_config=config)
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
    """For inference: the model can be saved and compiled, but not trained."""

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


class OnLoadQuantizer(_Quantizer):
    """Quantizes a model after transformers has loaded it in its own type."""

    quantization_config: MxrotConfig

    def validate_environment(self, *_: Any, device_map: Any = None, **options: Any) -> None:
        """ConfigError unless the whole model will be on one device. Called again once "auto" has been resolved."""
        if isinstance(device_map, dict):
            places = set(device_map.values())  # as transformers does; it spreads a model over 0 and "cuda:0", too
            if len(places) > 1 or places & {"disk", "meta", torch.device("meta")}:
                raise ConfigError(
                    f"device_map: a model that is quantized while it is loaded must be on one device, got "
                    f"{', '.join(sorted(map(str, places)))}; quantize it into a folder "
                    "(mxrot.quantize(..., output=DIR)), which loads with any device_map"
                )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **options: Any) -> PreTrainedModel:
        forget_derived(model.config)
        family = find_family(model.config, model.name_or_path or "the model")
        check_for_transformers(model, family, options.get("checkpoint_files") or ())
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **options: Any) -> PreTrainedModel:
        quantize_in_place(model, self.quantization_config.recipe)
        return model


class MxrotQuantizer(_Quantizer):
    """Puts quantized linears into a model that transformers is about to fill from a checkpoint."""

    requires_calibration = True
    quantization_config: CheckpointConfig
    _stored: Stored | None = None
    _scheme: Scheme

    def update_weight_conversions(self, weight_conversions: list[Any], *model: PreTrainedModel) -> list[Any]:
        """Allow renamed tensors, but do not merge the linears of experts. Older transformers passes no model."""
        return [conversion for conversion in weight_conversions if not isinstance(conversion, WeightConverter)]

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **options: Any) -> PreTrainedModel:
        files = options.get("checkpoint_files") or ()
        self._scheme, self._stored = check_files_of(model, self.quantization_config, files)
        attention = needed_attention(model.config)
        if attention is not None and model.config._attn_implementation == "sdpa":
            model.set_attn_implementation(attention)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **options: Any) -> PreTrainedModel:
        check_values_of(model, self._stored)
        prepare(model, self._scheme, only_on_gpus=True)
        return model


def check_files_of(
    model: PreTrainedModel, config: CheckpointConfig, files: Sequence[str]
) -> tuple[Scheme, Stored | None]:
    """Install linears without values in a model that transformers has built, and check everything that it is about to
    read.

    CheckpointError as for `mxrot.load`. Records beside the files are checked if they exist. transformers fetches none
    from the hub.
    """
    layout, family = config.layout, find_family(model.config, "config.json")
    blocks = model.config.get_text_config().num_hidden_layers
    if not files:  # the caller gives a state_dict
        scheme = layout.scheme(family, blocks)
        install_linears(model, family, scheme)
        return scheme, None
    folder = Path(files[0]).parent
    with checkpoint_errors(folder):
        stored = read_files(files)
        if (folder / INDEX).exists():
            WeightFiles(folder)  # refuses a file beside shards: transformers takes one
        tensors = stored.tensors(family)
        records = read_records(folder, stored, SAVED_BY in config.table[MARKER])
        check_files(folder, records)
        check_blocks(model.config, family, tensors)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        scheme = settled(layout, layout.scheme(family, blocks), family, shapes)
        check_layout(config.table, layout, scheme, family)
        separate_experts(model)
        if records is not None:
            check_recipe(Scheme.of(records.recipe, family, model), scheme, family, layout.version)
        if (folder / "generation_config.json").exists():
            read_json(folder / "generation_config.json")
        install_linears(model, family, scheme)
        check_tensors(model, family, tensors, bool(model.config.tie_word_embeddings))
    return scheme, stored


def check_values_of(model: PreTrainedModel, stored: Stored | None) -> None:
    """CheckpointError if a loaded model holds a damaged value. Values that were left on disk are read from there."""
    on_disk = set()
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            on_disk.add(name)
        else:
            check_value(name, tensor)
    if stored is None or not on_disk:
        return
    family = find_family(model.config, "config.json")
    for header in stored.headers:
        with safe_open(header.path, framework="pt") as file:
            for name in header.tensors:
                if in_model(name, family) in on_disk:
                    check_value(name, file.get_tensor(name))


def quantize_in_place(model: PreTrainedModel, recipe: Recipe) -> None:
    """Replace the linears of a loaded model by quantized ones, with a recipe that needs no text.

    The model is written to a temporary folder first.
    """
    separate_experts(model)
    config = deepcopy(model.config)
    del config.quantization_config
    with tempfile.TemporaryDirectory(prefix="mxrot-") as folder:
        config.save_pretrained(folder)
        tied = {f"{find_family(config, 'the model').head}.weight"} if config.tie_word_embeddings else set()
        tensors = {name: value.contiguous() for name, value in model.state_dict().items() if name not in tied}
        save_file(tensors, Path(folder) / "model.safetensors", {"format": "pt"})
        quantized = quantizing.quantize(Path(folder), recipe, device=model.device).model
    assert quantized is not None
    if model.config.tie_word_embeddings and not quantized.config.tie_word_embeddings:
        untie(model)
    if recipe.rotates_weights:
        take_rotated(model, quantized)
    names = {module: name for name, module in quantized.named_modules()}
    for linears in list(sites_of(quantized)):
        for linear in linears:
            linear.bias = getattr(model.get_submodule(names[linear]), "bias", None)
            model.set_submodule(names[linear], linear)
    family = find_family(model.config, "the model")
    install_attention(model, Scheme.of(recipe, family, model), family)
    with_config(model, recipe)


def untie(model: PreTrainedModel) -> None:
    """Give a loaded model its own head, which is a copy of the embedding."""
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)


def take_rotated(model: PreTrainedModel, quantized: PreTrainedModel) -> None:
    """Copy to a loaded model everything that rotations have changed and that is not quantized: embedding, norms,
    biases, routers, and a head."""
    own = dict(model.named_parameters())
    for name, rotated in quantized.named_parameters():
        if name in own and own[name].shape == rotated.shape:
            own[name].data.copy_(rotated)


def with_config(model: PreTrainedModel, recipe: Recipe) -> PreTrainedModel:
    """A model that was quantized in memory, with the config that `save_pretrained` writes for `from_pretrained`.

    The model gets no config if a checkpoint cannot hold the result of the recipe.
    """
    try:
        check_exportable(recipe)
    except ConfigError:
        return model
    family = find_family(model.config, "the model")
    table = native_config(Scheme.of(recipe, family, model), family, model.dtype)
    model.config.quantization_config = CheckpointConfig(**table)
    return model
