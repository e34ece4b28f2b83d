"""Every family in the network that rotations are trained in.

With nothing rounded it is the original model, whatever the rotations. So the loss does not change along the orthogonal
matrices, and its gradient has no part along them: one matrix that is missing somewhere, or on the wrong side, is seen.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.contracts.test_families import TINY_FAMILIES
from tests.contracts.test_family_sources import TOLERANCE, exact_folder, may_tie
from tests.float64 import InFloat64
from tests.unit.surgery.changed_sources import logits, off_by
from tests.unit.tuning.rotated_networks import loss_and_gradients, network_of, random_rotations

from mxrot.layers import logits_of
from mxrot.models import Family
from mxrot.surgery import Rotations
from mxrot.tuning.cayley import skew_direction

IDS = torch.arange(40).view(2, 20)
each_rotatable = pytest.mark.parametrize(
    "family", [pytest.param(family, id=name) for name, family in TINY_FAMILIES.items() if family.is_rotatable]
)


@each_rotatable
def test_nothing_rounded_is_the_original(family: Family, tmp_path: Path) -> None:
    source = exact_folder(tmp_path, family, tie_word_embeddings=may_tie(family))
    rotations = random_rotations(source)
    heads = rotations.value_heads if family.names_values else None
    with InFloat64(), torch.no_grad():
        network = network_of(source, IDS)
        heads = rotations.value_heads if family.names_values else None
        with network.open():
            states = network.states(IDS, rotations.residual, heads)
        found = logits_of(network.model, states)
    assert off_by(found, logits(source, IDS)) < TOLERANCE


@each_rotatable
def test_nothing_rounded_has_no_gradient_along_the_rotations(family: Family, tmp_path: Path) -> None:
    source = exact_folder(tmp_path, family)
    rotations, others = (random_rotations(source, seed) for seed in range(2))
    if not family.names_values:
        rotations, others = Rotations(rotations.residual), Rotations(others.residual)
    with InFloat64():
        loss, *gradients = loss_and_gradients(network_of(source, IDS), IDS, rotations)
        other, *_ = loss_and_gradients(network_of(source, IDS), IDS, others)
    assert loss == pytest.approx(other, rel=TOLERANCE)
    matrices_of = [one for one in (rotations.residual, rotations.value_heads) if one is not None]
    for matrices, gradient in zip(matrices_of, gradients, strict=True):
        assert gradient.abs().max() > 1e-5
        along = skew_direction(matrices, gradient)
        assert along.abs().max() < 10 * TOLERANCE * gradient.abs().max()
