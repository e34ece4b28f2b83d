"""Phi 1, 1.5 and 2: attention and an MLP without gate side by side, both behind one norm with a bias.

The rotary embedding turns a part of each head."""

from mxrot.models.families.cohere import MEAN_OBSTACLE
from mxrot.models.family import Family, Site

FAMILY = Family(
    "phi",
    ("PhiForCausalLM",),
    (
        Site(
            "qkv_up",
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"),
            norm="input_layernorm",
        ),
        Site("o", ("self_attn.dense",), producer="self_attn.v_proj", producer_is_value=True),
        Site("down", ("mlp.fc2",)),
    ),
    final_norm="model.final_layernorm",
    rotation_obstacle=MEAN_OBSTACLE,
    values_read_by="self_attn.dense",
    inner_rows="mlp.fc1",
)
