"""A format with another grid is one class and one line: everything else takes it as it is, from weights to files."""

from pathlib import Path

import pytest
import torch
from tests.tiny_model import write_tiny_model
from tests.unit.checkpoint.folders import all_tensors, logits, recipe, windows_for, write
from tests.unit.formats.toy_grids import CODEBOOK, TWO_SCALES
from transformers import AutoModelForCausalLM

from mxrot import quantizing
from mxrot.checkpoint import load
from mxrot.errors import ConfigError
from mxrot.formats import FORMATS, Format
from mxrot.layers import QuantLinear

DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(params=[TWO_SCALES, CODEBOOK], ids=lambda format: format.name)
def format(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Format:
    """In the catalog, for one test."""
    found: Format = request.param
    monkeypatch.setitem(FORMATS, found.name, found)
    return found


@pytest.mark.parametrize("name", ["rtn", "hadamard", "duquant++-gptq"])
def test_a_model_is_quantized_written_and_read(format: Format, name: str, tmp_path: Path) -> None:
    """Weights and inputs, with and without a transform, to nearest and along the Hessian."""
    source = write_tiny_model(tmp_path / "source")
    same = {"format": format.name, "rule": "absmax"}
    chosen = recipe(
        name, **{f"{part}__{key}": value for part in ("weights", "activations") for key, value in same.items()}
    )
    write(source, tmp_path / "out", chosen)
    made = quantizing.quantize(source, chosen, windows=windows_for(chosen)).model
    assert made is not None
    expected = logits(made)
    assert expected.isfinite().all()
    assert torch.equal(logits(load(tmp_path / "out")), expected)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits(theirs), expected)
    down = made.get_submodule(DOWN)
    assert isinstance(down, QuantLinear)
    stored = all_tensors(tmp_path / "out")
    for part, (shape, dtype) in down.weights.stored_parts(64, 96).items():
        assert (tuple(stored[f"{DOWN}.{part}"].shape), stored[f"{DOWN}.{part}"].dtype) == (shape, dtype)


def test_tuning_does_not_know_other_grids(format: Format) -> None:
    with pytest.raises(ConfigError, match=rf"tuning moves codes under one scale a block, and {format.name} has others"):
        recipe("mxrot-tuned", weights__format=format.name, weights__rule="absmax", rounding__scales="reached")
