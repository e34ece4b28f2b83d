"""The model card: README.md of a checkpoint. It begins with how to load the model, and what happens otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCardData

from mxrot.checkpoint.card_figures import ACCURACY
from mxrot.checkpoint.card_source import Source
from mxrot.checkpoint.config import why_unfaithful
from mxrot.checkpoint.markdown import code, code_block, plain_text
from mxrot.layers import ModelSize
from mxrot.quantizing.record import alike
from mxrot.recipe import Recipe
from mxrot.scheme import Scheme, shares_of
from mxrot.text.document import OWN_READ_AS

_TEMPLATE = """---
{header}
---

# {name}, quantized to {formats} with mxrot ({recipe})

**Install mxrot, and `import mxrot` before you load it.** {warning}

```python
import mxrot
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

## What it is

{summary}{source}, from {base}. {activations}{rotations}

| | bytes | bits a weight |
|---|---|---|
| codes and scales | {weight_bytes:,} | {bits:.3f} |
| transforms | {transform_bytes:,} | {transform_bits:.3f} |
| everything else, in its own type{but_head} | {other_bytes:,} | |

Bits are means over the linears of the decoder blocks. {left}
{mixture}
`run.json` holds seeds, versions, data, per-layer errors and a SHA-256 of each file, `recipe.toml` the recipe:

{toml}

## Accuracy

{before_accuracy}
Not measured yet: `mxrot report path/to/this/folder --against ORIGINAL --card` puts figures here.
{after_accuracy}

## How to load it

With mxrot, which checks that every file is there and whole:

```python
import mxrot

model = mxrot.load("path/to/this/folder")
```

```
mxrot eval path/to/this/folder
mxrot generate path/to/this/folder "Once upon a time"
```

With transformers: as above, `import mxrot` first. In the same dtype the logits are those of `mxrot.load`.

With vLLM: {vllm}

## Limits

{limits}
"""

_NATIVE = (
    "Without mxrot nothing loads it: `config.json` calls the format `mxrot`, which no other reader knows, because "
    "{why}."
)
_PLAIN = (
    "Without mxrot, transformers loads the same weights where compressed-tensors is installed, but runs in bfloat16 "
    "only (seen with compressed-tensors 0.20) and rounds its sums differently; accuracy was not measured that way. No "
    "transform is applied at run time."
)
_VLLM_PLAIN = (
    "the tensors are plain compressed-tensors `{layout}`, which vLLM reads. `mxrot export path/to/this/folder --to "
    "vllm` says what vLLM does with this one."
)
_VLLM_SITE = (
    "with mxrot installed beside it. Without, one 32x32 matrix a site is the layout that compressed-tensors and vLLM "
    "(tensor parallel 1) define for input transforms: `mxrot export path/to/this/folder --to vllm` says what vLLM does "
    "with this one, and writes it in their words with `-o`."
)
_VLLM_BIAS = " vLLM without mxrot takes no bias on linears with a transform, and this model has some."
_VLLM_OWN = (
    "only with mxrot installed beside it, if at all: {why}. `mxrot export path/to/this/folder --to vllm` says more."
)
_VLLM_CACHE = (
    "not with this cache, whose formats vLLM does not have. `mxrot export path/to/this/folder --to vllm` says more."
)


@dataclass(frozen=True)
class Made:
    """The result as a card describes it."""

    recipe: Recipe
    scheme: Scheme
    size: ModelSize
    shapes: Mapping[str, tuple[int, int]]
    """The shapes of the quantized weights, by the full names of their linears."""
    has_bias: bool = False
    """True if a quantized linear has a bias."""
    left: Sequence[str] = ()
    """Full names of the linears that are not quantized."""
    data: dict[str, Any] | None = None
    """The calibration record in run.json."""
    auto_class: str = "AutoModelForCausalLM"
    """The transformers class that loads the model."""


def model_card(source: Source, made: Made) -> str:
    """The card in Markdown."""
    recipe, size = made.recipe, made.size
    return _TEMPLATE.format(
        header=_header(source, made.scheme),
        auto_class=made.auto_class,
        name=plain_text(source.name),
        base=(code(source.hub_id) if source.hub_id else f"the folder {code(source.name)}")
        + (f" at commit {code(source.commit)}" if source.commit else ""),
        formats=_formats(made.scheme),
        recipe=plain_text(recipe.name),
        warning=_warning(made.scheme),
        summary=plain_text(recipe.summary or f"Recipe {recipe.name}"),
        source=f" ({plain_text(recipe.source)})" if recipe.source else "",
        activations=_activations(made.scheme),
        rotations=_rotations(recipe),
        weight_bytes=size.code_bytes + size.scale_bytes,
        bits=size.bits_per_weight or 0,
        transform_bytes=size.transform_bytes,
        transform_bits=size.transform_bits_per_weight or 0,
        other_bytes=size.other_bytes,
        but_head=f" but for the head, {size.head_bytes:,} of them" if size.head_bytes else "",
        left=_left(made.left, size),
        mixture=_mixture(made),
        toml=code_block(recipe.to_toml(), "toml"),
        before_accuracy=ACCURACY[0],
        after_accuracy=ACCURACY[1],
        vllm=_vllm(made),
        limits="\n".join(f"- {limit}" for limit in _limits(source, recipe, made.data)),
    )


def _formats(scheme: Scheme) -> str:
    weights = dict.fromkeys(one.weights.format.name for one in scheme.distinct)
    inputs = dict.fromkeys(
        "16-bit" if one.activations is None else one.activations.format.name for one in scheme.distinct
    )
    operands = "" if scheme.attention is None else " with quantized attention"
    if scheme.cache is not None:
        kept = dict.fromkeys(one.format.name for one in scheme.cache.by_name.values())
        operands = f", keys and values in {' and '.join(kept)}"
    head = "" if scheme.head is None else f", the head in {scheme.head.weights.format.name}"
    return f"{' and '.join(weights)} weights and {' and '.join(inputs)} activations{operands}{head}"


def _activations(scheme: Scheme) -> str:
    attention = ""
    if scheme.attention is not None:
        attention = f"\nBoth operands of attention's products are quantized at run time: {scheme.attention.spelled}."
    if scheme.cache is not None:
        attention = (
            f"\nAttention reads quantized keys and values, from the cache and without one: {scheme.cache.spelled}."
        )
    if scheme.head is not None:
        attention += f"\nThe head is quantized, too, and no copy of the embedding: {scheme.head.spelled}."
    rules = dict.fromkeys(code(one.activations.spelled_rule) for one in scheme.distinct if one.activations is not None)
    if not rules:
        return f"Activations are left as they are.{attention}"
    return (
        f"Activations are quantized at run time with scale rule {' and '.join(rules)}; accuracy\n"
        f"figures hold under {'that rule' if len(rules) == 1 else 'these rules'}.{attention}"
    )


def _rotations(recipe: Recipe) -> str:
    order = (
        "" if recipe.permutation is None else f"\nIn another order than in the original: {recipe.permutation.spelled}."
    )
    if recipe.rotation is None:
        return order
    head = "" if recipe.rotation.residual == "none" else "; norm gains are 1, and the head is no copy of the embedding"
    return f"\nRotations are merged into all weights: {recipe.rotation.spelled}{head}.{order}"


def _warning(scheme: Scheme) -> str:
    why = "others would leave out the transforms of its inputs" if scheme.has_transform else why_unfaithful(scheme)
    return _PLAIN if why is None else _NATIVE.format(why=why.replace("it has", "compressed-tensors has"))


def _mixture(made: Made) -> str:
    """The linears of each scheme, if there are several schemes."""
    shares = shares_of(made.scheme, made.shapes)
    if len(shares) < 2:
        return ""
    whole = made.size.quantized_weights + made.size.left_weights
    rows = [("weights", "inputs", "transform", "linears", "share of weights", "bits a weight"), ("---",) * 6]
    for one in shares:
        scheme = one.scheme
        inputs = "16 bit" if scheme.activations is None else scheme.activations.spelled
        stages = ", ".join(stage.kind for stage in scheme.stages) or "none"
        named = ", ".join(f"{code(name)} ({count})" for name, count in alike(one.linears).items())
        share = f"{100 * one.weights / whole:.1f} %"
        rows.append((scheme.weights.spelled, inputs, stages, named, share, f"{one.bits_per_weight:.3f}"))
    if made.size.left_weights:
        bits = 8 * made.size.left_bytes / made.size.left_weights
        share = f"{100 * made.size.left_weights / whole:.1f} %"
        rows.append(("left as they were", "as they are", "none", "see above", share, f"{bits:.3f}"))
    return "\n" + "".join("| " + " | ".join(row) + " |\n" for row in rows)


def _header(source: Source, scheme: Scheme) -> str:
    """The fields that the hub reads, as YAML. A base model is named only if it has a hub id."""
    fields: dict[str, Any] = {"license": "unknown"} | source.licence
    if source.hub_id:
        fields |= {"base_model": source.hub_id, "base_model_relation": "quantized"}
    tags = [*dict.fromkeys(one.weights.format.name for one in scheme.distinct), "compressed-tensors", "mxrot"]
    return ModelCardData(library_name="mxrot", pipeline_tag="text-generation", tags=tags, **fields).to_yaml()


def _vllm(made: Made) -> str:
    why = why_unfaithful(made.scheme)
    if made.scheme.cache is not None:
        return _VLLM_CACHE
    if made.scheme.head is not None:
        return _VLLM_OWN.format(why="stock vLLM does not read this quantized head")
    if why is not None:
        return _VLLM_OWN.format(why=why.replace("it has", "compressed-tensors has"))
    if not made.scheme.has_transform:
        return _VLLM_PLAIN.format(layout=made.scheme.distinct[0].weights.format.compressed_tensors)
    return _VLLM_SITE + (_VLLM_BIAS if made.has_bias else "")


def _left(linears: Sequence[str], size: ModelSize) -> str:
    """The linears that are not quantized, and their share of the blocks."""
    if not linears:
        return "All linears are quantized."
    named = ", ".join(code(name) + (f" ({count})" if count > 1 else "") for name, count in alike(linears).items())
    share = size.left_weights / max(1, size.left_weights + size.quantized_weights)
    rest = f"; {100 * share:.1f} % of the weights of the blocks" if size.left_weights else ""
    return f"Linears left as they were: {named}{rest}."


def _limits(source: Source, recipe: Recipe, data: dict[str, Any] | None) -> list[str]:
    limits = ["What the original model must not be used for, or does badly, holds for this one too."]
    if recipe.is_data_free:
        limits.append("It was made without any text; what the recipe says of calibration was not used.")
    else:
        limits.append(f"It was calibrated on {_texts(data or {})}; on others it may lose more.")
    if "license" not in source.licence:
        limits.append("The original came without a licence that could be read: see to `license` before you pass it on.")
    if not source.hub_id:
        limits.append("It was made from a folder: set `base_model` to the original's hub id before you publish it.")
    return limits


def _texts(data: dict[str, Any]) -> str:
    """The calibration texts, from their record."""
    named = [
        f"{text['windows']:,} windows of {text['seq_len']:,} tokens of {code(text['name'])} (SHA-256 `{text['sha256']}`"
        + (")" if text["read_as"] == "text" else f", read as {text['read_as']})")
        for text in data.get("texts", ())
        if text["read_as"] != OWN_READ_AS
    ]
    if data.get("generated"):
        named.append(f"{data['generated']:,} that the original wrote")
    return " and ".join(named) or "some text (`run.json` says which)"
