"""mxrot.quantize, load and evaluate, and what they say to bad input."""

import inspect
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_model import write_tiny_model
from tests.unit.checkpoint.folders import digests, logits, recipe
from transformers import BertConfig, GPT2Config, PreTrainedModel

import mxrot
from mxrot import api
from mxrot.errors import CheckpointError, ConfigError, DamagedError, DataError, FamilyError, MxrotError, NumericsError
from mxrot.layers import QuantLinear
from mxrot.models import FAMILIES
from mxrot.text import Reader, load_text, read_windows

SMALL = {"samples": 4, "seq_len": 32}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return str(path)


def refused(kind: type[MxrotError], message: str, model: object, chosen: object = "rtn", **options: Any) -> str:
    """The one line that quantize says."""
    with pytest.raises(kind, match=message) as raised:
        mxrot.quantize(model, chosen, **options)
    assert type(raised.value) is kind and "\n" not in str(raised.value)
    return str(raised.value)


# --- what works


def test_the_public_names() -> None:
    assert sorted(mxrot.__all__) == [
        *("MxrotConfig", "QTensor", "Recipe", "diverge", "evaluate", "evaluate_tasks", "load", "progress", "quantize"),
    ]
    assert all(getattr(mxrot, name) is not None for name in mxrot.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        mxrot.nothing  # noqa: B018


def test_importing_the_package_is_quick() -> None:
    code = "import sys, mxrot; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


@pytest.mark.parametrize("name", ["rtn", "smoothquant", "hadamard", "duquant++", "duquant++-gptq"])
def test_without_output_is_with_output_and_load(source: Path, text: str, tmp_path: Path, name: str) -> None:
    settings = {"calib": text, "seed": 2, "device": "cpu", **SMALL}
    model = mxrot.quantize(source, recipe(name), **settings)
    run = mxrot.quantize(source, recipe(name), tmp_path / "out", **settings)
    loaded = mxrot.load(tmp_path / "out", device="cpu")
    assert isinstance(model, PreTrainedModel) and isinstance(run, dict)
    assert torch.equal(logits(model), logits(loaded))
    assert json.loads((tmp_path / "out" / "run.json").read_text()) == json.loads(json.dumps(run))
    assert run["model"] == "tiny" and run["seed"] == 2
    if name in ("rtn", "hadamard"):
        assert run["data"] is None and run["windows"] is None
    else:
        assert run["windows"] == (4, 32)
        read = load_text(text, "calibration")
        assert run["data"] == {
            "text": "words",
            "sha256": read.digest,
            "windows_asked": 4,
            "windows": 4,
            "seq_len": 32,
            "generated": 0,
            "texts": [read_windows(read, Reader(api.load_tokenizer(source)), 32, 4).as_table() | {"weight": 1.0}],
        }


def test_a_recipe_by_name_by_file_or_as_such(source: Path, text: str, tmp_path: Path) -> None:
    chosen = recipe("hadamard")
    (tmp_path / "mine.toml").write_text(chosen.to_toml())
    models = [mxrot.quantize(source, given) for given in ("hadamard", tmp_path / "mine.toml", chosen)]
    assert all(torch.equal(logits(model), logits(models[0])) for model in models)


def test_names_are_paths_with_a_tilde_too(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    mxrot.quantize(str(source), "rtn", "~/out")
    assert (tmp_path / "out" / "run.json").is_file()
    mxrot.load("~/out", device="cpu")


def test_evaluate_takes_a_model_or_a_folder(source: Path, text: str, tmp_path: Path) -> None:
    mxrot.quantize(source, "hadamard", tmp_path / "out")
    by_folder = mxrot.evaluate(tmp_path / "out", text=text, seq_len=64)
    tokenizer = api.load_tokenizer(tmp_path / "out")
    by_model = mxrot.evaluate(mxrot.load(tmp_path / "out", device="cpu"), text=[text], tokenizer=tokenizer, seq_len=64)
    assert by_folder == by_model and by_folder.keys() == {"words"}
    original = mxrot.evaluate(source, text=text, seq_len=64)
    assert original["words"].ppl != by_folder["words"].ppl
    with pytest.raises(TypeError, match="needs the tokenizer of a model that is passed itself"):
        mxrot.evaluate(mxrot.load(tmp_path / "out", device="cpu"), text=text)


def test_diverge_takes_models_or_folders(source: Path, text: str, tmp_path: Path) -> None:
    mxrot.quantize(source, "hadamard", tmp_path / "out")
    options: dict[str, Any] = {"text": text, "seq_len": 64}
    by_folder = mxrot.diverge(tmp_path / "out", source, **options)
    assert by_folder["words"].kl > 0
    assert by_folder["words"].ppl == mxrot.evaluate(tmp_path / "out", **options)["words"].ppl
    models = mxrot.load(tmp_path / "out", device="cpu"), api.open_model(source, "cpu")[0]
    assert mxrot.diverge(*models, tokenizer=api.load_tokenizer(source), **options) == by_folder
    with pytest.raises(TypeError, match="needs the tokenizer"):
        mxrot.diverge(*models, text=text)


def test_open_model_opens_both_kinds(source: Path, tmp_path: Path) -> None:
    mxrot.quantize(source, "rtn", tmp_path / "out")
    model, folder = api.open_model(tmp_path / "out", "cpu", verify=True)
    assert folder == tmp_path / "out"
    assert isinstance(model.get_submodule("model.layers.0.mlp.up_proj"), QuantLinear)
    original, _ = api.open_model(source, "cpu")
    assert not any(isinstance(module, QuantLinear) for module in original.modules())
    assert next(original.parameters()).dtype == torch.float32 and not original.training


def test_generate_text(source: Path, tmp_path: Path) -> None:
    mxrot.quantize(source, "rtn", tmp_path / "out")
    model, folder = api.open_model(tmp_path / "out", "cpu")
    tokenizer = api.load_tokenizer(folder)
    first, again = (api.generate_text(model, tokenizer, "Once upon", max_tokens=5) for _ in range(2))
    assert first == again and not first.startswith("Once upon")


def test_every_option_has_a_default_and_most_are_by_name() -> None:
    parameters = inspect.signature(mxrot.quantize).parameters.values()
    assert all(parameter.default is not parameter.empty for parameter in parameters)
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["model", "recipe", "output"]


# --- what does not


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    refused(FamilyError, "nothing: no such model folder", tmp_path / "nothing")


def test_a_file_for_a_model(source: Path) -> None:
    refused(FamilyError, "model.safetensors: is a file; give its folder", source / "model.safetensors")


def test_an_empty_folder(tmp_path: Path) -> None:
    refused(FamilyError, "no config.json; expected a model folder in the Hugging Face layout", tmp_path)


def test_not_a_causal_language_model(tmp_path: Path) -> None:
    BertConfig(architectures=["BertModel"]).save_pretrained(tmp_path)
    refused(FamilyError, "architectures BertModel: not a causal language model", tmp_path)


def test_an_unknown_family(tmp_path: Path) -> None:
    GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path)
    message = refused(FamilyError, "architecture GPT2LMHeadModel is of no known family", tmp_path)
    named = message.partition("known architectures: ")[2].partition(" and ")[0].split(", ")
    assert len(named) > 9 and {*named} <= {known for family in FAMILIES.values() for known in family.architectures}


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_never_opened(tmp_path: Path, name: str) -> None:
    folder, exploded = write_tiny_model(tmp_path / "tiny"), tmp_path / "exploded"
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(exploded)))
    refused(FamilyError, f"{name} would have to be unpickled, which mxrot never does", folder)
    with pytest.raises(FamilyError, match=f"{name} would have to be unpickled, which mxrot never does"):
        mxrot.evaluate(folder)
    assert not exploded.exists()
    pickle.loads((folder / name).read_bytes())
    assert exploded.exists()  # it was a live one


def test_code_in_the_folder_is_never_run(tmp_path: Path) -> None:
    """A config that asks transformers for a class of its own."""
    folder, exploded = write_tiny_model(tmp_path / "tiny"), tmp_path / "exploded"
    (folder / "evil.py").write_text(f"open({str(exploded)!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": classes, "model_type": "evil"}))
    refused(FamilyError, "comes with code of its own .auto_map., which is never run", folder)
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": classes}))
    mxrot.quantize(folder, "rtn")
    assert not exploded.exists()


def test_an_odd_linear_is_named_and_ignoring_it_works(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "odd", intermediate_size=100)
    refused(ConfigError, "model.layers.0.mlp.down_proj: in_features 100 is not a multiple of .* `ignore`", folder)
    mxrot.quantize(folder, recipe("rtn", ignore=["down_proj"]), tmp_path / "out")
    loaded = mxrot.load(tmp_path / "out", device="cpu")
    assert type(loaded.get_submodule("model.layers.1.mlp.down_proj")) is torch.nn.Linear


def test_calibration_text(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("too short")
    for name, message in (
        ("empty.txt", "empty.txt: the text is empty"),
        ("short.txt", "short: 9 tokens do not fill one window of 32"),
        ("nothing.txt", "nothing.txt: no such text file"),
    ):
        refused(DataError, message, source, "duquant++", calib=str(tmp_path / name), **SMALL)
        mxrot.quantize(source, "rtn", calib=str(tmp_path / name))  # needs none, looks at none


def test_options_that_make_no_sense(source: Path, text: str) -> None:
    refused(ConfigError, "seq_len must be at least 2, got 1", source, "duquant++", calib=text, seq_len=1)
    for samples in (0, -1):
        message = f"number of windows must be positive, got {samples}"
        refused(ConfigError, message, source, "duquant++", calib=text, samples=samples)
    refused(ConfigError, "no recipe 'nothing'", source, "nothing")


def test_a_folder_without_a_tokenizer(tmp_path: Path, text: str) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    refused(FamilyError, "has no tokenizer; expected tokenizer.json", folder, "duquant++", calib=text, **SMALL)
    mxrot.quantize(folder, "rtn")  # needs none


def test_damaged_weights(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-2:] = b"\x00\x7e"  # NaN in float16
    (folder / "model.safetensors").write_bytes(data)
    refused(NumericsError, "the weights hold NaN or Inf; the file model.safetensors is damaged", folder)
    (folder / "model.safetensors").write_bytes(data[:-10])
    refused(DamagedError, "model.safetensors: cannot be read as safetensors", folder)


def test_a_bad_output_is_refused_before_the_model_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    (tmp_path / "file").write_text("keep")
    before = digests(tmp_path)
    for output, message in (("full", "not empty; use --force"), ("file", "is a file"), ("file/a", "is a file")):
        refused(CheckpointError, message, tmp_path / "no-model", output=tmp_path / output)
    refused(ConfigError, "cannot be exported", tmp_path / "no-model", "duquant++-released", output=tmp_path / "new")
    assert digests(tmp_path) == before


def test_a_checkpoint_is_no_model_to_quantize(source: Path, tmp_path: Path) -> None:
    mxrot.quantize(source, "rtn", tmp_path / "out")
    refused(FamilyError, "out: is quantized already", tmp_path / "out", "hadamard")


def test_the_command_says_it_in_one_line(source: Path, tmp_path: Path) -> None:
    """One process for all of it: the exit code of each bad input, and no traceback."""
    code = """
import sys
from mxrot.cli import main
for argument in sys.argv[1:]:
    sys.argv = ["mxrot", *argument.split("|")]
    try:
        main()
    except SystemExit as stop:
        print("exit", stop.code, file=sys.stderr)
"""
    (tmp_path / "file").write_text("")
    commands = [
        f"quantize|{tmp_path}/nothing|-r|rtn|-o|{tmp_path}/out",
        f"quantize|{source}|-r|rtn|-o|{tmp_path}/file",
        f"quantize|{source}|-r|nothing|-o|{tmp_path}/out",
        f"eval|{source.parent}",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *commands], capture_output=True, text=True, check=False, timeout=120
    )
    assert "Traceback" not in done.stderr
    assert done.stderr.count("exit 2\n") == len(commands)
    for expected in ("no such model folder", "is a file; give a folder", "no recipe 'nothing'", "no config.json"):
        assert done.stderr.count(expected) == 1
