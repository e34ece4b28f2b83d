"""What vLLM does with a checkpoint, without mxrot and with mxrot installed beside it (`vllm.plugin`).

`mxrot plan`, for a planned checkpoint, and `mxrot export`, for an existing one, give the same verdict. The facts about
vLLM were read in its Python code. docs/vllm.md says where each is found there, and which were tested in a run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from mxrot.checkpoint.config import why_unfaithful
from mxrot.models import Family, value_heads
from mxrot.recipe import Recipe
from mxrot.scheme import SiteScheme
from mxrot.transforms.stages import BlockDiagonalSpec
from mxrot.vllm.devices import DEVICES, VERSION
from mxrot.vllm.facts import Facts

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Architectures that vLLM implements itself, with q, k, v and gate, up as separate linears in the checkpoint."""
FUSED = ("Phi3ForCausalLM",)
"""The same, with q, k and v as one linear, and gate and up as another."""
KV_OF_VLLM = (
    "from a checkpoint vLLM takes FP8 keys and values with a scale for a tensor or a head, which mxrot does not make: "
    "for vLLM, quantize without [cache] and serve with --kv-cache-dtype fp8"
)
CACHE_STOP = "quantizes keys and values of attention by blocks, which neither vLLM nor the plugin does"
OPERANDS_STOP = "quantizes the operands of attention's products, which neither vLLM nor the plugin does"
HEAD_STOP = (
    "has a quantized head, which config.json describes in mxrot's own words: install mxrot where vLLM runs, or "
    "quantize without [head]"
)
_SIZES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Serving:
    """What prevents serving a checkpoint in vLLM, for one of the two ways."""

    stops: tuple[str, ...]
    """One sentence for each reason. Empty if it runs."""
    tensor_parallel: tuple[int, ...]
    """The sizes of 1, 2, 4, 8 and 16 that fit. Empty if it does not run."""
    needs_export: bool = False
    """True if vLLM runs the output of `mxrot export -o`, and not the folder as it is."""


@dataclass(frozen=True)
class VllmReport:
    """What vLLM does with a checkpoint that exists or is planned."""

    stock: Serving
    plugin: Serving
    """The result with mxrot installed in vLLM's environment."""
    notes: tuple[str, ...]
    """Things that run, but differently from how accuracy was measured."""

    def as_table(self) -> dict[str, Any]:
        """The table that `--json` of `export` and `plan` writes."""
        told = ("device", "computes", "note")
        devices = [{name: getattr(one, name) for name in told} for one in DEVICES] if not self.stock.stops else []
        return {"vllm": VERSION, **asdict(self), "devices": devices}


def check_for_vllm(folder: Path, verify: bool | None = None) -> VllmReport:
    """What vLLM does with the checkpoint in `folder`. Raises the errors of `Facts.written`."""
    return judge(Facts.written(folder, verify))


def plan_for_vllm(skeleton: PreTrainedModel, family: Family, recipe: Recipe) -> VllmReport:
    """What vLLM would do with the checkpoint that `recipe` makes of a model, found before it is made."""
    return judge(Facts.planned(skeleton, family, recipe))


def judge(facts: Facts) -> VllmReport:
    """The verdict for these facts."""
    both = tuple(_stops_of_both(facts))
    stock = (*both, *_stops_of_stock(facts))
    plugin = (*both, *_stops_of_plugin(facts))
    sizes = tuple(size for size in _SIZES if _divides(facts, size))
    alone = (1,) if facts.scheme.has_transform else sizes
    return VllmReport(
        Serving(stock, () if stock else alone, facts.is_native and not stock),
        Serving(plugin, () if plugin else sizes),
        tuple(_notes(facts)),
    )


def _stops_of_both(facts: Facts) -> Iterator[str]:
    if facts.family.experts is not None:
        yield "it has experts, which were not tried in vLLM, and whose inputs neither vLLM nor the plugin transforms"
    if facts.family.beside is not None:
        yield f"{facts.architecture}: models of more than text were not tried in vLLM"
    if not all(facts.family.attends(index) for index in range(len(facts.family.kinds))):
        yield f"{facts.architecture}: models with blocks that have no attention were not tried in vLLM"
    if facts.scheme.cache is not None:
        yield f"it {CACHE_STOP}; {KV_OF_VLLM}"
    if facts.scheme.attention is not None:
        yield f"it {OPERANDS_STOP}"
    if facts.scheme.has_transform and facts.architecture not in ARCHITECTURES + FUSED:
        tried = ", ".join(ARCHITECTURES + FUSED)
        yield f"{facts.architecture}: its transforms were not tried in vLLM; tried were {tried}"
    left = set(facts.scheme.left)
    for index in range(facts.config.get_text_config().num_hidden_layers):
        for site in facts.family.sites_of(index):
            names = [f"{facts.family.block_prefix(index)}.{linear}" for linear in site.linears]
            apart = [name for name in names if name in left]
            if apart and len(apart) < len(names):
                yield f"{apart[0]} is not quantized while others of its site are, and vLLM holds these as one linear"
                return


def _stops_of_stock(facts: Facts) -> Iterator[str]:
    has_transform = facts.scheme.has_transform
    if has_transform and facts.architecture in FUSED:
        yield (
            f"{facts.architecture}: vLLM needs a transform each for q, k and v, which are one linear in this model; "
            "install mxrot where vLLM runs, or quantize with a recipe without a transform"
        )
    if any(stage == BlockDiagonalSpec(32, "block") for one in facts.scheme.distinct for stage in one.stages):
        yield (
            "it has one matrix a block, and vLLM takes one a site: quantize with --recipe mxrot-vllm or "
            "--set transform.sharing=site, or install mxrot where vLLM runs"
        )
    elif (
        facts.scheme.cache is None
        and facts.scheme.attention is None
        and facts.scheme.head is None
        and (reason := why_unfaithful(facts.scheme)) is not None
    ):
        yield f"vLLM reads the words of compressed-tensors: {reason}; install mxrot where vLLM runs"
    if facts.scheme.head is not None:
        yield f"it {HEAD_STOP}"
    biased = [name for name in facts.biased if facts.scheme.linears[name].stages]
    if biased:
        yield (
            f"{biased[0]} has a bias, which vLLM does not take beside a transform: install mxrot where vLLM runs, "
            "or quantize with a recipe without a transform"
        )


def _stops_of_plugin(facts: Facts) -> Iterator[str]:
    if facts.scheme.head is not None and facts.architecture not in ARCHITECTURES + FUSED:
        tried = ", ".join(ARCHITECTURES + FUSED)
        yield f"{facts.architecture}: its quantized head was not tried in vLLM; tried were {tried}"
    for one in facts.scheme.distinct:
        if reason := why_not_in_plugin(one):
            yield reason
            return


def why_not_in_plugin(scheme: SiteScheme) -> str | None:
    """Why mxrot does not compute such linears in vLLM. None if it does."""
    if scheme.stages and not (len(scheme.stages) == 1 and isinstance(scheme.stages[0], BlockDiagonalSpec)):
        kinds = " then ".join(stage.kind for stage in scheme.stages)
        return f"inputs are transformed by {kinds}; the plugin computes one block-diagonal stage"
    if any(part.per == "tensor" for part in scheme.weights.format.grid.parts(scheme.weights.rule)):
        return (
            f"weights in {scheme.weights.format.name} have a number for the whole tensor, and vLLM holds several "
            "linears as one tensor"
        )
    return None


def _notes(facts: Facts) -> Iterator[str]:
    inputs = [one.activations for one in facts.scheme.distinct]
    rules = sorted({one.spelled_rule for one in inputs if one is not None})
    if facts.architecture not in ARCHITECTURES + FUSED:
        yield f"{facts.architecture} was not tried in vLLM; tried were {', '.join(ARCHITECTURES + FUSED)}"
    if None in inputs:
        yield (
            "the recipe leaves activations alone, but vLLM quantizes them all the same where the device has A4 or A8; "
            "--linear-backend marlin keeps it from that on NVIDIA devices"
        )
    if rules:
        named = " and ".join(rules)
        yield f"accuracy was measured with activations in MXFP4, scale rule {named}; vLLM does as the table says"
    if facts.scheme.has_transform and facts.dtype != "bfloat16":
        yield (
            f"the model is in {facts.dtype}, and in that vLLM rounds transforms otherwise than the weights were folded "
            "for; a written export says bfloat16 in config.json"
        )
    if facts.scheme.has_transform:
        yield "transformed activations are rounded to bfloat16 by vLLM before they are quantized, and not by mxrot"


def _divides(facts: Facts, size: int) -> bool:
    """True if `size` devices can share the linears: each gets whole blocks of inputs, and whole heads."""
    widths = [(facts.scheme.linears[name], facts.widths[name]) for name in facts.row_parallel]
    blocks = all(width % (size * input_block(one, width)) == 0 for one, width in widths)
    config = facts.config.get_text_config()
    heads = config.num_attention_heads
    key_heads, _ = value_heads(config)
    shares = key_heads % size == 0 or size % key_heads == 0
    return blocks and heads % size == 0 and shares and _inner_width(config) % size == 0


def _inner_width(config: Any) -> int:
    """The inner width of an MLP. If no block has a plain MLP, that of an expert."""
    return int(getattr(config, "intermediate_size", None) or config.moe_intermediate_size)


def input_block(scheme: SiteScheme, width: int) -> int:
    """A device's share of `width` inputs must be a multiple of this number. If a row is one block, it is `width`."""
    quantizers = [quantizer for quantizer in (scheme.weights, scheme.activations) if quantizer is not None]
    return width if any(quantizer.format.block is None for quantizer in quantizers) else scheme.input_block
