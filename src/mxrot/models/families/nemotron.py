"""Nemotron 4 and Minitron: no gate in the MLP; norms take the mean away, multiply by 1 + weight and have a bias.

The rotary embedding turns a part of each head."""

from dataclasses import replace

from mxrot.models.families.arcee import WITHOUT_GATE
from mxrot.models.families.cohere import MEAN_OBSTACLE
from mxrot.models.family import Family

FAMILY = Family(
    "nemotron",
    ("NemotronForCausalLM",),
    tuple(replace(site, norm_adds_one=site.norm is not None) for site in WITHOUT_GATE),
    rotation_obstacle=MEAN_OBSTACLE,
    inner_rows="mlp.up_proj",
)
