"""GLM 4 of 2024: Llama's attention, with biases in q, k and v; gate and up are one linear. The rotary embedding turns
half of each head, as pairs of neighbours."""

from mxrot.models.families.llama import ATTENTION_SITES
from mxrot.models.family import Family, Site

GLM_SITES = (
    *ATTENTION_SITES,
    Site("gate_up", ("mlp.gate_up_proj",), norm="post_attention_layernorm"),
    Site("down", ("mlp.down_proj",), residual="post_attention_layernorm"),
)

FAMILY = Family(
    "glm",
    ("GlmForCausalLM",),
    GLM_SITES,
    norm_class="GlmRMSNorm",
    rotation_obstacle=None,
    inner_rows="mlp.gate_up_proj",
)
