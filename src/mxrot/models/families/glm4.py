"""GLM 4 of 2025 without experts: GLM's blocks, where what attention and MLP give passes a norm, too."""

from dataclasses import replace

from mxrot.models.families.glm import GLM_SITES
from mxrot.models.families.olmo2 import BEHIND_OBSTACLE
from mxrot.models.family import Family

FAMILY = Family(
    "glm4",
    ("Glm4ForCausalLM",),
    tuple(replace(site, residual=None) for site in GLM_SITES),
    norm_class="Glm4RMSNorm",
    rotation_obstacle=BEHIND_OBSTACLE,
    inner_rows="mlp.gate_up_proj",
)
