"""StableLM 2: Llama's blocks behind norms that take the mean away and have a bias.

The rotary embedding turns a part of each head. Models whose attention and MLP stand side by side have other sites, and
are refused."""

from mxrot.models.families.cohere import MEAN_OBSTACLE
from mxrot.models.families.llama import LLAMA_SITES
from mxrot.models.family import Family

FAMILY = Family(
    "stablelm",
    ("StableLmForCausalLM",),
    LLAMA_SITES,
    rotation_obstacle=MEAN_OBSTACLE,
    holds_for=(("use_parallel_residual", False),),
)
