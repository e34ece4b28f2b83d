from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from tests.unit.transforms import slow_search
from torch import Tensor

from mxrot.calibration import COLLECTORS
from mxrot.errors import ConfigError
from mxrot.formats import TensorQuantizer, get_format
from mxrot.transforms import SiteSample, outlier
from mxrot.transforms.base import random_orthogonal
from mxrot.transforms.outlier import OutlierRotation, spreading_rotation

BLOCK, GROUPS = 8, 10
MXFP4 = get_format("mxfp4")


def spiked(seed: int, groups: int = GROUPS, block: int = BLOCK) -> Tensor:
    """Two batches [2, windows, tokens, K] with outlier channels of several sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 12, groups * block, generator=generator)
    x[..., 3::11] *= 20 * torch.rand(x[0, 0, 0, 3::11].shape, generator=generator)
    return x


def site(method: OutlierRotation, x: Tensor, block: int = BLOCK) -> SiteSample:
    """What `method` asked for, seen in the batches x."""
    seen = {}
    for need in method.needs:
        collector = COLLECTORS[need](block, method.rows, x[..., 0].numel())
        for batch in x:
            collector.update(batch)
        seen[need] = collector.result()
    quantizer = TensorQuantizer(MXFP4, MXFP4.rule())
    return SiteSample(torch.zeros(1, x.shape[-1], dtype=torch.float64), block, seen, quantizer)


def blocks_of(x: Tensor, block: int = BLOCK) -> Tensor:
    """[G, rows, B] of x [..., K]."""
    return x.flatten(0, -2).unflatten(-1, (-1, block)).transpose(0, 1)


# R~


@pytest.mark.parametrize("size", range(2, 65))
def test_the_spreading_rotation(size: int) -> None:
    """Orthogonal, row 0 uniformly 1/sqrt(B), and equal to the slow definition."""
    matrix = spreading_rotation(size)
    assert (matrix @ matrix.T - torch.eye(size, dtype=torch.float64)).abs().max() <= 4 * size * 2.0**-52
    assert (matrix[0] - size**-0.5).abs().max() <= size * 2.0**-52
    assert np.abs(matrix.numpy() - slow_search.base_rotation(size)).max() <= size * 2.0**-52


@pytest.mark.parametrize("channel", [0, 1, 5, BLOCK - 1])
def test_a_step_without_q_spreads_a_single_peak_evenly(channel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """x = p e_c. Then x E_c = p e_0, x E_c R~ = p/sqrt(B) (1, ..., 1), and E_c moves nothing: |x'| = |p|/sqrt(B)."""
    monkeypatch.setattr(
        outlier, "random_orthogonal", lambda count, size, *_: torch.eye(size).double().repeat(count, 1, 1)
    )
    x = torch.zeros(1, 1, 1, BLOCK)
    x[..., channel] = -24.0
    method = OutlierRotation(steps=1)
    transform = method.fit(site(method, x), "site", torch.Generator())
    rotated = transform.apply(x.double())
    assert (rotated + 24 / BLOCK**0.5).abs().max() <= 1e-14 * 24


@pytest.mark.parametrize("channel", [0, 1, 5, BLOCK - 1])
def test_a_step_with_q_leaves_that_share_in_the_pivot(channel: int) -> None:
    """diag(1, Q) keeps the share of channel 0, which E_c moves back to c, and turns the others among themselves."""
    x = torch.zeros(1, 1, 1, BLOCK)
    x[..., channel] = 24.0
    method = OutlierRotation(steps=1)
    transform = method.fit(site(method, x), "site", torch.Generator().manual_seed(0))
    rotated = transform.apply(x.double()).flatten()
    assert abs(rotated[channel] - 24 / BLOCK**0.5) <= 1e-14 * 24
    assert abs(rotated.norm() - 24) <= 1e-13 * 24
    assert rotated.abs().max() < 24


# The search


def searched_rows(method: OutlierRotation, sample: SiteSample, sharing: str) -> list[np.ndarray]:
    """The rows that each search of the twin sees."""
    if method.sample == "mean":
        tokens = sample.seen["mean"].double().numpy()
        blocks = tokens.reshape(len(tokens), -1, BLOCK)
        return [blocks.reshape(-1, BLOCK)] if sharing == "site" else list(blocks.transpose(1, 0, 2))
    kinds = ["peaks", "spaced"] if method.sample == "both" else [method.sample]
    seen = {kind: sample.seen[kind].double().numpy() for kind in kinds}
    if sharing == "block":
        return list(np.concatenate(list(seen.values()), axis=1))
    rows = {kind: blocks.reshape(-1, BLOCK) for kind, blocks in seen.items()}
    if "peaks" in rows:
        rows["peaks"] = slow_search.largest_rows(rows["peaks"], 8 * method.rows)
    return [np.concatenate(list(rows.values()))]


def score_of(method: OutlierRotation, sample: SiteSample, x: np.ndarray) -> float:
    if method.score == "error":
        rows = torch.from_numpy(x)
        assert sample.fake_quantize is not None
        return float((sample.fake_quantize(rows) - rows).square().sum())
    return float(np.abs(x).max() if method.peak == "abs" else x.max() - x.min())


OPTIONS = [
    {"peak": peak, "pivot": pivot, "redraw": redraw, "sample": sample}
    for peak, pivot, redraw, sample in product(("abs", "range"), ("channel", "row"), (True, False), ("peaks", "mean"))
] + [{"score": "error", "sample": sample} for sample in ("peaks", "spaced", "both")]


@pytest.mark.parametrize("sharing", ["site", "block"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_the_search_equals_its_slow_twin(options: dict[str, Any], sharing: str) -> None:
    """Ten blocks, of which a site keeps 8 times `rows` rows: 80 of 100, or 24 of 30."""
    format = replace(MXFP4, block=BLOCK)
    lengths = []
    for seed, rows in ((0, 10), (1, 3)):
        method = OutlierRotation(steps=12, rows=rows, **options)
        sample = replace(site(method, spiked(seed)), fake_quantize=TensorQuantizer(format, format.rule()))
        got = method.fit(sample, sharing, torch.Generator().manual_seed(seed)).matrices.numpy()

        drawn = random_orthogonal(12 if method.redraw else 1, BLOCK - 1, torch.Generator().manual_seed(seed)).numpy()
        q = [drawn[step % len(drawn)] for step in range(12)]
        searches = searched_rows(method, sample, sharing)
        assert len(got) == len(searches) == (1 if sharing == "site" else GROUPS)
        for matrix, block_rows in zip(got, searches, strict=True):
            found = slow_search.search(block_rows, q, lambda x, m=method, s=sample: score_of(m, s, x), method.pivot)
            # The search rotates in float32: 12 steps of B products, each to 6e-8.
            assert found.margin > 1e-5, "choose another seed"
            assert np.abs(matrix - found.product).max() <= 1e-13
            lengths.append(found.length)
    assert any(0 < length < 12 for length in lengths)


def test_a_block_is_searched_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many blocks take a step together."""
    method, x = OutlierRotation(steps=12, rows=20), spiked(2)
    sample = site(method, x)
    together = method.fit(sample, "block", torch.Generator().manual_seed(0)).matrices
    monkeypatch.setattr(outlier, "GROUPS_AT_ONCE", 3)
    apart = method.fit(sample, "block", torch.Generator().manual_seed(0)).matrices
    assert (together - apart).abs().max() <= 1e-13
    alone = method.fit(site(method, x[..., 6 * BLOCK : 7 * BLOCK]), "block", torch.Generator().manual_seed(0))
    assert (alone.matrices[0] - together[6]).abs().max() <= 1e-13


def test_the_best_prefix_may_be_empty() -> None:
    """Rows with every pattern of signs: a rotated column peaks at the sum of its |entries|, which exceeds 1."""
    patterns = torch.tensor(list(product((-1.0, 1.0), repeat=4)))
    method = OutlierRotation(steps=20)
    sample = site(method, patterns[None, None], block=4)
    for sharing in ("site", "block"):
        matrices = method.fit(sample, sharing, torch.Generator().manual_seed(0)).matrices
        assert torch.equal(matrices, torch.eye(4, dtype=torch.float64)[None])


@pytest.mark.parametrize("sharing", ["site", "block"])
@pytest.mark.parametrize("peak", ["abs", "range"])
def test_the_kept_peak_is_never_larger_than_the_first(peak: str, sharing: str) -> None:
    """Of all rows with sharing "block", where the kept rows hold the largest vectors of the block."""
    improved = 0
    for seed in range(5):
        method = OutlierRotation(steps=24, peak=peak, rows=72)
        x = spiked(seed)
        transform = method.fit(site(method, x), sharing, torch.Generator().manual_seed(seed))
        before, after = blocks_of(x.double()), blocks_of(transform.apply(x.double()))
        if sharing == "site":
            before, after = before.flatten(0, 1)[None], after.flatten(0, 1)[None]
        for b, a in zip(before, after, strict=True):
            old, new = (float(v.abs().max() if peak == "abs" else v.max() - v.min()) for v in (b, a))
            assert new <= old * (1 + 1e-6)
            improved += new < 0.9 * old
    assert improved >= 5


@pytest.mark.parametrize("sharing", ["site", "block"])
@pytest.mark.parametrize("spikes", [True, False])
def test_the_error_score_never_does_worse_than_no_rotation(spikes: bool, sharing: str) -> None:
    """Squared error of the run-time quantizer on the rows that the search saw."""
    gains = []
    for seed in range(4):
        method = OutlierRotation(steps=16, score="error", rows=72)
        x = spiked(seed, groups=3, block=32)
        if not spikes:
            x = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        sample = site(method, x, block=32)
        transform = method.fit(sample, sharing, torch.Generator().manual_seed(seed))
        assert sample.fake_quantize is not None
        before, after = (blocks_of(v, 32) for v in (x.double(), transform.apply(x.double())))
        errors = [(sample.fake_quantize(v) - v).square().sum(dim=(1, 2)) for v in (before, after)]
        if sharing == "site":
            errors = [error.sum()[None] for error in errors]
        # The search adds up in float32.
        assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
        gains.append(float(errors[1].sum() / errors[0].sum()))
    if spikes:
        assert max(gains) < 0.8


def test_what_it_asks_of_calibration() -> None:
    assert OutlierRotation().needs == {"peaks"}
    assert OutlierRotation(sample="mean").needs == {"mean"}


@pytest.mark.parametrize("options", [{"steps": 0}, {"rows": 0}, {"steps": -1}], ids=str)
def test_nothing_to_search_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"^transform outlier: steps and rows must be positive, got "):
        OutlierRotation(**options)
