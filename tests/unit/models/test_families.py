"""How families are found."""

import pkgutil
import re
from dataclasses import replace
from pathlib import Path

import pytest
from tests.contracts.test_families import TINY_FAMILIES

from mxrot.errors import FamilyError
from mxrot.models import EXPERTS, FAMILIES, families, families_by_name
from mxrot.models.families.llama import FAMILY as LLAMA
from mxrot.models.families.mixtral import FAMILY as MIXTRAL


def test_each_file_is_a_family_of_its_name() -> None:
    files = [module.name for module in pkgutil.iter_modules(families.__path__)]
    assert list(FAMILIES) == sorted(files) and {"llama", "gemma3", "qwen3_moe"} <= set(files)
    assert all(family.name == name for name, family in FAMILIES.items())


def test_their_order_is_that_of_their_names() -> None:
    assert list(families_by_name([MIXTRAL, LLAMA])) == list(families_by_name([LLAMA, MIXTRAL])) == ["llama", "mixtral"]


def test_one_architecture_in_two_families_is_refused() -> None:
    other = replace(MIXTRAL, architectures=("MixtralForCausalLM", "LlamaForCausalLM"))
    with pytest.raises(FamilyError, match=r"^family mixtral: names .* LlamaForCausalLM, and so does family llama;"):
        families_by_name([other, LLAMA])


def test_one_name_for_two_families_is_refused() -> None:
    with pytest.raises(FamilyError, match=r"^family llama: there are two of this name"):
        families_by_name([LLAMA, replace(LLAMA, architectures=("OtherForCausalLM",))])


def test_experts_are_known_by_the_class_of_transformers() -> None:
    assert EXPERTS["MixtralExperts"] is MIXTRAL.experts
    assert set(EXPERTS) == {family.experts.fused for family in FAMILIES.values() if family.experts is not None}


def test_the_table_of_families_says_what_their_records_do() -> None:
    page = (Path(__file__).parents[3] / "docs" / "models.md").read_text(encoding="utf-8")
    rows = [
        line.strip("|").split("|") for line in page.splitlines() if re.match(r"\| `\w+For(CausalLM|Cond\w+)`", line)
    ]
    listed = [name for row in rows for name in re.findall(r"`(\w+For(?:CausalLM|Cond\w+))`", row[0])]
    assert sorted(listed) == sorted(name for family in FAMILIES.values() for name in family.architectures)
    for first, _, _, rotated, smoothed in rows:
        for family in FAMILIES.values():
            if not any(f"`{name}`" in first for name in family.architectures):
                continue
            sites = TINY_FAMILIES[family.name].sites
            without = {site.group for site in sites if site.norm is None and site.producer is None}
            assert rotated.strip() == ("yes" if family.is_rotatable else "no"), family.name
            assert without == set(re.findall(r"`(\w+)`", smoothed)), family.name
            assert (smoothed.strip() == "yes") == (not without), family.name
