"""The model card: its header, what it says of loading, and that its commands run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from tests.tiny_model import tiny_config, write_tiny_model
from tests.unit.checkpoint.folders import TOKENS, recipe, write
from typer.testing import CliRunner

from mxrot.checkpoint import load, write_metrics
from mxrot.checkpoint.card import Made, model_card
from mxrot.checkpoint.card_source import Source, describe_source
from mxrot.checkpoint.metric import Metric
from mxrot.cli import app
from mxrot.errors import CheckpointError
from mxrot.layers import ModelSize, build_apart
from mxrot.models import demo
from mxrot.models.families.llama import FAMILY as LLAMA
from mxrot.recipe import Recipe
from mxrot.scheme import Scheme

HERE = "path/to/this/folder"
SIZE = ModelSize(1_000_000, code_bytes=500_000, scale_bytes=31_250, transform_bytes=4_000, other_bytes=2_000_000)
METRICS = [
    Metric("words", "perplexity", 8.0, None, 6.0, 0.25, "4 x 512 tokens"),
    Metric("a|b", "acc", 0.5, 0.01, 0.625, None, "200 questions", is_share=True),
]


def card_of(source: Source, chosen: Recipe, size: ModelSize = SIZE, **options: Any) -> str:
    """The card of what a recipe makes of a tiny Llama."""
    model = build_apart(tiny_config(architectures=["LlamaForCausalLM"]))
    scheme = Scheme.of(chosen, LLAMA, model)
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in scheme.linears}
    return model_card(source, Made(chosen, scheme, size, shapes, **options))


def header(card: str) -> dict[str, Any]:
    return ModelCard(card).data.to_dict()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with transforms, of a model with a card."""
    root = tmp_path_factory.mktemp("card")
    source = write_tiny_model(root / "tiny", torch.float32)
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\nA model.\n")
    (source / "LICENSE.txt").write_text("the licence")
    write(source, root / "out", recipe("hadamard"), base_name="owner/tiny")
    return root / "out"


def test_the_header_is_what_the_hub_reads(folder: Path) -> None:
    assert header((folder / "README.md").read_text()) == {
        "license": "apache-2.0",
        "library_name": "mxrot",
        "pipeline_tag": "text-generation",
        "base_model": "owner/tiny",
        "base_model_relation": "quantized",
        "tags": ["mxfp4", "compressed-tensors", "mxrot"],
    }
    assert (folder / "LICENSE.txt").read_text() == "the licence"


def test_a_name_that_is_no_hub_id_is_no_base_model() -> None:
    card = card_of(Source('local: "folder" # {x}'), recipe("rtn"))
    found = header(card)
    assert "base_model" not in found and found["license"] == "unknown"
    limits = card.split("## Limits")[1]
    assert "set `base_model`" in limits and "without a licence" in limits


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n", {"license": "other"}),
        ("no header", {}),
        ("---\nlicense: [a, b]\n---\n", {}),
        ("---\n: : :\n\t{\n---\n", {}),
        ("\xff", {}),
    ],
)
def test_licences_of_sources(tmp_path: Path, card: str, expected: dict[str, str]) -> None:
    (tmp_path / "README.md").write_bytes(card.encode("latin-1"))
    source = describe_source("a/b", tmp_path)
    assert source.hub_id == "a/b"
    assert source.licence.get("license") == expected.get("license")
    assert set(source.licence) == ({"license", "license_name", "license_link"} if expected else set())


def test_a_folder_that_is_a_quantized_form_counts_as_its_base(tmp_path: Path) -> None:
    assert describe_source("local", tmp_path) == Source("local")
    (tmp_path / "README.md").write_text("---\nbase_model: owner/big\n---\n")
    assert describe_source("local", tmp_path).hub_id is None, "it may be a model of its own"
    (tmp_path / "README.md").write_text("---\nbase_model: owner/big\nbase_model_relation: quantized\n---\n")
    assert describe_source("local", tmp_path) == Source("local", "owner/big")


def test_the_demo_model_has_a_licence_and_a_base(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(demo._CARD)
    expected = Source("local", "HuggingFaceTB/SmolLM2-135M-Instruct", {"license": "apache-2.0"})
    assert describe_source("local", tmp_path) == expected


@pytest.mark.parametrize("name", ["rtn", "hadamard", "duquant++-gptq"])
def test_the_first_lines_say_what_happens_without_the_import(name: str) -> None:
    chosen = recipe(name)
    first = card_of(Source("a/b"), chosen).split("# a/b")[1].strip().splitlines()[2]
    assert first.startswith("**Install mxrot, and `import mxrot` before you load it.** Without mxrot")
    assert ("nothing loads it: `config.json` calls the format `mxrot`" in first) == chosen.has_transform
    assert ("transformers loads the same weights" in first) == (not chosen.has_transform)


def test_vllm_is_promised_only_what_it_reads() -> None:
    def said(chosen: Any, has_bias: bool = False) -> str:
        found = re.search(r"With vLLM: (.*)", card_of(Source("a/b"), chosen, has_bias=has_bias))
        assert found
        return found[1]

    shared, own = recipe("hadamard"), recipe("duquant++", transform__sharing="block")
    assert "mxrot export" in said(shared) and "bias" not in said(shared)
    assert "takes no bias" in said(shared, has_bias=True)
    assert said(own).startswith("only with mxrot installed beside it, if at all: compressed-tensors has one matrix")
    eight = recipe("rtn", weights__format="mxfp8_e4m3")
    assert "compressed-tensors has no layout for weights in mxfp8_e4m3 with inputs in mxfp4" in said(eight)
    assert "plain compressed-tensors" in said(recipe("rtn"), has_bias=True)


def test_the_recipe_is_in_it_as_it_is() -> None:
    chosen = recipe("duquant++", ignore=["down_proj"])
    card = card_of(Source("a/b"), chosen)
    assert f"```toml\n{chosen.to_toml()}```" in card


def test_what_was_left_alone_is_said_from_what_was_done() -> None:
    chosen = recipe("duquant++", ignore=["down_proj"])
    assert "All linears are quantized." in card_of(Source("a/b"), chosen)
    left = ["lm_head", "model.layers.0.mlp.down_proj", "model.layers.11.mlp.down_proj"]
    card = card_of(Source("a/b"), chosen, replace(SIZE, left_weights=250_000, left_bytes=500_000), left=left)
    assert "left as they were: `lm_head`, `model.layers.*.mlp.down_proj` (2); 20.0 % of the weights" in card


def test_a_mixture_says_what_has_which_scheme() -> None:
    tables = [{"sites": ["down_proj"], "format": "mxfp8_e4m3"}, {"blocks": [-1, -1], "weights": "none"}]
    half = replace(SIZE, left_weights=1_000_000, left_bytes=2_000_000)
    card = card_of(Source("a/b"), recipe("hadamard", override=tables), half)
    assert "# a/b, quantized to mxfp4 and mxfp8_e4m3 weights and mxfp4 and mxfp8_e4m3 activations" in card
    assert header(card)["tags"] == ["mxfp4", "mxfp8_e4m3", "compressed-tensors", "mxrot"]
    down = "| mxfp8_e4m3 even | mxfp8_e4m3 even | block-diagonal | `model.layers.*.mlp.down_proj` (1) | 0.3 % | 8.250 |"
    assert f"\n{down}\n| left as they were | as they are | none | see above | 50.0 % | 16.000 |\n" in card
    assert "| share of weights |" not in card_of(Source("a/b"), recipe("hadamard"))


def test_figures_come_and_are_replaced_and_the_hash_is_kept(folder: Path) -> None:
    before = (folder / "README.md").read_text()
    assert "Not measured yet" in before
    write_metrics(folder, METRICS)
    card = (folder / "README.md").read_text()
    assert "Not measured yet" not in card and header(card) == header(before)
    assert "| words | perplexity | 6.000 | 8.000 | +2.000 ± 0.250 | 4 x 512 tokens |\n" in card
    assert "| a\\|b | acc, % | 62.50 | 50.00 ± 1.00 | -12.50 | 200 questions |\n" in card
    write_metrics(folder, METRICS[:1])
    again = (folder / "README.md").read_text()
    assert "a\\|b" not in again and again.count("| words |") == 1
    assert again.split("## How to load it")[1] == before.split("## How to load it")[1]
    load(folder, verify=True)


def test_a_card_without_a_place_for_figures_is_left_alone(source: Path, tmp_path: Path) -> None:
    write(source, tmp_path / "out", recipe("rtn"))
    for content in ("my own words", "<!-- accuracy, written by mxrot report --card --> cut short"):
        (tmp_path / "out" / "README.md").write_text(content)
        with pytest.raises(CheckpointError, match=r"README\.md: has no lines <!-- accuracy"):
            write_metrics(tmp_path / "out", METRICS)
        assert (tmp_path / "out" / "README.md").read_text() == content
    (tmp_path / "out" / "README.md").unlink()
    with pytest.raises(CheckpointError, match=r"README\.md: has no lines"):
        write_metrics(tmp_path / "out", METRICS)


def snippets(card: str, language: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", card, flags=re.DOTALL | re.MULTILINE)
    return [code for named, code in blocks if named == language]


def test_its_python_runs_and_gives_the_same_model(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    first, second = (code.replace(HERE, str(folder)) for code in snippets(card, "python"))
    logits: list[torch.Tensor] = []
    for code in (first, second):
        names: dict[str, Any] = {}
        exec(code, names)
        with torch.no_grad():
            logits.append(names["model"](TOKENS).logits)
    assert torch.equal(*logits)


def test_its_commands_run(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("some words of a text " * 40)
    card = (folder / "README.md").read_text()
    (block,) = snippets(card, "")
    lines = [line for line in block.replace(HERE, str(folder)).splitlines() if line.startswith("mxrot ")]
    assert [shlex.split(line)[1] for line in lines] == ["eval", "generate"]
    quick = {"eval": ["--text", str(tmp_path / "words.txt"), "--seq-len", "32"], "generate": ["--max-tokens", "2"]}
    for line in lines:
        words = shlex.split(line)[1:]
        result = CliRunner().invoke(app, [*words, *quick[words[0]]])
        assert result.exit_code == 0, result.output


@pytest.mark.slow
def test_what_it_says_of_loading_without_the_import_is_true(source: Path, tmp_path: Path) -> None:
    """Against `load`, in bfloat16, where compressed-tensors can run; what is refused, test_other_readers.py runs."""
    pytest.importorskip("compressed_tensors")
    write(source, tmp_path / "rtn", recipe("rtn"))
    program = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
with torch.no_grad():
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
    found = model(load_file(sys.argv[2])["tokens"]).logits.float()
assert "mxrot" not in sys.modules
save_file({"logits": found}, sys.argv[3])
"""
    from safetensors.torch import load_file, save_file

    save_file({"tokens": TOKENS}, tmp_path / "tokens")
    arguments = [str(tmp_path / name) for name in ("rtn", "tokens", "logits")]
    without = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}  # as where mxrot is not installed
    subprocess.run(
        [sys.executable, "-c", program, *arguments], env=without, check=True, capture_output=True, timeout=250
    )
    with torch.no_grad():
        expected = load(tmp_path / "rtn")(TOKENS).logits
    apart = float((load_file(tmp_path / "logits")["logits"] - expected).norm() / expected.norm())
    assert apart < 0.2, "the same weights, sums rounded to bfloat16"
