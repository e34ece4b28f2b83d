"""VaultGemma: Gemma 2 without the norms behind attention and MLP."""

from dataclasses import replace

from mxrot.models.families.llama import LLAMA_SITES
from mxrot.models.family import Family

_BEFORE = {"qkv": "input_layernorm", "gate_up": "pre_feedforward_layernorm"}
_ADDED_TO = {"o": "input_layernorm", "down": "pre_feedforward_layernorm"}

FAMILY = Family(
    "vaultgemma",
    ("VaultGemmaForCausalLM",),
    tuple(
        replace(
            site,
            norm=_BEFORE.get(site.name),
            norm_adds_one=site.name in _BEFORE,
            residual=_ADDED_TO.get(site.name),
        )
        for site in LLAMA_SITES
    ),
    starts_with_bos=True,
    windows="by kind",
    rotation_obstacle=None,
)
