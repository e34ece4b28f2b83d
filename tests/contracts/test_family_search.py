"""Sites of every family are raised and put back, and passes that begin in the middle measure the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.contracts.test_families import TINY_FAMILIES, spread_gains
from tests.contracts.tiny_configs import auto_class, config_of
from tests.unit.checkpoint.folders import recipe

from mxrot import api
from mxrot.evaluation import divergence
from mxrot.evaluation.perplexity import states_of
from mxrot.layers import build_apart
from mxrot.models import Family, FolderSource
from mxrot.quantizing import quantize
from mxrot.scheme import Scheme
from mxrot.search.bits import Costs
from mxrot.search.choices import Choice, everywhere
from mxrot.search.kept import KeptSearch
from mxrot.search.meter import Meter, Original
from mxrot.search.raised import RaisedModel
from mxrot.search.roundings import OtherRoundings

IDS = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(1))
EIGHT = Choice("mxfp8_e4m3", "mxfp8_e4m3")
DENSE = [name for name, family in TINY_FAMILIES.items() if family.experts is None]


@pytest.mark.parametrize("name", DENSE)
def test_a_raise_in_the_last_block_is_measured_from_there(tmp_path: Path, name: str) -> None:
    family: Family = TINY_FAMILIES[name]
    torch.manual_seed(0)
    model = auto_class(family).from_config(config_of(family))
    spread_gains(model, family)
    model.half().save_pretrained(tmp_path / "model")
    source, chosen = FolderSource(tmp_path / "model"), recipe("hadamard")
    skeleton = build_apart(source.config)
    costs = Costs.of(chosen, [EIGHT], source.family, skeleton, source.dtype)
    kept = KeptSearch(tmp_path / "work", {}, resume=False)
    store = kept.store(source.family, source.config.get_text_config().num_hidden_layers)
    raises = {cell: list(choices) for cell, choices in costs.added.items()}
    quantize(source, chosen, store=store, beside=OtherRoundings(raises, skeleton, kept))
    schemes = {EIGHT: Scheme.of(everywhere(chosen, EIGHT), source.family, skeleton)}
    own = Scheme.of(chosen, source.family, skeleton)
    raised = RaisedModel.load(source, chosen, schemes, own, kept, torch.device("cpu"))
    original, _ = api.open_model(tmp_path / "model", "cpu")
    with torch.no_grad():
        wanted = Original(original, [IDS], [states_of(original, IDS)])
    meter = Meter(raised, wanted, "seen", kept, lambda *_: None, 1)
    meter.settle({})
    before = meter.kl({}, "x")
    last = max(costs.blocks)
    mixture = {cell: EIGHT for cell in costs.added if cell.block == last}
    assert meter.kl(mixture, "x") == pytest.approx(divergence(raised.model, original, IDS, 2).kl, rel=1e-12)
    raised.become({})
    assert before == pytest.approx(divergence(raised.model, original, IDS, 2).kl, rel=1e-12)
    assert meter.kl(mixture, "x") != before
