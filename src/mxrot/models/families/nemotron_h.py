"""Nemotron-H and Nemotron 3: each block has one norm, and behind it Mamba 2, attention without positions, an MLP or
experts.

MLPs and experts have no gate: the square of what `up` gives, where it is positive, leaves no place for a scale. In the
larger models experts compute in fewer channels than the block has, between two linears that all tokens pass; the expert
that every token goes to does not. The router adds a bias to the scores that it chooses by, in float32.
"""

from typing import Any

from mxrot.models.expert_names import DENSE, SPARSE, ExpertNames
from mxrot.models.families.bamba import ATTENDING, RECURRENT, mamba_kept, mamba_sites
from mxrot.models.family import LAYER_TYPES, Family, Kept, Site

KINDS = {"linear_attention": RECURRENT, "full_attention": ATTENDING, "mlp": DENSE, "moe": SPARSE}
"""By what the config calls them."""


def _kinds(config: Any) -> tuple[str, ...]:
    return tuple(KINDS[kind] for kind in config.layer_types)


def _states(config: Any) -> tuple[int, int]:
    """As `mamba_states`, by what this config calls it."""
    heads, width = config.mamba_num_heads, config.mamba_head_dim
    blocks = config.layer_types.count("linear_attention")
    channels = heads * width + 2 * config.n_groups * config.ssm_state_size
    return blocks * channels * config.conv_kernel, blocks * heads * width * config.ssm_state_size


FAMILY = Family(
    "nemotron_h",
    ("NemotronHForCausalLM",),
    (
        *mamba_sites("mixer", "norm"),
        Site("qkv", ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"), norm="norm", only_in=ATTENDING),
        Site(
            "o",
            ("mixer.o_proj",),
            producer="mixer.v_proj",
            producer_is_value=True,
            residual="norm",
            only_in=ATTENDING,
        ),
        Site("up", ("mixer.up_proj",), norm="norm", only_in=DENSE),
        Site("down", ("mixer.down_proj",), rows_before="mixer.up_proj", residual="norm", only_in=DENSE),
    ),
    embedding="model.embeddings",
    final_norm="model.norm_f",
    attention="mixer",
    attention_in=ATTENDING,
    rotary=None,
    layer_types=(*LAYER_TYPES, "linear_attention", "moe", "mlp"),
    kinds_of=_kinds,
    kept=(
        mamba_kept("mixer"),
        Kept((), "it chooses the experts of a token, in float32", ("mixer.gate",), only_in=SPARSE),
    ),
    states_of=_states,
    norm_class="NemotronHRMSNorm",
    rotation_obstacle=None,
    values="mixer.v_proj",
    values_read_by="mixer.o_proj",
    experts=ExpertNames(
        "NemotronHExperts",
        "n_routed_experts",
        ("up_proj", "down_proj"),
        place="mixer.experts",
        routers=("mixer.gate",),
        shared="mixer.shared_experts",
        may_lack=True,
        norm="norm",
        narrow=("mixer.fc1_latent_proj", "mixer.fc2_latent_proj"),
        narrow_width="moe_latent_size",
        gated="none",
    ),
    holds_for=(("tie_word_embeddings", False),),
    stored_stem="backbone.",
    in_float32=("mixer.gate.e_score_correction_bias",),
)
