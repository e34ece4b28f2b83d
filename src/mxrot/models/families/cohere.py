"""Cohere's Command R and Aya: attention and MLP stand side by side, and read what one norm gives.

So q, k, v, gate and up are one site, and what attention and MLP give joins the residual stream at once. The norm takes
the mean away, and has no bias. A factor of the logits."""

from mxrot.models.family import Family, Site

SIDE_BY_SIDE = (
    Site(
        "qkv_gate_up",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"),
        norm="input_layernorm",
    ),
    Site("o", ("self_attn.o_proj",), producer="self_attn.v_proj", producer_is_value=True),
    Site("down", ("mlp.down_proj",), producer="mlp.up_proj"),
)

MEAN_OBSTACLE = "its norms take the mean over channels away, which a rotation does not leave in place"

FAMILY = Family("cohere", ("CohereForCausalLM",), SIDE_BY_SIDE, rotation_obstacle=MEAN_OBSTACLE)
