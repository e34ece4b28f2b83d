from dataclasses import replace

import pytest
from tests.tiny_model import tiny_config
from torch import nn

from mxrot.errors import ConfigError, FamilyError
from mxrot.layers import build_apart
from mxrot.models import Kept, check_linears, value_heads
from mxrot.models.families.llama import FAMILY as LLAMA
from mxrot.models.family import is_ignored
from mxrot.models.positions import block_windows


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("down_proj", True),
        ("*_proj", True),
        ("model.layers.11.mlp.down_proj", True),
        ("model.layers.1?.*", True),
        ("*.mlp.*", True),
        ("model.layers.1.*", False),
        ("layers.11.mlp.down_proj", False),
        ("mlp", False),
        ("DOWN_PROJ", False),
        ("down", False),
    ],
)
def test_ignore_patterns(pattern: str, matches: bool) -> None:
    assert is_ignored("model.layers.11.mlp.down_proj", (pattern,)) is matches
    assert is_ignored("model.layers.11.mlp.down_proj", ("nothing", pattern)) is matches


def test_active_sites_lose_ignored_linears_and_empty_sites() -> None:
    sites = LLAMA.active_sites(1, ("q_proj", "down_proj", "model.layers.0.*"))
    assert [(site.name, site.linears) for site in sites] == [
        ("qkv", ("self_attn.k_proj", "self_attn.v_proj")),
        ("o", ("self_attn.o_proj",)),
        ("gate_up", ("mlp.gate_proj", "mlp.up_proj")),
    ]
    assert [site.norm for site in sites] == ["input_layernorm", None, "post_attention_layernorm"]
    assert LLAMA.active_sites(0, ("model.layers.0.*",)) == ()
    assert LLAMA.active_sites(10, ("model.layers.1.*",)) == LLAMA.sites


def test_an_odd_size_is_named_and_can_be_ignored() -> None:
    model = build_apart(tiny_config(intermediate_size=100))
    with pytest.raises(ConfigError) as raised:
        check_linears(model, LLAMA, 32, ())
    assert str(raised.value) == (
        "model.layers.0.mlp.down_proj: in_features 100 is not a multiple of the block size 32; list it under `ignore`"
    )
    check_linears(model, LLAMA, 32, ("down_proj",))
    check_linears(model, LLAMA, 4, ())
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.mlp\.down_proj"):
        check_linears(model, LLAMA, 32, ("model.layers.0.*",))


def test_a_linear_that_the_family_does_not_know() -> None:
    model = build_apart(tiny_config())
    model.get_submodule("model.layers.1.mlp").add_module("extra_proj", nn.Linear(64, 64, device="meta"))
    with pytest.raises(
        FamilyError, match=r"model.layers.1.mlp.extra_proj: family llama knows no such linear .*`ignore`"
    ):
        check_linears(model, LLAMA, 32, ())
    check_linears(model, LLAMA, 32, ("extra_proj",))


def test_value_heads() -> None:
    assert value_heads(tiny_config()) == (2, 16)
    assert value_heads(tiny_config(num_key_value_heads=4, head_dim=8)) == (4, 8)
    assert value_heads(tiny_config(head_dim=None)) == (2, 16)


def test_a_kind_may_be_several_words() -> None:
    """A block has what is in all, and what is in a block of any of its words."""
    attention, dense = LLAMA.sites[:2], LLAMA.sites[2:]
    kept = Kept(("mlp.gate_proj",), "it is small", ("mlp",), only_in="sparse")
    family = replace(
        LLAMA,
        sites=(*(replace(site, only_in="attention") for site in attention), *dense),
        kinds=("recurrent dense", "attention dense", "attention sparse"),
        kept=(kept,),
        attention_in="attention",
    )
    assert [[site.name for site in family.sites_of(index)] for index in range(3)] == [
        ["gate_up", "down"],
        ["qkv", "o", "gate_up", "down"],
        ["qkv", "o", "gate_up", "down"],
    ]
    assert [family.kept_of(index) for index in range(3)] == [(), (), (kept,)]
    assert [family.attends(index) for index in range(3)] == [False, True, True]
    assert block_windows(tiny_config(num_hidden_layers=3), family) == (0, None, None)
    assert [module.layer_idx for module in family.attentions(build_apart(tiny_config(num_hidden_layers=3)))] == [1, 2]


def test_what_is_kept_needs_no_ignore_and_counts_as_a_linear() -> None:
    model = build_apart(tiny_config())
    for block in model.get_submodule("model.layers").children():
        block.add_module("small", nn.Linear(33, 4, device="meta"))
    family = replace(LLAMA, kept=(Kept(("small",), "it is small"),))
    check_linears(model, family, 32)
    assert family.is_linear("model.layers.1.small.weight") and not LLAMA.is_linear("model.layers.1.small.weight")
    with pytest.raises(FamilyError, match=r"small: family llama knows no such linear"):
        check_linears(model, LLAMA, 32)
