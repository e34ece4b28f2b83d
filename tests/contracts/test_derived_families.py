"""What `--family auto` finds, beside every family that is written by hand; and what it owes where there is none."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tests.contracts.test_families as owed
import transformers
from tests.contracts.test_family_windows import WINDOWED
from tests.contracts.tiny_configs import config_of

from mxrot.deriving import derived_family, record_text
from mxrot.errors import FamilyError
from mxrot.models import FAMILIES, Family

OF_TEXT = {name: family for name, family in FAMILIES.items() if family.beside is None}
PLAIN = {name: one for name, one in OF_TEXT.items() if one.experts is None and one.kinds_of is None}
AROUND = ("body", "blocks", "embedding", "final_norm", "head", "attention", "rotary")


@pytest.mark.parametrize("name", PLAIN)
def test_the_sites_are_those_that_were_written_by_hand(name: str) -> None:
    """What feeds them is the same or is not named, and the modules around them are the same."""
    written, found = PLAIN[name], derived_family(config_of(PLAIN[name]), name)
    assert [site.linears for site in found.sites] == [site.linears for site in written.sites]
    assert [site.name for site in found.sites] == [site.name for site in written.sites]
    for own, other in zip(found.sites, written.sites, strict=True):
        assert own.norm in (other.norm, None) and own.producer in (other.producer, None)
        assert own.norm is None or own.norm_adds_one == other.norm_adds_one
        assert own.producer is None or own.producer_is_value == other.producer_is_value
    assert found.inner_rows in (written.inner_rows, None)
    assert (found.values, found.values_read_by) in ((written.values, written.values_read_by), ("", ""))
    for key in AROUND:
        assert getattr(found, key) == getattr(written, key)
    assert not found.is_rotatable


def test_nothing_that_is_written_by_hand_was_left_out() -> None:
    """Else the test above would hold for a record of sites alone."""
    for name, written in PLAIN.items():
        found = derived_family(config_of(written), name)
        fed = [[(site.norm, site.producer) for site in family.sites] for family in (found, written)]
        assert fed[0] == fed[1] and (found.values, found.inner_rows) == (written.values, written.inner_rows)


@pytest.mark.parametrize("name", [name for name, (family, _) in WINDOWED.items() if family in PLAIN])
def test_windows_are_seen(name: str) -> None:
    family, changes = WINDOWED[name]
    assert derived_family(config_of(PLAIN[family], **changes), name).windows == PLAIN[family].windows


@pytest.mark.parametrize("name", [name for name in OF_TEXT if name not in PLAIN])
def test_experts_and_blocks_of_several_kinds_are_refused(name: str) -> None:
    with pytest.raises(FamilyError, match=rf"^{name}: .*must be written by hand \(docs/add-a-family.md\)$"):
        derived_family(config_of(FAMILIES[name]), name)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in OF_TEXT])
def test_what_sees_images_is_refused(name: str) -> None:
    with pytest.raises(FamilyError, match=f"^{name}: a model of more than text; no family is derived for it$"):
        derived_family(config_of(FAMILIES[name]), name)


UNWRITTEN = ("OlmoForCausalLM", "PersimmonForCausalLM", "DiffLlamaForCausalLM", "GPTNeoXForCausalLM")
"""Architectures of transformers that no file of models/families describes."""


@pytest.fixture(params=UNWRITTEN)
def family(request: pytest.FixtureRequest) -> Family:
    assert request.param not in {name for one in FAMILIES.values() for name in one.architectures}
    bare = Family("unwritten", (request.param,), ())
    return derived_family(config_of(bare), "unwritten")


def test_a_derived_family_owes_what_others_do(family: Family) -> None:
    owed.test_sites_hold_every_linear_of_a_block_once(family)
    owed.test_site_names_can_be_part_of_a_tensor_name(family)
    owed.test_sites_are_in_the_order_in_which_they_compute(family, 1)
    owed.test_the_norms_and_producers_that_it_names_exist(family, 1)


def test_scales_and_transforms_of_a_derived_family_fold_away_in_float64(family: Family) -> None:
    owed.test_scales_and_transforms_fold_away_in_float64(family, False)


PAGE = (Path(__file__).parents[2] / "docs" / "add-a-family.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_page_shows_what_is_derived() -> None:
    config = transformers.OlmoConfig(architectures=["OlmoForCausalLM"])
    assert BLOCKS[0] == record_text(derived_family(config, "here"))


def test_the_family_that_the_page_writes_is_one() -> None:
    inside: dict[str, Any] = {}
    exec(BLOCKS[1], inside)
    written: Family = inside["FAMILY"]
    derived = derived_family(config_of(written), "here")
    assert [replace(site, residual=None) for site in written.sites] == list(derived.sites)
    owed.test_scales_and_transforms_fold_away_in_float64(written, False)
    owed.test_a_gain_or_a_row_of_the_producer_scales_its_own_channels(written, 1)
