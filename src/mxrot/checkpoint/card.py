"""The model card: README.md of a checkpoint. Its first lines say how to load it."""

from __future__ import annotations

from mxrot.layers import ModelSize
from mxrot.recipe import Recipe

_TEMPLATE = """---
library_name: mxrot
base_model: {base}
tags:
- mxfp4
- compressed-tensors
- mxrot
---

# {base}, quantized to {formats} with mxrot ({recipe})

**`import mxrot` before you load it.** {warning}

```python
import mxrot
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
# The same, with the size of every file checked: model = mxrot.load("path/to/this/folder")
```

```
mxrot eval path/to/this/folder
mxrot generate path/to/this/folder "Once upon a time"
```

## What it is

{summary}{source}. Activations are quantized at run time with scale rule `{activation_rule}`; accuracy figures hold
under that rule.

| | bytes | bits a quantized weight |
|---|---|---|
| codes and scales | {weight_bytes:,} | {bits:.3f} |
| transforms | {transform_bytes:,} | {transform_bits:.3f} |
| everything else, in its own type | {other_bytes:,} | |

`recipe.toml` holds the recipe, `run.json` seeds, versions, data, per-layer errors and a SHA-256 of each file.

## Limits

{limits}
"""

_WITH_TRANSFORM = (
    "Loaders that do not apply the input transforms (transformers without mxrot among them) read the packed weights "
    "without an error and compute garbage."
)
_WITHOUT_TRANSFORM = (
    "The tensors are plain compressed-tensors `mxfp4-pack-quantized`; no transform is applied at run time."
)
_SHARED = (
    "One 32x32 matrix a site, the layout that compressed-tensors and vLLM (tensor parallel 1) define for input "
    "transforms. `mxrot export path/to/this/folder --to vllm` says what vLLM does with this one."
)
_BLOCKWISE = (
    "Each block of 32 channels has its own matrix; only mxrot reads that, and vLLM with mxrot installed beside it."
)


def model_card(base: str, recipe: Recipe, size: ModelSize) -> str:
    """The card's Markdown."""
    activations = None if recipe.activations is None else recipe.activations.quantizer()
    formats = f"{recipe.weights.format} weights"
    formats += " and 16-bit activations" if activations is None else f" and {activations.format.name} activations"
    limits = _WITHOUT_TRANSFORM
    if recipe.has_transform:
        limits = _SHARED if recipe.sharing == "site" else _BLOCKWISE
    return _TEMPLATE.format(
        base=base,
        formats=formats,
        recipe=recipe.name,
        warning=_WITH_TRANSFORM if recipe.has_transform else _WITHOUT_TRANSFORM,
        summary=recipe.summary or f"Recipe {recipe.name}",
        source=f" ({recipe.source})" if recipe.source else "",
        activation_rule="none" if activations is None else activations.rule.name,
        weight_bytes=size.code_bytes + size.scale_bytes,
        bits=size.bits_per_weight or 0,
        transform_bytes=size.transform_bytes,
        transform_bits=size.transform_bits_per_weight or 0,
        other_bytes=size.other_bytes,
        limits=limits,
    )
