"""What is said about a checkpoint in vLLM, and what an export writes. tests/vllm holds it against vLLM itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_model import write_tiny_model, write_tokenizer
from tests.unit.checkpoint.folders import all_tensors, digests, logits, recipe, write
from transformers import Olmo2Config, Olmo2ForCausalLM, Phi3Config, Phi3ForCausalLM

from mxrot.checkpoint import load
from mxrot.checkpoint.checked import check_checkpoint
from mxrot.errors import CheckpointError
from mxrot.marker import MARKER
from mxrot.vllm import plugin
from mxrot.vllm.export import export_for_vllm
from mxrot.vllm.verdict import check_for_vllm


@pytest.fixture(scope="module")
def site(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with one matrix a site, of a model in float16; nobody writes into it."""
    folder = tmp_path_factory.mktemp("site") / "site"
    write(source, folder, recipe("duquant++"))
    return folder


def checkpoint(root: Path, name: str, changes: dict[str, Any], **model: Any) -> Path:
    source = write_tiny_model(root / "model", torch.bfloat16, **model)
    write(source, root / "quantized", recipe(name, **changes))
    return root / "quantized"


def test_one_matrix_a_site_runs_on_one_device(site: Path) -> None:
    report = check_for_vllm(site)
    assert (report.stock.stops, report.stock.tensor_parallel) == ((), (1,))
    assert any("float16" in note for note in report.notes)
    assert report.as_table()["devices"][0]["device"].startswith("B200")


@pytest.mark.parametrize(
    ("name", "changes", "model", "message"),
    [
        ("hadamard", {}, {"attention_bias": True}, "q_proj has a bias|k_proj has a bias"),
        ("duquant++", {"transform__sharing": "block"}, {}, "one matrix a block.*--recipe mxrot-vllm"),
    ],
)
def test_what_only_the_plugin_runs(
    name: str, changes: dict[str, Any], model: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path, name, changes, **model)
    report = check_for_vllm(folder)
    assert (report.plugin.stops, report.plugin.tensor_parallel) == ((), (1,))
    assert report.stock.tensor_parallel == () and report.as_table()["devices"] == []
    with pytest.raises(CheckpointError, match=message):
        export_for_vllm(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_biases_run_where_nothing_is_transformed(tmp_path: Path) -> None:
    assert check_for_vllm(checkpoint(tmp_path, "rtn", {}, attention_bias=True)).stock.stops == ()


@pytest.mark.parametrize(
    ("config", "model", "runs_with_plugin"),
    [(Phi3Config, Phi3ForCausalLM, True), (Olmo2Config, Olmo2ForCausalLM, False)],
)
def test_other_architectures(config: Any, model: Any, runs_with_plugin: bool, tmp_path: Path) -> None:
    settings = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    model(config(**settings, num_attention_heads=4, pad_token_id=None)).save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    write(tmp_path / "model", tmp_path / "transformed", recipe("hadamard"))
    report = check_for_vllm(tmp_path / "transformed")
    assert model.__name__ in report.stock.stops[0]
    assert (report.plugin.stops == ()) == runs_with_plugin
    write(tmp_path / "model", tmp_path / "plain", recipe("rtn"))
    report = check_for_vllm(tmp_path / "plain")
    assert report.stock.stops == ()
    assert any("not tried" in note for note in report.notes) != runs_with_plugin
    write(tmp_path / "model", tmp_path / "head", recipe("rtn", head__format="mxint8"))
    report = check_for_vllm(tmp_path / "head")
    assert [stop for stop in report.plugin.stops if "its quantized head was not tried" not in stop] == []
    assert (report.plugin.stops == ()) == runs_with_plugin and report.stock.stops


@pytest.mark.parametrize(("ffn", "sizes"), [(96, (1,)), (128, (1, 2)), (256, (1, 2))])
def test_devices_share_whole_blocks(ffn: int, sizes: tuple[int, ...], tmp_path: Path) -> None:
    """o_proj has 64 inputs, two blocks; down_proj has `ffn`."""
    report = check_for_vllm(checkpoint(tmp_path, "rtn", {}, intermediate_size=ffn))
    assert report.plugin.tensor_parallel == report.stock.tensor_parallel == sizes


def test_a_recipe_that_leaves_activations_alone_is_told_that_vllm_does_not(tmp_path: Path) -> None:
    report = check_for_vllm(checkpoint(tmp_path, "rtn", {"activations": "none"}))
    assert any("vLLM quantizes them all the same" in note for note in report.notes)


def test_an_export_is_the_same_model_in_bfloat16(site: Path, tmp_path: Path) -> None:
    before = digests(site)
    assert check_for_vllm(site).stock.needs_export
    report = export_for_vllm(site, tmp_path / "out")
    assert report == check_for_vllm(tmp_path / "out") and digests(site) == before
    assert not report.stock.needs_export and not report.plugin.needs_export
    assert not any("float16, and in that" in note for note in report.notes)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "torch_dtype" not in config
    assert json.loads((site / "config.json").read_text())["dtype"] == "float16"
    said, exported = (check_checkpoint(folder) for folder in (site, tmp_path / "out"))
    assert said.layout.is_native and not exported.layout.is_native and exported.scheme == said.scheme
    assert exported.quantization["format"] == "mxfp4-pack-quantized"
    group = exported.quantization["config_groups"]["group_0"]  # vLLM reads the words, transformers the format
    assert group["weights"]["num_bits"] == 4 and group["format"] == "mxrot"
    assert len(exported.quantization["transform_config"]["config_groups"]) == 2 * 4
    changed = {name for name, digest in digests(tmp_path / "out").items() if before.get(name) != digest}
    assert changed == {"README.md", "config.json", "run.json"}
    check_checkpoint(tmp_path / "out", verify=True)
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(site)))
    assert all_tensors(tmp_path / "out").keys() == all_tensors(site).keys()


def test_an_export_of_an_export_is_the_same(site: Path, tmp_path: Path) -> None:
    export_for_vllm(site, tmp_path / "once")
    export_for_vllm(tmp_path / "once", tmp_path / "twice")
    card = (tmp_path / "twice" / "README.md").read_text()
    assert card.count("vllm serve") == 1
    assert "float16, and in that" not in card


def test_what_stands_there_is_kept_unless_forced(site: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        export_for_vllm(site, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").exists()
    export_for_vllm(site, tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "mine.txt").exists()
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_damaged_file_is_found_before_anything_is_written(site: Path, tmp_path: Path) -> None:
    export_for_vllm(site, tmp_path / "damaged")
    path = sorted((tmp_path / "damaged").glob("*.safetensors"))[-1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=path.name):
        export_for_vllm(tmp_path / "damaged", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_not_onto_itself(site: Path) -> None:
    with pytest.raises(CheckpointError, match="holds the checkpoint"):
        export_for_vllm(site, site, force=True)


def test_what_is_no_checkpoint(source: Path, tmp_path: Path) -> None:
    for folder in (source, tmp_path):
        with pytest.raises(CheckpointError, match=r"not a checkpoint written by mxrot|config\.json: cannot be read"):
            check_for_vllm(folder)


def test_the_plugin_costs_nothing_before_it_is_called() -> None:
    code = "import sys, mxrot.vllm.plugin; sys.exit(any(name in sys.modules for name in ('vllm', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


def test_the_plugin_knows_the_marker() -> None:
    assert plugin.is_ours({MARKER: {}}) and not plugin.is_ours({"format": "mxfp4-pack-quantized"})


def test_the_native_form_is_known_without_the_marker() -> None:
    """Others refuse it by the format of its groups; where mxrot is installed, mxrot says that it is damaged."""
    assert plugin.is_ours({"format": "mxrot"})
    assert plugin.is_ours({"config_groups": {"group_0": {"format": "mxrot"}}})
    for groups in ({"group_0": {"format": "pack-quantized"}}, {"W8A8": ["Linear"]}, ["mxrot"], None):
        assert not plugin.is_ours({"format": "mixed-precision", "config_groups": groups})
