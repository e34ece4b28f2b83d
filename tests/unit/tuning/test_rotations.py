"""Training of rotations on a tiny model: the loss falls, a killed run goes on, a seed gives the same bits."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_model import random_windows, write_tiny_model
from tests.unit.tuning.rotated_networks import network_of, random_rotations
from torch import Tensor

from mxrot.errors import CheckpointError, NumericsError
from mxrot.formats import TensorQuantizer
from mxrot.models import FolderSource
from mxrot.progress import Progress, silent
from mxrot.quantizing.loading import load_original
from mxrot.sections import Rotation
from mxrot.surgery import Rotations
from mxrot.tuning import rotations as training
from mxrot.tuning.rotated_network import RotatedNetwork
from mxrot.tuning.rotations import RotationTraining, cosine_rate, train_rotations
from mxrot.tuning.trained_sites import rounded_inputs, rounded_weights

WINDOWS = random_windows(8, 24)
OPTIONS = Rotation(residual="hadamard", value_heads="hadamard", steps=12, batch_windows=4)
MXFP4 = TensorQuantizer.named("mxfp4 even")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> FolderSource:
    return FolderSource(write_tiny_model(tmp_path_factory.mktemp("tiny")))


class Kept:
    """Keeps what it is given last."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] | None = None

    def load(self) -> dict[str, Tensor] | None:
        return self.tensors

    def save(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = {name: tensor.clone() for name, tensor in tensors.items()}


def network(source: FolderSource) -> RotatedNetwork:
    weights = partial(rounded_weights, MXFP4)
    return network_of(source, WINDOWS, partial(rounded_inputs, MXFP4), weights, torch.float32)


def train(
    source: FolderSource, seed: int = 0, checkpoint: Kept | None = None, progress: Progress = silent
) -> RotationTraining:
    found = RotationTraining.begin(random_rotations(source), "cpu", checkpoint)
    generator = torch.Generator().manual_seed(seed)
    train_rotations(network(source), WINDOWS, found, OPTIONS, generator, checkpoint, progress)
    return found


def confident(folder: Path) -> tuple[FolderSource, Tensor]:
    """A model that is sure of what comes next, and windows that it has written: rounding makes it unsure."""
    write_tiny_model(folder, torch.float32)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            tensor.mul_(20 if name.startswith("lm_head") else 2)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    source = FolderSource(folder)
    model = load_original(source, torch.float32, torch.device("cpu"))
    generator, windows = torch.Generator().manual_seed(0), torch.arange(8)[:, None] * 7
    while windows.shape[1] < 24:
        chances = model(windows, use_cache=False).logits[:, -1].softmax(dim=-1)
        windows = torch.cat([windows, torch.multinomial(chances, 1, generator=generator)], dim=1)
    return source, windows


def test_the_loss_falls(tmp_path: Path) -> None:
    """By half of what rounding costs under random rotations."""
    source, windows = confident(tmp_path)
    with torch.no_grad():
        original = float(load_original(source, torch.float32, torch.device("cpu"))(windows, labels=windows).loss)
    options = Rotation(residual="hadamard", value_heads="hadamard", steps=20, batch_windows=8)
    found = RotationTraining.begin(random_rotations(source), "cpu")
    train_rotations(network(source), windows, found, options, torch.Generator())
    assert len(found.losses) == 20
    assert sum(found.losses[-5:]) / 5 - original < 0.5 * (found.losses[0] - original)
    for matrices in (found.residual, found.value_heads):
        assert matrices is not None and matrices.dtype == torch.float64
        identity = torch.eye(matrices.shape[-1], dtype=torch.float64)
        assert (matrices.mT @ matrices - identity).abs().max() < 1e-10


def test_a_killed_training_goes_on_with_the_same_bits(source: FolderSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "KEEP_SECONDS", 0.0)
    whole, kept = train(source), Kept()

    def kill(done: float, total: int, what: str) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(source, checkpoint=kept, progress=kill)
    told: list[tuple[float, int, str]] = []
    gone_on = train(source, checkpoint=kept, progress=lambda *words: told.append(words))
    assert [done for done, _, _ in told] == list(range(7, 13)) and told[0][1] == 12
    assert told[1][2] == f"training rotations, loss {whole.losses[7]:.4g}"
    assert gone_on.losses == whole.losses and len(whole.losses) == 12
    assert torch.equal(gone_on.residual, whole.residual) and torch.equal(gone_on.value_heads, whole.value_heads)
    again = train(source, checkpoint=kept)  # finished: nothing is left to do
    assert again.losses == whole.losses and torch.equal(again.residual, whole.residual)


def test_what_is_kept_of_another_training_is_refused(source: FolderSource) -> None:
    kept = Kept()
    kept.save({"residual": torch.eye(32), "losses": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"training rotations is of .*'residual': \(32, 32\).*--force"):
        train(source, checkpoint=kept)


def test_a_seed_decides_about_the_order_of_windows(source: FolderSource) -> None:
    one, other, third = (train(source, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.residual, other.residual) and one.losses == other.losses
    assert not torch.equal(one.residual, third.residual)


def test_only_what_is_there_is_trained(source: FolderSource) -> None:
    start = Rotations(random_rotations(source).residual)
    began = RotationTraining.begin(start, "cpu")
    train_rotations(network(source), WINDOWS, began, OPTIONS, torch.Generator())
    found = began.rotations
    assert found.value_heads is None and found.residual is not None and start.residual is not None
    assert not torch.equal(found.residual, start.residual)


def test_a_loss_that_is_not_finite_says_what_to_do(source: FolderSource) -> None:
    broken = network(source)
    broken.model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    began = RotationTraining.begin(random_rotations(source), "cpu")
    with pytest.raises(NumericsError, match=r"the loss is nan at step 0.* smaller rotation.rate, or"):
        train_rotations(broken, WINDOWS, began, OPTIONS, torch.Generator())


def test_the_rate_falls_along_a_cosine() -> None:
    rates = [cosine_rate(step, Rotation(residual="hadamard", steps=4, rate=1.0)) for step in range(5)]
    assert rates == pytest.approx([1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0.0], abs=1e-15)
