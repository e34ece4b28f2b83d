"""Bamba: Mamba 2 in most blocks and attention in the others, an MLP in each; the rotary embedding turns half of a head.

Of a Mamba block both linears are quantized: what a block reads, and what it gives behind a norm in groups of channels,
whose gain takes scales. The convolution between them and the numbers of the recurrence stay as they are.
"""

from dataclasses import replace
from typing import Any

from mxrot.models.families.llama import ATTENTION_SITES, LLAMA_SITES
from mxrot.models.family import LAYER_TYPES, Family, Kept, Site

RECURRENT, ATTENDING = "recurrent", "attention"
"""Kinds of decoder blocks."""


def mamba_sites(place: str, norm: str) -> tuple[Site, Site]:
    """Those of the Mamba mixer `place`, which reads `norm`."""
    return (
        Site("mamba_in", (f"{place}.in_proj",), norm=norm, only_in=RECURRENT),
        Site(
            "mamba_out",
            (f"{place}.out_proj",),
            norm=f"{place}.norm",
            norm_is_inner=True,
            is_added=True,
            residual=norm,
            only_in=RECURRENT,
        ),
    )


def mamba_kept(place: str) -> Kept:
    """What stays as it is of the Mamba mixer `place`."""
    names = ("conv1d", "A_log", "D", "dt_bias")
    reason = "a convolution over a few tokens and the numbers of a recurrence, which no linear has"
    return Kept((), reason, tuple(f"{place}.{name}" for name in names), only_in=RECURRENT)


def kinds_by_layer_types(config: Any) -> tuple[str, ...]:
    """A block with attention, or one that keeps a state."""
    return tuple(ATTENDING if kind == "full_attention" else RECURRENT for kind in config.layer_types)


def mamba_states(config: Any) -> tuple[int, int]:
    """Numbers that the cache of a sequence holds in Mamba blocks, as `Family.states_of` gives them: the last inputs of
    each convolution, and the states of each head."""
    heads, width = config.mamba_n_heads, config.mamba_d_head
    blocks = config.layer_types.count("linear_attention")
    channels = heads * width + 2 * config.mamba_n_groups * config.mamba_d_state
    return blocks * channels * config.mamba_d_conv, blocks * heads * width * config.mamba_d_state


def attending(sites: tuple[Site, ...], norm: str = "input_layernorm") -> tuple[Site, ...]:
    """Sites of attention, in the blocks that have it, which reads `norm`."""
    return tuple(
        replace(site, only_in=ATTENDING, norm=site.norm and norm, residual=site.residual and norm) for site in sites
    )


def _in_feed_forward(site: Site) -> Site:
    """A site of Llama's MLP, as it is called here."""
    linears = tuple(linear.replace("mlp.", "feed_forward.") for linear in site.linears)
    producer = site.producer and site.producer.replace("mlp.", "feed_forward.")
    norm = "pre_ff_layernorm"
    return replace(site, linears=linears, producer=producer, norm=site.norm and norm, residual=site.residual and norm)


FAMILY = Family(
    "bamba",
    ("BambaForCausalLM",),
    (
        *mamba_sites("mamba", "input_layernorm"),
        *attending(ATTENTION_SITES),
        *(_in_feed_forward(site) for site in LLAMA_SITES if site not in ATTENTION_SITES),
    ),
    final_norm="model.final_layernorm",
    attention_in=ATTENDING,
    layer_types=(*LAYER_TYPES, "linear_attention"),
    kinds_of=kinds_by_layer_types,
    kept=(mamba_kept("mamba"),),
    states_of=mamba_states,
    gives_more=True,
    norm_class="BambaRMSNorm",
    rotation_obstacle=None,
)
