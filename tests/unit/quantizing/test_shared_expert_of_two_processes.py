"""An expert that every token goes to, of another width than the others, in two processes and in one."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from tests.contracts.tiny_configs import config_of
from tests.tiny_model import random_windows
from tests.unit.calibration.two_processes import of_two_processes
from tests.unit.checkpoint.folders import recipe
from torch import Tensor
from transformers import AutoModelForCausalLM

from mxrot.calibration.world import ONE, World
from mxrot.models import FAMILIES
from mxrot.quantizing import batches
from mxrot.quantizing import run as pipeline

pytestmark = pytest.mark.slow

WINDOWS = random_windows(60, 32)
RECIPES = {
    "rtn": recipe("rtn"),
    "duquant++": recipe("duquant++"),
    "mxrot": recipe("mxrot", calibration__generated=0.0, permutation__value_heads="none"),
}
SAME = 0.99
"""Of the codes, where sums differ by float64 rounding."""


def work(folder: Path, world: World) -> dict[str, Tensor]:
    """One window at a time: what is computed of a batch has the same bits, however many share the windows."""
    own, batches.BATCH_TOKENS = batches.BATCH_TOKENS, {"cpu": WINDOWS.shape[1]}
    try:
        return made(folder, world)
    finally:
        batches.BATCH_TOKENS = own


def made(folder: Path, world: World) -> dict[str, Tensor]:
    found = {}
    for name, chosen in RECIPES.items():
        windows = None if chosen.is_data_free else WINDOWS
        model = pipeline.quantize(folder / "model", chosen, windows=windows, world=world).model
        assert model is not None
        found |= {f"{name}/{key}": value.clone() for key, value in model.state_dict().items()}
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three experts, which two processes cannot share evenly, and the shared one."""
    found = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = config_of(FAMILIES["qwen2_moe"], num_experts=3, vocab_size=256)
    AutoModelForCausalLM.from_config(config).half().save_pretrained(found / "model")
    return found


def test_two_processes_make_what_one_makes(folder: Path) -> None:
    one, two = of_two_processes(partial(work, folder), folder)
    alone = work(folder, ONE)
    shared = [name for name in alone if ".shared_expert." in name]
    assert len(shared) >= 3 * len(RECIPES) and one.keys() == two.keys() == alone.keys()
    for name, expected in alone.items():
        assert torch.equal(one[name], two[name]), name
        assert (one[name] == expected).double().mean() >= (1.0 if name.startswith("rtn/") else SAME), name
