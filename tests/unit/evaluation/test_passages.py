"""The worst passage is that of an exhaustive search, and counts of weights are those of a histogram."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.tiny_model import write_tiny_model
from transformers import PreTrainedModel

import mxrot
from mxrot import api
from mxrot.evaluation import divergence, weight_values, worst_passage
from mxrot.evaluation.weight_values import BINS, REACH
from mxrot.layers import QuantLinear
from mxrot.models import find_family


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, PreTrainedModel]:
    folder: Path = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    return mxrot.quantize(folder, "rtn"), api.open_model(folder, "cpu")[0]


@pytest.mark.parametrize("length", [1, 5, 100])
def test_no_passage_is_worse(models: tuple[PreTrainedModel, PreTrainedModel], length: int) -> None:
    windows = torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(0))
    found = worst_passage(*models, windows, length)
    logs = [model(windows).logits.detach().float().log_softmax(-1)[:, :-1] for model in models]
    kl = (logs[1].exp() * (logs[1] - logs[0])).sum(-1)
    took = min(length, 11)
    means = {(w, s): float(kl[w, s : s + took].mean()) for w in range(3) for s in range(12 - took)}
    window, start = max(means, key=lambda place: means[place])
    assert (found.window, found.start) == (window, start + 1)
    places = slice(start, start + took)
    torch.testing.assert_close(found.kl, kl[window, places], rtol=1e-3, atol=1e-6)
    assert torch.equal(found.ids, windows[window, 1:][places])
    assert torch.equal(found.quantized, logs[0][window, places].argmax(-1))
    assert torch.equal(found.original, logs[1][window, places].argmax(-1))


def test_its_mean_is_that_of_the_divergence(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    windows = torch.randint(0, 256, (1, 12), generator=torch.Generator().manual_seed(1))
    found = worst_passage(*models, windows, 11)
    apart = divergence(*models, windows)
    assert float(found.kl.mean()) == pytest.approx(apart.kl, rel=1e-4)
    assert float((found.original == found.quantized).float().mean()) == pytest.approx(apart.agreement)


def test_weights_are_counted_by_site(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    for model in models:
        family = find_family(model.config, "tiny")
        found = weight_values(model, family)
        assert sum(int(counts.sum()) for counts in found.values()) == 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 96)
        wanted = torch.zeros(BINS)
        for block in model.get_submodule(family.blocks).children():
            linear = block.get_submodule("mlp.down_proj")
            weight = linear.dequantized_weight() if isinstance(linear, QuantLinear) else linear.weight.detach()
            scaled = weight.float() / weight.float().square().mean().sqrt()
            wanted += torch.histc(scaled.clamp(-REACH, REACH - 1e-4), BINS, -REACH, REACH)
        own = found[family.group_of(f"{family.block_prefix(0)}.mlp.down_proj")[1]]
        # An edge falls on one side or the other by a rounding of float32; of 12,288 weights few lie there.
        assert int((own - wanted).abs().sum()) <= 12
