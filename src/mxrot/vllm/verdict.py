"""What vLLM makes of a checkpoint: as it comes, and with mxrot installed beside it (`checkpoint.vllm`).

What is said here of vLLM holds for the version named below and was read in its Python code; docs/vllm.md says where
each of it stands there, and which of it was run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from mxrot.checkpoint.checked import check_checkpoint
from mxrot.checkpoint.contents import install_linears
from mxrot.models import Family
from mxrot.recipe import Recipe
from mxrot.scheme import Scheme

VERSION = "0.32.0"
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Those whose model vLLM holds itself, with q, k, v and gate, up as separate linears in the checkpoint."""
FUSED = ("Phi3ForCausalLM",)
"""The same, with q, k and v as one linear, and gate and up."""
_SIZES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Arithmetic:
    """How stock vLLM multiplies MXFP4 weights on one kind of device."""

    device: str
    computes: str
    """Bits of weights and activations, and by what; `none` where vLLM refuses."""
    note: str = ""


DEVICES = (
    Arithmetic("B200, B300 (10.x)", "W4A4, FlashInfer", "scale rule rceil"),
    Arithmetic(
        "RTX 50, RTX PRO (12.x)",
        "unclear",
        "chooses a FlashInfer product that FlashInfer lists for 10.x only; --linear-backend marlin: W4A16",
    ),
    Arithmetic(
        "H100, H200 (9.0)",
        "W4A8, Humming",
        "activations in FP8 E4M3 with a scale a token; --linear-backend marlin: W4A16",
    ),
    Arithmetic("A100, L4, L40S, RTX 30 and 40 (8.x)", "W4A16, Marlin"),
    Arithmetic("V100, T4 (7.x)", "none", "the scheme wants 8.0"),
    Arithmetic("MI350 (gfx950)", "W4A4, AITER"),
    Arithmetic("other AMD", "W4A4, emulated with amd-quark", "scale rule even, slow"),
    Arithmetic("CPU", "none", "no kernel"),
)
"""What is chosen with no option, when everything is installed that vLLM's wheel asks for."""


@dataclass(frozen=True)
class Serving:
    """What stands against serving a checkpoint in vLLM, for one of the two ways."""

    stops: tuple[str, ...]
    """One sentence each; none if it runs."""
    tensor_parallel: tuple[int, ...]
    """Sizes that fit, of 1, 2, 4, 8 and 16; none where it does not run."""


@dataclass(frozen=True)
class VllmReport:
    """A checkpoint in the eyes of vLLM."""

    folder: str
    stock: Serving
    plugin: Serving
    """With mxrot installed in vLLM's environment."""
    notes: tuple[str, ...]
    """What runs, but otherwise than accuracy was measured."""

    def as_table(self) -> dict[str, Any]:
        """As `export --json` writes it."""
        devices = [asdict(device) for device in DEVICES] if not self.stock.stops else []
        return {"vllm": VERSION, **asdict(self), "devices": devices}


@dataclass(frozen=True)
class Facts:
    """What decides, of one checkpoint, written or planned."""

    config: Any
    family: Family
    scheme: Scheme
    shapes: dict[str, tuple[int, ...]]
    """Of every tensor, by its name."""

    @staticmethod
    def planned(skeleton: PreTrainedModel, family: Family, recipe: Recipe) -> Facts:
        """Of what `recipe` would make of a model, whose linears are replaced in `skeleton`."""
        scheme = Scheme.of(recipe, family, skeleton)
        install_linears(skeleton, family, scheme)
        shapes = {name: tuple(value.shape) for name, value in skeleton.state_dict().items()}
        return Facts(skeleton.config, family, scheme, shapes)

    @property
    def architecture(self) -> str:
        return str((self.config.architectures or ["none"])[0])

    @property
    def has_transform(self) -> bool:
        return self.scheme.has_transform

    def named(self, ending: str) -> list[str]:
        return [name.removesuffix(ending) for name in self.shapes if name.endswith(ending)]

    @property
    def row_parallel(self) -> set[tuple[int, int]]:
        """in_features of the quantized linears that vLLM splits along their inputs, and what they are multiples of."""
        endings = tuple(f".{site.linears[0]}" for site in self.family.sites if site.name in ("o", "down"))
        names = (name for name in self.named(".weight_packed") if name.endswith(endings))
        return {(2 * self.shapes[f"{name}.weight_packed"][1], self.scheme.input_block(name)) for name in names}


def check_for_vllm(folder: Path, verify: bool | None = None) -> VllmReport:
    """What vLLM does with the checkpoint in `folder`, from its config and the headers of its files.

    CheckpointError if it is none or does not fit itself; `verify` as for `mxrot.load`.
    """
    checked = check_checkpoint(folder, verify)
    shapes = {name: tensor.shape for name, tensor in checked.tensors.items()}
    return judge(str(folder), Facts(checked.config, checked.family, checked.scheme, shapes))


def judge(name: str, facts: Facts) -> VllmReport:
    """The one verdict on a checkpoint called `name`, whether it is there or planned."""
    both = tuple(_stops_of_both(facts))
    stock = (*both, *_stops_of_stock(facts))
    sizes = tuple(size for size in _SIZES if _divides(facts, size))
    alone = (1,) if facts.has_transform else sizes
    return VllmReport(
        name,
        Serving(stock, () if stock else alone),
        Serving(both, () if both else sizes),
        tuple(_notes(facts)),
    )


def _stops_of_both(facts: Facts) -> Iterator[str]:
    if any(".experts." in name for name in facts.shapes):
        yield "it has experts, which were not tried in vLLM, and whose inputs neither vLLM nor the plugin transforms"
    if facts.has_transform and facts.architecture not in ARCHITECTURES + FUSED:
        tried = ", ".join(ARCHITECTURES + FUSED)
        yield f"{facts.architecture}: its transforms were not tried in vLLM; tried were {tried}"
    ignored = set(facts.scheme.left)
    for index in range(facts.config.num_hidden_layers):
        for site in facts.family.sites:
            names = [f"{facts.family.block_prefix(index)}.{linear}" for linear in site.linears]
            left = [name for name in names if name in ignored]
            if left and len(left) < len(names):
                yield f"{left[0]} is not quantized while others of its site are, and vLLM holds these as one linear"
                return


def _stops_of_stock(facts: Facts) -> Iterator[str]:
    if facts.has_transform and facts.architecture in FUSED:
        yield (
            f"{facts.architecture}: vLLM wants a transform each for q, k and v, which are one linear in this model; "
            "install mxrot where vLLM runs, or quantize with a recipe without a transform"
        )
    blockwise = [name for name in facts.named("_input.weight") if len(facts.shapes[f"{name}_input.weight"]) == 3]
    if blockwise:
        yield (
            "it has one matrix a block, and vLLM takes one a site: quantize with --recipe mxrot-vllm or "
            "--set transform.sharing=site, or install mxrot where vLLM runs"
        )
    biased = [name for name in facts.named(".weight_packed") if f"{name}.bias" in facts.shapes]
    if biased and facts.has_transform:
        yield (
            f"{biased[0]} has a bias, which vLLM does not take beside a transform: install mxrot where vLLM runs, "
            "or quantize with a recipe without a transform"
        )


def _notes(facts: Facts) -> Iterator[str]:
    inputs = [one.activations for one in facts.scheme.distinct]
    rules = sorted({one.rule.name for one in inputs if one is not None})
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
    if facts.has_transform and _stored_type(facts.config) != "bfloat16":
        yield (
            f"the model is in {_stored_type(facts.config)}, and in that vLLM rounds transforms otherwise than the "
            "weights were folded for; a written export says bfloat16 in config.json"
        )
    if facts.has_transform:
        yield "transformed activations are rounded to bfloat16 by vLLM before they are quantized, and not by mxrot"


def _stored_type(config: Any) -> str:
    return str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")


def _divides(facts: Facts, size: int) -> bool:
    """Can so many devices share the linears? Whole blocks of inputs, and whole heads."""
    blocks = all(width % (size * block) == 0 for width, block in facts.row_parallel)
    heads = facts.config.num_attention_heads
    key_heads = getattr(facts.config, "num_key_value_heads", None) or heads
    shares = key_heads % size == 0 or size % key_heads == 0
    return blocks and heads % size == 0 and shares and facts.config.intermediate_size % size == 0
