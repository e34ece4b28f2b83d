"""Every family from a model folder to a checkpoint and back."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.contracts.test_families import TINY_FAMILIES, each, spread_gains
from tests.contracts.tiny_configs import auto_class, config_of
from tests.tiny_model import write_tokenizer
from tests.unit.checkpoint.folders import recipe, write
from torch import Tensor
from transformers import PreTrainedModel

import mxrot
from mxrot.api import open_model
from mxrot.errors import ConfigError
from mxrot.models import Family, WeightFiles
from mxrot.models.ahead import Ahead
from mxrot.quantizing import run as pipeline

IDS = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(1))
WINDOWS = torch.randint(0, 50, (6, 24), generator=torch.Generator().manual_seed(0))
CACHES = {
    f"{transform} cache": recipe(
        "rtn", cache__keys="int4_row_asym", cache__values="int4_row_asym", cache__transform=transform
    )
    for transform in ("hadamard", "second_moment")
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random model of each family, with biases and gains that count."""
    found = {}
    for name, family in TINY_FAMILIES.items():
        torch.manual_seed(0)
        model = auto_class(family).from_config(config_of(family))
        spread_gains(model, family)
        found[name] = tmp_path_factory.mktemp(name)
        model.half().save_pretrained(found[name])
        write_tokenizer(found[name])
    return found


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


def has_place_for_scales(family: Family) -> bool:
    """Can what comes before each site take scales?"""
    return all(site.norm or site.producer for site in family.sites)


def refusal(family: Family, recipe_name: str) -> str | None:
    """What a recipe asks for that the family has no place for, as the refusal says it."""
    if recipe_name in CACHES and family.heads_obstacle is not None:
        return f"cache: in family {family.name} keys and values are not quantized: {re.escape(family.heads_obstacle)}"
    if recipe_name in ("quarot", *CACHES) and not family.names_values:
        return f"changes values inside of their heads .* and family {family.name} names no linear that makes them, head"
    if recipe_name == "quarot" and not family.is_rotatable:
        return f"no rotation of the residual stream of family {family.name} can be"
    if recipe_name == "duquant++" and not has_place_for_scales(family):
        return f"of family {family.name} has nothing before it that can take smoothing scales; list it under"
    return None


# Norms of random gains around zero, as in OLMo 2, make inputs smaller than a trained model has.
@pytest.mark.filterwarnings("ignore:.*scales of its inputs go from:mxrot.errors.MxrotWarning")
@each
@pytest.mark.parametrize("name", ["mxrot", "rtn", "duquant++", "quarot", *CACHES])
def test_what_is_loaded_is_what_was_quantized(
    folders: dict[str, Path], tmp_path: Path, family: Family, name: str
) -> None:
    changes = {"calibration__generated": 0.5} if name == "mxrot" else {}
    chosen = CACHES[name] if name in CACHES else recipe(name, **changes)
    windows = None if chosen.is_data_free else WINDOWS
    reason = refusal(family, name)
    if reason is not None:
        with pytest.raises(ConfigError, match=reason):
            write(folders[family.name], tmp_path / "out", chosen, windows=windows)
        assert not list(tmp_path.iterdir())
        return
    if name == "duquant++" and not has_place_for_scales(family):
        with pytest.raises(ConfigError, match="has nothing before it that can take smoothing scales; list it under"):
            pipeline.quantize(folders[family.name], chosen, windows=windows)
        return
    in_memory = pipeline.quantize(folders[family.name], chosen, windows=windows).model
    assert in_memory is not None
    write(folders[family.name], tmp_path / "out", chosen, windows=windows)
    loaded = mxrot.load(tmp_path / "out", device="cpu")
    assert torch.equal(logits(loaded), logits(in_memory))
    by_transformers = auto_class(family).from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits(by_transformers), logits(in_memory))


RECURRENT = [family for family in TINY_FAMILIES.values() if family.states_of is not None]


@pytest.mark.parametrize("family", RECURRENT, ids=[family.name for family in RECURRENT])
def test_sites_that_take_no_scales_can_be_skipped(folders: dict[str, Path], tmp_path: Path, family: Family) -> None:
    """duquant++ for blocks with a state: what is behind it has no norm and no producer. The others are smoothed. Keys
    and values are in codes beside."""
    bare = {site.group for site in family.sites if site.norm is None and site.producer is None}
    cache = {"cache__keys": "int4_row_asym", "cache__values": "int4_row_asym", "cache__transform": "none"}
    chosen = recipe("duquant++", smoothing__skip=sorted(bare), **cache)
    in_memory = pipeline.quantize(folders[family.name], chosen, windows=WINDOWS).model
    assert in_memory is not None
    write(folders[family.name], tmp_path / "out", chosen, windows=WINDOWS)
    assert torch.equal(logits(mxrot.load(tmp_path / "out", device="cpu")), logits(in_memory))
    by_transformers = auto_class(family).from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits(by_transformers), logits(in_memory))
    norm = f"{family.block_prefix(0)}.{family.sites_of(0)[0].norm}.weight"
    before, after = (WeightFiles(place, family.beside).read(norm) for place in (folders[family.name], tmp_path / "out"))
    assert not torch.equal(before, after)


AHEAD = [family for family in TINY_FAMILIES.values() if Ahead.of(family, config_of(family)).holds("mtp.fc.weight")]


@pytest.mark.parametrize("family", AHEAD, ids=[family.name for family in AHEAD])
def test_what_predicts_further_ahead_is_left_out_and_said(
    folders: dict[str, Path], tmp_path: Path, family: Family
) -> None:
    """In a shard of its own, as on the hub. All else is as without it."""
    plain, ahead = folders[family.name], tmp_path / "ahead"
    shutil.copytree(plain, ahead)
    (ahead / "model.safetensors").rename(ahead / "model-1.safetensors")
    beside = {"mtp.fc.weight": torch.full((4, 4), torch.nan)}
    save_file(beside, ahead / "model-2.safetensors", {"format": "pt"})
    where = dict.fromkeys(load_file(ahead / "model-1.safetensors"), "model-1.safetensors")
    table = {"metadata": {}, "weight_map": where | dict.fromkeys(beside, "model-2.safetensors")}
    (ahead / "model.safetensors.index.json").write_text(json.dumps(table))
    runs = [write(source, tmp_path / name, recipe("rtn")) for name, source in (("one", plain), ("other", ahead))]
    said = "passed over, as transformers and vLLM do: 1 tensors that predict tokens further ahead (mtp)"
    assert [run.get("passed_over") for run in runs] == [None, said]
    one, other = (_tensors_in(tmp_path / name) for name in ("one", "other"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert not (tmp_path / "other" / "model-2.safetensors").exists()
    opened = open_model(ahead, "cpu")[0]
    assert torch.equal(logits(opened), logits(open_model(plain, "cpu")[0]))
    config = mxrot.MxrotConfig("rtn")
    on_load = auto_class(family).from_pretrained(ahead, dtype=torch.float32, quantization_config=config)
    assert torch.equal(logits(on_load), logits(mxrot.load(tmp_path / "one", device="cpu", dtype=torch.float32)))


def _tensors_in(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@each
@pytest.mark.parametrize("sharing", ["site", "block"])
def test_transforms_and_smoothing_fold_away(folders: dict[str, Path], family: Family, sharing: str) -> None:
    """Weights in 8 bits and inputs as they are: what is left is the rounding of the weights, as without a transform.

    The median over tokens: one that a router sends to another expert is off by more, however exact the rest is.
    """
    changes = {"weights__format": "mxint8", "weights__rule": "", "activations": "none", "rounding__method": "rtn"}
    original = logits(auto_class(family).from_pretrained(folders[family.name], dtype=torch.float32))
    errors = []
    for method, smoothing in (("identity", {}), ("moments", {}), ("random-orthogonal", {"smoothing__alpha": 0.6})):
        if smoothing and sharing == "site" and not has_place_for_scales(family):
            continue
        more = {"transform__method": method, "transform__sharing": sharing, "calibration__generated": 0.0}
        chosen = recipe("mxrot", **(changes | more | smoothing))
        model = pipeline.quantize(folders[family.name], chosen, windows=WINDOWS).model
        assert model is not None
        errors.append(float(((logits(model) - original).norm(dim=-1) / original.norm(dim=-1)).median()))
    # Gemma 4 does not divide scores by the root of a width: 8 bits alone give 0.037 there.
    bound = 0.05 if family.name.startswith("gemma4") else 0.03
    assert len(errors) >= 2 and max(errors) < bound and max(errors) < 3 * errors[0]


@each
def test_in_bfloat16_it_has_the_types_that_transformers_gives_it(
    folders: dict[str, Path], tmp_path: Path, family: Family
) -> None:
    write(folders[family.name], tmp_path / "out", recipe("rtn"), windows=None)
    loaded = mxrot.load(tmp_path / "out", device="cpu", dtype=torch.bfloat16)
    other = auto_class(family).from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    types, expected = ({name: x.dtype for name, x in one.state_dict().items()} for one in (loaded, other))
    assert types == expected
    for name in family.in_float32:
        assert types[f"{family.block_prefix(1)}.{name}"] == torch.float32
    assert torch.equal(logits(loaded), logits(other))
