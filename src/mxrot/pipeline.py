"""Quantize a model: one pass over its decoder blocks, one block on the device at a time.

The inputs of a block come from the already quantized blocks before it. Within a block the sites are taken in
the order in which they compute: a site's statistics are taken, its transform fitted, its weights rounded and its
linears replaced before the next site is looked at. Smoothing scales come first, from one pass over the block as
it was, because they must go into layers that will be rounded before the site they serve.

Finished blocks may be handed to a store (on disk), which releases them; a store that already holds a block gives
it back instead of having it quantized again, with the same bits.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxrot.calibration import (
    COLLECTORS,
    BlockInputs,
    ChannelMaxima,
    Hessian,
    RowSample,
    advance,
    first_block_inputs,
    observe_all_inputs,
    observe_inputs,
)
from mxrot.errors import ConfigError, FamilyError, NumericsError
from mxrot.formats import QTensor
from mxrot.kernels import rotate_quantize
from mxrot.layers import QuantLinear, TensorQuantizer
from mxrot.models import (
    Family,
    Site,
    WeightFiles,
    build_skeleton,
    check_linears,
    fill,
    find_family,
    read_config,
    read_generation_config,
    rebuild_rotary,
    value_heads,
)
from mxrot.recipe import TRANSFORM_BLOCK, Recipe
from mxrot.surgery import (
    Weights,
    fold_into_producer,
    install_empty_site,
    install_site,
    scheme_name,
    shareable_scales,
    stored_tensors,
)
from mxrot.transforms import BlockTransform, SiteSample, generator_for
from mxrot.transforms.smoothing import smoothing_scales

Progress = Callable[[int, int, str], None]
"""Told (blocks done, blocks in all, what is being done)."""

ERROR_ROWS = 512
"""Calibration tokens on which the output error of each linear is measured."""
BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}
"""Tokens that pass through a block at once; fixed, so that sums always run in the same order."""


@dataclass(frozen=True)
class LinearReport:
    """What quantizing one linear cost."""

    name: str
    shape: tuple[int, int]
    site: str
    weight_error: float
    """Relative Frobenius error of the transformed weights."""
    output_error: float | None
    """Relative Frobenius error of the output on calibration tokens, inputs quantized too; None without data."""
    damping: float | None
    """Damping of the Hessian that let it factorize; None without one."""


@dataclass(frozen=True)
class BlockReport:
    """What quantizing one decoder block cost."""

    index: int
    seconds: float
    linears: list[LinearReport]


class BlockStore(Protocol):
    """Takes finished blocks, and gives them back in a resumed run."""

    def load(self, index: int) -> tuple[dict[str, Tensor], BlockReport] | None:
        """Tensors by their names in the block, and its report; None if the store does not hold it."""

    def save(self, index: int, tensors: dict[str, Tensor], report: BlockReport) -> None:
        """Keep a finished block."""

    def save_rest(self, tensors: dict[str, Tensor]) -> None:
        """Keep the tensors outside of the decoder blocks, by their full names."""


@dataclass
class RunRecord:
    """Everything needed to say what a run did, and to do it again."""

    recipe: Recipe
    seed: int
    windows: tuple[int, int] | None
    """Calibration windows and their length; None without data."""
    device: str
    versions: dict[str, str]
    blocks: list[BlockReport] = field(default_factory=list)
    seconds: float = 0.0
    peak_gpu_bytes: int | None = None

    def as_table(self) -> dict[str, Any]:
        """The record as JSON takes it."""
        table = {key: value for key, value in vars(self).items() if key not in ("recipe", "blocks")}
        return {"recipe": self.recipe.to_toml(), **table, "blocks": [asdict(block) for block in self.blocks]}


@dataclass
class QuantizedModel:
    """The result of `quantize`."""

    model: PreTrainedModel | None
    """Ready to run; None where a store took the blocks."""
    record: RunRecord


def versions() -> dict[str, str]:
    """Versions of what decides about a number."""
    try:
        own = version("mxrot")
    except PackageNotFoundError:
        own = "source"
    return {
        "mxrot": own,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


@torch.no_grad()
def quantize(
    folder: Path,
    recipe: Recipe,
    *,
    windows: Tensor | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    store: BlockStore | None = None,
    progress: Progress = lambda done, total, what: None,
) -> QuantizedModel:
    """Quantize the model in `folder`.

    `windows` are calibration token windows [W, T] (None for a recipe that needs no data). Computes on `device`,
    in the checkpoint's own type on a GPU and in float32 on a CPU; everything a checkpoint keeps is rounded to its
    type either way, so that a reloaded model is the same model. With a `store`, finished blocks go there.

    Raises ConfigError and FamilyError before any weight is read, NumericsError with the layer's name.
    """
    started = time.monotonic()
    device = torch.device(device)
    config = read_config(folder)
    family = find_family(config, str(folder))
    if getattr(config, "quantization_config", None) is not None:
        raise FamilyError(f"{folder}: is quantized already (quantization_config in config.json); give the original")
    _check_smoothing(recipe, family, config.num_hidden_layers)
    model = build_skeleton(config)
    check_linears(model, family, recipe.input_block, recipe.ignore)
    if windows is None and not recipe.is_data_free:
        raise ConfigError(f"recipe {recipe.name} needs calibration text")

    files = WeightFiles(folder)
    stored_dtype = files.dtype_of(f"{family.embedding}.weight")
    run = _Run(recipe, family, config, device, stored_dtype, compute_dtype(stored_dtype, device), seed)
    shape = None if windows is None else (windows.shape[0], windows.shape[1])
    record = RunRecord(recipe, seed, shape, device_name(device), versions())
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    load_outer(model, family, files, run.dtype, device)
    inputs = None
    if not recipe.is_data_free:
        assert windows is not None
        batch_windows = max(1, BATCH_TOKENS.get(device.type, 2048) // windows.shape[1])
        inputs = first_block_inputs(model, family, windows, batch_windows)
    blocks = list(model.get_submodule(family.blocks).children())
    for index, block in enumerate(blocks):
        progress(index, len(blocks), family.block_prefix(index))
        finished = store.load(index) if store else None
        if finished is None:
            report = _quantize_block(run, index, block, files, inputs)
        else:
            tensors, report = finished
            load_finished_block(block, index, tensors, recipe, family, run.dtype, device)
        record.blocks.append(report)
        if inputs is not None and index + 1 < len(blocks):
            advance(block, inputs, family.block_prefix(index))
        if store is not None:
            if finished is None:
                store.save(index, stored_tensors(block, stored_dtype), report)
            block.to("meta")
    if store is None:
        read_generation_config(model, folder)
    else:
        store.save_rest(outer_tensors(files, family))
    progress(len(blocks), len(blocks), "done")
    record.seconds = time.monotonic() - started
    if device.type == "cuda":
        record.peak_gpu_bytes = torch.cuda.max_memory_allocated(device)
    return QuantizedModel(None if store else model, record)


@dataclass(frozen=True)
class _Run:
    """What stays the same from block to block."""

    recipe: Recipe
    family: Family
    config: Any
    device: torch.device
    stored_dtype: torch.dtype
    dtype: torch.dtype
    seed: int

    @property
    def weights(self) -> TensorQuantizer:
        return self.recipe.weights.quantizer()

    @property
    def activations(self) -> TensorQuantizer | None:
        return None if self.recipe.activations is None else self.recipe.activations.quantizer()


def _check_smoothing(recipe: Recipe, family: Family, blocks: int) -> None:
    """ConfigError unless every site that smoothing names is there, and its scales have a place to go."""
    if recipe.smoothing is None:
        return
    known = [site.name for site in family.sites]
    for name in recipe.smoothing.skip:
        if name not in known:
            raise ConfigError(
                f"recipe {recipe.name}: smoothing.skip: family {family.name} has no site {name!r}; "
                f"its sites are {', '.join(known)}"
            )
    for site in (site for index in range(blocks) for site in _smoothed_sites(recipe, family, index)):
        if recipe.sharing == "site" and site.norm is None and site.producer is None:
            raise ConfigError(
                f"recipe {recipe.name}: site {site.name!r} of family {family.name} has nothing before it that can "
                'take smoothing scales; list it under smoothing.skip, or set transform.sharing = "block"'
            )


def _smoothed_sites(recipe: Recipe, family: Family, index: int) -> list[Site]:
    """Sites of a block that get smoothing scales, with all their linears; none of which nothing is quantized."""
    if recipe.smoothing is None:
        return []
    active = {site.name for site in family.active_sites(index, recipe.ignore)}
    return [site for site in family.sites if site.name in active and site.name not in recipe.smoothing.skip]


def compute_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The model's own type on a GPU; float32, which holds it exactly and is faster there, on a CPU."""
    return torch.float32 if device.type == "cpu" else stored


def device_name(device: torch.device) -> str:
    """What computes: the GPU's name, or the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def load_outer(
    model: PreTrainedModel, family: Family, files: WeightFiles, dtype: torch.dtype, device: torch.device
) -> None:
    """Load what is outside of the decoder blocks. FamilyError names a tensor that is missing or has no place."""
    tensors = outer_tensors(files, family)
    places = (family.embedding, family.final_norm, family.head)
    for name in tensors:
        if not name.startswith(tuple(f"{place}." for place in places)):
            raise FamilyError(f"{name}: family {family.name} has no place for this tensor")
    for name in places:
        prefix = name + "."
        own = {key[len(prefix) :]: value.to(device, dtype) for key, value in tensors.items() if key.startswith(prefix)}
        if name == family.head and not own and model.config.tie_word_embeddings:
            model.tie_weights()
        else:
            fill(model.get_submodule(name), own, name)
    rebuild_rotary(model, family, device)


def outer_tensors(files: WeightFiles, family: Family) -> dict[str, Tensor]:
    """Every tensor outside of the decoder blocks, by its full name."""
    return {name: files.read(name) for name in files.names if not name.startswith(family.blocks + ".")}


def load_finished_block(
    block: nn.Module,
    index: int,
    tensors: dict[str, Tensor],
    recipe: Recipe,
    family: Family,
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """Fill a meta `block` with the tensors of a quantized one, by their names in the block."""
    weights = recipe.weights.quantizer()
    activations = None if recipe.activations is None else recipe.activations.quantizer()
    for site in family.active_sites(index, recipe.ignore):
        scheme = scheme_name(index, site)
        stored = tensors.get(f"{site.linears[0]}.{scheme}_input.weight")
        install_empty_site(block, scheme, site, stored, weights, activations)
    quantized = stored_tensors(block, torch.int8)
    moved = {
        name: value.to(device, dtype) if quantized[name].dtype == torch.int8 else value.to(device)
        for name, value in tensors.items()
        if name in quantized
    }
    fill(block, {**tensors, **moved}, f"{family.blocks}.{index}")


def _quantize_block(
    run: _Run, index: int, block: nn.Module, files: WeightFiles, inputs: BlockInputs | None
) -> BlockReport:
    """Load one block, and quantize its sites one after the other."""
    started = time.monotonic()
    prefix = run.family.block_prefix(index)
    tensors = files.read_under(prefix, run.device)
    linears = [linear for site in run.family.sites for linear in site.linears]
    weights: Weights = {name: tensors[f"{name}.weight"].double() for name in linears if f"{name}.weight" in tensors}
    # Through the stored type: a norm of another type would be rounded to it in a checkpoint.
    fill(block, {name: value.to(run.stored_dtype).to(run.dtype) for name, value in tensors.items()}, prefix)

    sites = run.family.active_sites(index, run.recipe.ignore)
    scales = {} if inputs is None else _smooth_block(run, index, block, weights, inputs)
    reports = []
    for site in sites:
        reports += _quantize_site(run, index, block, site, weights, scales.get(site.name), inputs)
    return BlockReport(index, round(time.monotonic() - started, 3), reports)


def _smooth_block(run: _Run, index: int, block: nn.Module, weights: Weights, inputs: BlockInputs) -> dict[str, Tensor]:
    """Smoothing scales [K] by site name, from the inputs of the block as it was.

    With sharing "site" they are folded here, and what is returned is empty.
    """
    smoothing = run.recipe.smoothing
    if smoothing is None:
        return {}
    prefix = run.family.block_prefix(index)
    sites = _smoothed_sites(run.recipe, run.family, index)
    maxima = {site.name: ChannelMaxima() for site in sites}
    observe_all_inputs(block, [(site.linears[0], maxima[site.name].update) for site in sites], inputs)
    heads = value_heads(run.config)
    found = {}
    for site in sites:
        seen = maxima[site.name].result()
        if not torch.isfinite(seen).all():
            raise NumericsError(f"{prefix}.{site.linears[0]}: its input holds NaN or Inf on the calibration text")
        scales = smoothing_scales(seen, torch.cat([weights[name] for name in site.linears]), smoothing.alpha)
        if run.recipe.sharing == "block":
            found[site.name] = scales
        else:
            fold_into_producer(block, site, weights, shareable_scales(scales, site, heads), heads, run.stored_dtype)
    for name, weight in weights.items():
        linear = block.get_submodule(name)
        assert isinstance(linear.weight, Tensor)
        linear.weight.data.copy_(weight.to(run.stored_dtype))
    return found


def _quantize_site(
    run: _Run,
    index: int,
    block: nn.Module,
    site: Site,
    weights: Weights,
    scales: Tensor | None,
    inputs: BlockInputs | None,
) -> list[LinearReport]:
    """Fit the site's transform, round its weights, and put quantized linears in place."""
    prefix = run.family.block_prefix(index)
    name = f"{prefix}.{site.linears[0]}"
    rows = RowSample(ERROR_ROWS)
    transform = _fit_transform(run, name, block, site, weights, scales, inputs, rows)
    hessian = None
    if run.recipe.rounding.needs_hessian:
        assert inputs is not None
        hessian = _hessian(run, block, site, transform, inputs)

    folded = {
        linear: weights[linear] if transform is None else transform.fold(weights[linear]) for linear in site.linears
    }
    quantized, damping = _round_site(run, folded, hessian, name)
    stored = None if transform is None else transform.to_stored()
    install_site(block, scheme_name(index, site), site, quantized, stored, run.weights, run.activations)
    return [
        LinearReport(
            f"{prefix}.{linear}",
            (folded[linear].shape[0], folded[linear].shape[1]),
            site.name,
            _relative_error(quantized[linear].dequantize(torch.float64), folded[linear]),
            _output_error(block, linear, weights[linear], rows) if inputs is not None else None,
            damping,
        )
        for linear in site.linears
    ]


def _round_site(
    run: _Run, folded: Weights, hessian: Tensor | None, name: str
) -> tuple[dict[str, QTensor], float | None]:
    """Round the linears of a site, all at once unless a scale looks at the whole tensor; and the damping used."""
    rule, format = run.weights.rule, run.weights.format
    if rule.looks_at_whole_tensor(format.scale):
        results = {
            linear: run.recipe.rounding.round(weight, format, rule, hessian, name) for linear, weight in folded.items()
        }
        return {linear: result.weight for linear, result in results.items()}, next(iter(results.values())).damping
    result = run.recipe.rounding.round(torch.cat(list(folded.values())), format, rule, hessian, name)
    parts = result.weight.split_rows([len(weight) for weight in folded.values()])
    return dict(zip(folded, parts, strict=True)), result.damping


def _fit_transform(
    run: _Run,
    name: str,
    block: nn.Module,
    site: Site,
    weights: Weights,
    scales: Tensor | None,
    inputs: BlockInputs | None,
    rows: RowSample,
) -> BlockTransform | None:
    """The site's transform as a checkpoint will hold it; None where nothing is applied at run time.

    With `sharing = "block"` it starts with the division by the smoothing scales. `rows` gets the raw inputs.
    """
    method = run.recipe.transform
    collectors = {need: COLLECTORS[need](TRANSFORM_BLOCK, getattr(method, "rows", 0)) for need in sorted(method.needs)}
    if inputs is not None:
        inverse = None if scales is None else (1 / scales).to(torch.float32)

        def see(x: Tensor) -> None:
            if not torch.isfinite(x).all():
                raise NumericsError(f"{name}: its input holds NaN or Inf on the calibration text")
            rows.update(x)
            for collector in collectors.values():
                collector.update(x if inverse is None else x * inverse)

        observe_inputs(block, site.linears[0], inputs, see, batches=None if collectors else 1)
    if not run.recipe.has_transform:
        return None
    smoothed = torch.cat([weights[linear] for linear in site.linears])
    if scales is not None:
        smoothed = smoothed * scales
    seen = {need: collector.result() for need, collector in collectors.items()}
    sample = SiteSample(smoothed, TRANSFORM_BLOCK, seen, run.activations)
    transform = method.fit(sample, run.recipe.sharing, generator_for(run.seed, name))
    if scales is not None:
        transform = BlockTransform.diagonal(1 / scales, TRANSFORM_BLOCK).compose(transform)
    return transform.as_applied()


def _hessian(run: _Run, block: nn.Module, site: Site, transform: BlockTransform | None, inputs: BlockInputs) -> Tensor:
    """The Hessian of what the site's linears will really see: transformed and quantized inputs."""
    quantizer = run.activations
    matrices = None if transform is None else transform.matrices.to(torch.float32)
    collector = Hessian(exact_in_bfloat16=quantizer is not None and quantizer.is_exact_in_bfloat16)

    def see(x: Tensor) -> None:
        if quantizer is None:
            collector.update(x.float() if transform is None else transform.apply(x))
        else:
            collector.update(rotate_quantize(x, matrices, quantizer.format, quantizer.rule))

    observe_inputs(block, site.linears[0], inputs, see)
    return collector.result()


def _output_error(block: nn.Module, linear: str, weight: Tensor, rows: RowSample) -> float:
    """Relative error of one installed linear on sampled inputs, against its weights before quantization."""
    module = block.get_submodule(linear)
    assert isinstance(module, QuantLinear)
    x = rows.result()
    bias = 0 if module.bias is None else module.bias
    return _relative_error((module(x) - bias).double(), x.double() @ weight.t())


def _relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||; 0 where both are zero."""
    norm = expected.norm()
    return float((found - expected).norm() / norm) if norm > 0 else float(found.norm())
