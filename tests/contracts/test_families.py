"""What every model family owes, on a tiny random model of each architecture that it names."""

import re
from collections import defaultdict
from copy import deepcopy
from functools import cache
from itertools import combinations

import pytest
import torch
import transformers
from tests.contracts.tiny_configs import SIZES, auto_class, config_of, inner_width
from tests.float64 import InFloat64
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxrot.errors import ConfigError, FamilyError
from mxrot.layers import build_apart, fused_norms, separate_experts
from mxrot.models import FAMILIES, Family, Site, check_linears, find_family, value_heads, value_rows
from mxrot.models.ahead import Ahead
from mxrot.models.family import is_ignored
from mxrot.surgery import fold_into_producer, shareable_scales
from mxrot.transforms import BlockDiagonal
from mxrot.transforms.base import random_orthogonal

TOKENS = torch.arange(40)[None]
"""So many that each expert gets some."""


def spread_gains(model: PreTrainedModel, family: Family) -> None:
    """Gains of norms, and biases, that count: from 1/2 to 3/2."""
    least = 0.5 - any(site.norm_adds_one for site in family.sites)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(least, least + 1)


OPTIONAL = (
    "attention_bias",
    "attention_out_bias",
    "mlp_bias",
    "use_bias",
    "use_qkv_bias",
    "use_qk_norm",
    "qk_layernorm",
    "use_post_norm",
)
"""What configs call parts that a model of their family may have."""
TINY_FAMILIES = {name: find_family(config_of(family), name) for name, family in FAMILIES.items()}
"""With the sites of the experts that the tiny config has."""
each = pytest.mark.parametrize("family", TINY_FAMILIES.values(), ids=TINY_FAMILIES)
BLOCKS = {name: (family, 1) for name, family in TINY_FAMILIES.items()}
BLOCKS |= {
    f"{name}, block {number}": (family, number)
    for name, family in TINY_FAMILIES.items()
    for number in range(len(family.kinds))
    if number != 1
}
each_block = pytest.mark.parametrize(("family", "number"), BLOCKS.values(), ids=BLOCKS)
"""The second block, and the others where these are of other kinds."""


def numbers_of(family: Family) -> range:
    """Of the decoder blocks of its tiny config."""
    return range(len(family.kinds) or 2)


@cache
def model_of(family: Family) -> PreTrainedModel:
    torch.manual_seed(0)
    model = auto_class(family).from_config(config_of(family))
    separate_experts(model)
    return model.eval().requires_grad_(False)


def block_of(family: Family, number: int = 1) -> nn.Module:
    return model_of(family).get_submodule(family.block_prefix(number))


@cache
def seen_by_modules(family: Family, number: int) -> dict[str, Tensor]:
    """What each linear and each module that stands for a site receives in one forward pass, in this block: the very
    tensor, in the order of the calls."""
    seen: dict[str, list[Tensor]] = defaultdict(list)
    names = dict.fromkeys(name for site in family.sites_of(number) for name in (site.reader, *site.linears))
    handles = [
        block_of(family, number)
        .get_submodule(module)
        .register_forward_pre_hook(lambda _, arguments, name=module: seen[name].append(arguments[0]))
        for module in names
    ]
    model_of(family)(TOKENS)
    for handle in handles:
        handle.remove()
    assert seen.keys() == names.keys() and all(len(tensors) == 1 for tensors in seen.values())
    return {name: tensors[0] for name, tensors in seen.items()}


@each
def test_it_is_found_by_its_architectures(family: Family) -> None:
    assert FAMILIES[family.name].architectures == family.architectures
    for architecture in family.architectures:
        assert hasattr(transformers, architecture)
        config = config_of(family)
        config.architectures = [architecture]
        assert find_family(config, "here") == family


@pytest.mark.parametrize(
    ("architectures", "message"),
    [
        (
            ["BloomForCausalLM"],
            r"^here: architecture BloomForCausalLM is of no known family; known architectures: ",
        ),
        (["BertForMaskedLM"], r"^here: architectures BertForMaskedLM: not a causal language model"),
        (None, r"^here: architectures none: not a causal language model"),
    ],
    ids=str,
)
def test_a_model_of_no_family_is_refused(architectures: list[str] | None, message: str) -> None:
    config = transformers.BloomConfig(architectures=architectures)
    with pytest.raises(FamilyError, match=message):
        find_family(config, "here")


def test_no_two_families_claim_an_architecture() -> None:
    for one, other in combinations(FAMILIES.values(), 2):
        assert not set(one.architectures) & set(other.architectures)


@each
def test_sites_hold_every_linear_of_a_block_once(family: Family) -> None:
    for index, block in enumerate(model_of(family).get_submodule(family.blocks).children()):
        sites = family.sites_of(index)
        listed = [linear for site in sites for linear in site.linears]
        linears = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        kept = {linear for one in family.kept_of(index) for linear in one.linears}
        kept |= {router for site in sites for router in site.routers if router in linears}
        assert sorted([*listed, *kept]) == sorted(linears)


@each
def test_what_is_kept_is_there_and_has_a_reason(family: Family) -> None:
    assert {kept for index in numbers_of(family) for kept in family.kept_of(index)} == set(family.kept)
    for index, block in enumerate(model_of(family).get_submodule(family.blocks).children()):
        names = {*dict(block.named_modules()), *dict(block.named_parameters())}
        for kept in family.kept_of(index):
            assert kept.reason and kept.linears + kept.others and {*kept.linears, *kept.others} <= names
        attention = dict(block.named_modules()).get(family.attention)  # what is called so need not be one
        assert hasattr(attention, "is_causal") == family.attends(index)
    check_linears(model_of(family), family, 32, ())


@each
def test_site_names_can_be_part_of_a_tensor_name(family: Family) -> None:
    for index in numbers_of(family):
        names = [site.name for site in family.sites_of(index)]
        assert len(set(names)) == len(names) and all(re.fullmatch(r"[a-z0-9_]+", name) for name in names)


@each
def test_its_blocks_are_of_all_kinds(family: Family) -> None:
    """Else the tests of this file would not see some of its sites."""
    assert bool(family.kinds) == (family.kinds_of is not None)
    assert {site for index in numbers_of(family) for site in family.sites_of(index)} == set(family.sites)
    assert not family.kinds or family.sites_of(0) != family.sites_of(1)


@each
def test_what_it_holds_in_float32_is_what_transformers_does(family: Family) -> None:
    """By the class, or by a buffer that has its type whatever the model has."""
    held = getattr(model_of(family), "_keep_in_fp32_modules_strict", None) or ()
    model = auto_class(family).from_config(config_of(family), dtype=torch.bfloat16)
    tensors = model.get_submodule(family.block_prefix(1)).state_dict()
    names = [
        name for name, tensor in tensors.items() if any(one in name for one in held) or tensor.dtype == torch.float32
    ]
    assert sorted(names) == sorted(family.in_float32)


@each
def test_nothing_of_the_model_is_passed_over(family: Family) -> None:
    ahead = Ahead.of(family, config_of(family))
    assert not any(ahead.holds(name) for name in model_of(family).state_dict())


@each
def test_the_modules_around_the_blocks_are_there(family: Family) -> None:
    model = model_of(family)
    assert len(list(model.get_submodule(family.blocks).children())) == len(numbers_of(family))
    assert family.block_prefix(1) == f"{family.blocks}.1"
    assert isinstance(model.get_submodule(family.embedding), nn.Embedding)
    assert isinstance(model.get_submodule(family.head), nn.Linear)
    assert isinstance(model.get_submodule(family.final_norm).weight, Tensor)
    if family.rotary is not None:
        assert not list(model.get_submodule(family.rotary).parameters())
    body = model.get_submodule(family.body)
    assert body(torch.arange(3)[None])[0].shape == (1, 3, SIZES["hidden_size"])


def is_of_one(one: Tensor, other: Tensor) -> bool:
    """Are they the very same tensor, or one and a view of it that has the same rows?"""
    return one is other or (
        one.data_ptr() == other.data_ptr() and torch.equal(one.flatten(0, -2), other.flatten(0, -2))
    )


@each_block
def test_the_linears_of_a_site_read_one_tensor_and_sites_do_not_share(family: Family, number: int) -> None:
    """Those of experts read rows of one tensor, the same rows in each expert."""
    seen = seen_by_modules(family, number)
    for site in family.sites_of(number):
        for linear in site.linears:
            alike = [
                name
                for name in site.linears
                if site.experts is None or name.rpartition(".")[0] == linear.rpartition(".")[0]
            ]
            assert is_of_one(seen[linear], seen[alike[0]])
            rows = seen[site.reader].flatten(0, -2)
            assert all((rows == row).all(dim=-1).any() for row in seen[linear].flatten(0, -2))
    for one, other in combinations(family.sites_of(number), 2):
        mine, theirs = seen[one.reader], seen[other.reader]
        assert mine is not theirs
        assert mine.shape != theirs.shape or not torch.equal(mine, theirs)


@each_block
def test_sites_are_in_the_order_in_which_they_compute(family: Family, number: int) -> None:
    """By the first of their linears, and inside of each site and expert."""
    calls = list(seen_by_modules(family, number))
    listed = [linear for site in family.sites_of(number) for linear in site.linears]
    first = [site.reader for site in family.sites_of(number) if not site.is_of_experts]
    assert [call for call in calls if call in first] == first
    for site in family.sites_of(number):
        if not site.is_of_experts:
            assert [call for call in calls if call in site.linears] == list(site.linears)
    of_experts = [linear for site in family.sites_of(number) if site.is_of_experts for linear in site.linears]
    for parent in {linear.rpartition(".")[0] for linear in of_experts}:
        inside = [call for call in calls if call.rpartition(".")[0] == parent and call in listed]
        assert inside == [linear for linear in listed if linear.rpartition(".")[0] == parent]


@each_block
def test_the_norms_and_producers_that_it_names_exist(family: Family, number: int) -> None:
    block = block_of(family, number)
    heads, width = value_heads(model_of(family).config)
    for site in family.sites_of(number):
        channels = block.get_submodule(site.linears[0]).in_features
        assert site.norm is None or site.producer is None
        if site.norm is not None:
            assert block.get_submodule(site.norm).weight.shape == (channels,)
        if site.producer is not None:
            rows = block.get_submodule(site.producer).out_features
            if site.producer_is_value:
                own = value_rows(family, rows, heads, width).flatten()
                assert len(set(own.tolist())) == heads * width and int(own.max()) == rows - 1
            assert site.keys_beside_values or rows == (heads * width if site.producer_is_value else channels)
            assert site.producer in {linear for other in family.sites_of(number) for linear in other.linears}
        assert not site.producer_is_value or site.producer is not None


def input_after_doubling(family: Family, number: int, site: Site, tensor: Tensor, index: int) -> Tensor:
    """The site's input when entry `index` of a weight before it is doubled."""
    kept = tensor[index].clone()
    after: list[Tensor] = []
    handle = (
        block_of(family, number)
        .get_submodule(site.reader)
        .register_forward_pre_hook(lambda _, arguments: after.append(arguments[0]))
    )
    try:
        tensor[index] = 2 * tensor[index] + site.norm_adds_one  # 1 + (2 w + 1) is twice 1 + w
        model_of(family)(TOKENS)
    finally:
        tensor[index] = kept
        handle.remove()
    return after[0]


def row_of(family: Family, number: int, site: Site, row: int) -> int:
    """The row of the norm or producer that is that of channel `row`, or of this value."""
    if not site.producer_is_value:
        return row
    weight = block_of(family, number).get_submodule(str(site.producer)).weight
    return int(value_rows(family, len(weight), *value_heads(model_of(family).config)).flatten()[row])


def readers_of(family: Family, number: int, site: Site, row: int) -> list[int]:
    """Channels of the site that row `row` of its norm or of its values makes, on its own."""
    if not site.producer_is_value:
        return [row]
    heads, width = value_heads(model_of(family).config)
    queries = block_of(family, number).get_submodule(site.linears[0]).in_features // (heads * width)
    head, channel = divmod(row, width)
    return [query * width + channel for query in range(head * queries, (head + 1) * queries)]


@each_block
def test_a_gain_or_a_row_of_the_producer_scales_its_own_channels(family: Family, number: int) -> None:
    """Doubled, it doubles that channel (of each query head that reads the value head), bit for bit, and no other."""
    for site in family.sites_of(number):
        source = site.norm or site.producer
        if source is None:
            continue
        before = seen_by_modules(family, number)[site.reader]
        for row in (0, 5, 17):
            expected = before.clone()
            expected[..., readers_of(family, number, site, row)] *= 2
            weight = block_of(family, number).get_submodule(source).weight
            got = input_after_doubling(family, number, site, weight, row_of(family, number, site, row))
            assert torch.equal(got, expected) and not torch.equal(got, before)


@each
def test_an_odd_size_is_named_and_can_be_ignored(family: Family) -> None:
    """in_features 100 of the MLP's last linear; a block size of 64 finds the same."""
    model = build_apart(config_of(family, **{inner_width(family): 100}))
    full = [
        f"{family.block_prefix(index)}.{linear}"
        for index in numbers_of(family)
        for site in family.sites_of(index)
        for linear in site.linears
    ]
    odd = [name for name in full if model.get_submodule(name).in_features % 32]
    assert {family.group_of(name)[1] for name in odd} <= {"down", "shared_down", "expert_down"}
    assert len(odd) >= (2 if family.experts is None else 4)
    message = rf"^{re.escape(odd[0])}: in_features 100 is not a multiple of the "
    with pytest.raises(ConfigError, match=message + "block size 32; list it under `ignore`"):
        check_linears(model, family, 32, ())
    check_linears(model, family, 4, ())
    last = (odd[0].rsplit(".", 1)[-1],)
    for patterns in (last, tuple(odd), tuple(f"*.{name.partition('.layers.')[2]}" for name in odd)):
        check_linears(model, family, 32, patterns)
        for index in numbers_of(family):
            kept = {linear for site in family.active_sites(index, patterns) for linear in site.linears}
            assert kept and not {f"{family.block_prefix(index)}.{linear}" for linear in kept} & set(odd)
    with pytest.raises(ConfigError, match=re.escape(f"{odd[-1]}: in_features")):
        check_linears(model, family, 32, tuple(odd[:-1]))


@each
def test_a_linear_that_it_does_not_know_is_named(family: Family) -> None:
    model = build_apart(config_of(family))
    block = model.get_submodule(family.block_prefix(1))
    block.add_module("adapter", nn.Linear(32, 32, device="meta"))
    with pytest.raises(
        FamilyError, match=rf"^{re.escape(family.block_prefix(1))}\.adapter: family {family.name} knows"
    ):
        check_linears(model, family, 32, ())
    check_linears(model, family, 32, ("adapter",))


@each
def test_ignored_linears_leave_their_site(family: Family) -> None:
    sites = family.sites_of(0)
    assert family.active_sites(0, ()) == sites
    assert family.active_sites(0, ("*",)) == ()
    first = f"{family.block_prefix(0)}.{sites[0].linears[0]}"
    kept = family.active_sites(0, (first,))
    if len(sites[0].linears) > 1:
        assert kept[0].linears == sites[0].linears[1:] and kept[1:] == sites[1:]
        assert (kept[0].norm, kept[0].producer) == (sites[0].norm, sites[0].producer)
    else:
        assert kept == sites[1:]
    assert family.active_sites(1, (first,)) == family.sites_of(1)


def test_patterns_are_shell_style_and_match_case() -> None:
    name = "model.layers.3.mlp.down_proj"
    for pattern in (name, "down_proj", "*.down_proj", "model.layers.3.*", "down_*", "model.layers.[34].mlp.*"):
        assert is_ignored(name, ("other", pattern))
    for pattern in ("down", "mlp.down_proj", "Down_proj", "model.layers.1*", "layers.3.mlp.down_proj", ""):
        assert not is_ignored(name, (pattern,))


def more_of(family: Family) -> dict[str, bool]:
    """Biases and norms that its config can have, and does not have by itself."""
    default = config_of(family)
    return {key: True for key in OPTIONAL if getattr(default, key, None) is False}


WITH_OPTIONS = {f"{name}, with options": family for name, family in TINY_FAMILIES.items() if more_of(family)}


@pytest.mark.parametrize(
    ("family", "has_options"),
    [(family, False) for family in TINY_FAMILIES.values()] + [(family, True) for family in WITH_OPTIONS.values()],
    ids=[*TINY_FAMILIES, *WITH_OPTIONS],
)
def test_scales_and_transforms_fold_away_in_float64(family: Family, has_options: bool) -> None:
    """Exactly."""
    torch.manual_seed(0)
    changes = more_of(family) if has_options else {}
    model = auto_class(family).from_config(config_of(family, **changes))
    separate_experts(model)
    model = model.double().eval().requires_grad_(False)
    spread_gains(model, family)
    with InFloat64():
        expected = model(TOKENS).logits
    generator = torch.Generator().manual_seed(0)
    heads = value_heads(model.config)
    for index, block in enumerate(model.get_submodule(family.blocks).children()):
        sites = family.sites_of(index)
        weights = {linear: block.get_submodule(linear).weight.data for site in sites for linear in site.linears}
        for site in sites:
            if site.norm or site.producer:
                scales = torch.exp2(torch.randn(weights[site.linears[0]].shape[1], generator=generator).double())
                scales = shareable_scales(scales, site, heads)
                fold_into_producer(block, site, weights, scales, heads, torch.float64)
        for site in sites:
            groups = weights[site.linears[0]].shape[1] // 32
            transform = BlockDiagonal(random_orthogonal(groups, 32, generator).double())
            for name in site.linears:
                linear = block.get_submodule(name)
                linear.weight.data = transform.fold(weights[name])
                linear.register_forward_pre_hook(lambda _, arguments, change=transform: (change.apply(arguments[0]),))
    with InFloat64():
        changed = model(TOKENS).logits
    assert not torch.equal(changed, expected)
    assert float((changed - expected).norm() / expected.norm()) < 1e-12


@each
def test_fused_norms_compute_the_same(family: Family) -> None:
    """Those of families with plain norms are all fused, and give what their class gives."""
    model = deepcopy(model_of(family))
    spread_gains(model, family)
    kept = tuple(f".{name}" for one in family.kept for name in one.others)
    routing = {router.rpartition(".")[0] for site in family.sites for router in site.routers}
    norms = [
        module
        for name, module in model.named_modules()
        if not name.endswith(kept)
        if isinstance(getattr(module, "weight", None), Tensor) and "Norm" in type(module).__name__
        if family.beside is None or not family.beside.is_carried(name)
        if not name.rpartition(".")[0].endswith(tuple(f".{place}" for place in routing))
    ]
    inputs = [torch.randn(7, len(norm.weight), generator=torch.Generator().manual_seed(0)) for norm in norms]
    expected = [norm(x) for norm, x in zip(norms, inputs, strict=True)]
    with fused_norms(model):
        fused = ["forward" in vars(norm) for norm in norms]
        found = [norm(x) for norm, x in zip(norms, inputs, strict=True)]
    plain = [type(norm).__name__ == family.norm_class for norm in norms]
    has_gate = [type(norm).__name__.endswith("Gated") for norm in norms]
    assert norms and fused == plain
    assert family.norm_class is None or [not own for own in plain] == has_gate
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
