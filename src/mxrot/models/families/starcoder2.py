"""StarCoder 2: no gate in the MLP, biases everywhere; norms take the mean away. Blocks may attend to a window."""

from mxrot.models.families.cohere import MEAN_OBSTACLE
from mxrot.models.families.llama import ATTENTION_SITES
from mxrot.models.family import Family, Site

FAMILY = Family(
    "starcoder2",
    ("Starcoder2ForCausalLM",),
    (
        *ATTENTION_SITES,
        Site("up", ("mlp.c_fc",), norm="post_attention_layernorm"),
        Site("down", ("mlp.c_proj",), residual="post_attention_layernorm"),
    ),
    windows="all",
    rotation_obstacle=MEAN_OBSTACLE,
    inner_rows="mlp.c_fc",
)
