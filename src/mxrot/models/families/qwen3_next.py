"""Qwen 3 Next: three of four blocks have a gated delta net in the place of attention, and almost all have experts.

A sigmoid of the second half of q_proj's rows weighs what attention gives, channel by channel: scales pass from v to o,
and the channels of a head stay where they are. Of a delta net, the large linears in front and behind are sites.
"""

from dataclasses import replace
from typing import Any

from mxrot.models.expert_names import ExpertNames
from mxrot.models.families.llama import ATTENTION_SITES, MLP_SITES_BESIDE_EXPERTS
from mxrot.models.families.qwen2_moe import kinds_by_step
from mxrot.models.family import LAYER_TYPES, Family, Kept, Site

ATTENTION, RECURRENT = "attention", "recurrent"
"""Kinds of blocks."""
SMALL = "they say how fast the state of each head fades and fills, a few numbers a token, and errors in them add up"
NOT_LINEAR = "they are no linears"


def with_one_added(sites: tuple[Site, ...]) -> tuple[Site, ...]:
    """These sites behind norms that multiply by 1 + their weight."""
    return tuple(replace(site, norm_adds_one=site.norm is not None) for site in sites)


def delta_sites(inside: tuple[str, ...], small: tuple[str, ...]) -> tuple[Site, ...]:
    """Of attention and of a delta net, whose linears in front are `inside`, and `small` those that are kept."""
    return (
        *(replace(site, only_in=ATTENTION) for site in with_one_added(ATTENTION_SITES)),
        Site("delta_in", inside, norm="input_layernorm", norm_adds_one=True, routers=small, only_in=RECURRENT),
        Site("delta_out", ("linear_attn.out_proj",), residual="input_layernorm", only_in=RECURRENT),
    )


def delta_kept(small: tuple[str, ...]) -> tuple[Kept, ...]:
    """Of a delta net."""
    others = ("linear_attn.conv1d", "linear_attn.A_log", "linear_attn.dt_bias", "linear_attn.norm")
    return Kept(small, SMALL, only_in=RECURRENT), Kept((), NOT_LINEAR, others, only_in=RECURRENT)


def delta_states(config: Any) -> tuple[int, int]:
    """The last inputs of the convolutions, and a matrix for each head of values, in float32."""
    blocks = list(config.layer_types).count("linear_attention")
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    return blocks * (2 * keys + values) * config.linear_conv_kernel_dim, blocks * values * config.linear_key_head_dim


def mixers(config: Any) -> tuple[str, ...]:
    """Which blocks attend, and which have a delta net."""
    return tuple(RECURRENT if kind == "linear_attention" else ATTENTION for kind in config.layer_types)


def _kinds(config: Any) -> tuple[str, ...]:
    return tuple(f"{mixer} {mlp}" for mixer, mlp in zip(mixers(config), kinds_by_step(config), strict=True))


SMALL_LINEARS = ("linear_attn.in_proj_ba",)

FAMILY = Family(
    "qwen3_next",
    ("Qwen3NextForCausalLM",),
    (*delta_sites(("linear_attn.in_proj_qkvz",), SMALL_LINEARS), *with_one_added(MLP_SITES_BESIDE_EXPERTS)),
    attention_in=ATTENTION,
    values="",
    values_read_by="",
    rotation_obstacle=None,
    experts=ExpertNames(
        "Qwen3NextExperts",
        "num_experts",
        ("gate_proj", "up_proj", "down_proj"),
        routers=("mlp.gate", "mlp.shared_expert_gate"),
        norm_adds_one=True,
        shared="mlp.shared_expert",
    ),
    kinds_of=_kinds,
    kept=delta_kept(SMALL_LINEARS),
    layer_types=(*LAYER_TYPES, "linear_attention"),
    states_of=delta_states,
)
