"""HyperCLOVA X: Granite's factors, but that of the logits multiplies. What attention and MLP give may pass a norm."""

from dataclasses import replace

from mxrot.models.families.llama import LLAMA_SITES
from mxrot.models.families.olmo2 import BEHIND_OBSTACLE
from mxrot.models.family import Family, LogitKeys

FAMILY = Family(
    "hyperclovax",
    ("HyperCLOVAXForCausalLM",),
    tuple(replace(site, residual=None) for site in LLAMA_SITES),
    logits=LogitKeys(factor="logits_scaling", divisor=None),
    norm_class="HyperCLOVAXRMSNorm",
    rotation_obstacle=BEHIND_OBSTACLE,
)
