"""Programs that do not import mxrot: where it is installed, `import torch` makes its checkpoints known."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from tests.tiny_model import write_tiny_model
from tests.unit.checkpoint.folders import recipe, write
from tests.unit.evaluation.task_folder import write_scorable_model

import mxrot_autoload
from mxrot.recipe import tomllib

ROOT = Path(__file__).parents[2]
GROUP = "torch.backends"
Start = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def entries() -> dict[str, str]:
    """The entry points of pyproject.toml that torch calls."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return dict(project["entry-points"][GROUP])


@pytest.fixture
def start(tmp_path: Path, entries: dict[str, str]) -> Start:
    """Runs Python where a mxrot with those entry points is installed, whatever is installed here."""
    installed = tmp_path / "installed" / "mxrot-0.0.1.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: mxrot\nVersion: 0.0.1\n")
    lines = [f"[{GROUP}]", *(f"{name} = {target}" for name, target in entries.items())]
    (installed / "entry_points.txt").write_text("\n".join(lines) + "\n")
    paths = [str(installed.parent), str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]

    def started(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        variables = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"} | environment
        return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=variables, check=False)

    return started


def test_the_entry_point_installs_without_torch(entries: dict[str, str], start: Start) -> None:
    (target,) = entries.values()
    assert EntryPoint("mxrot", target, GROUP).load() is mxrot_autoload.install
    program = f"import sys; from importlib.metadata import EntryPoint as E; E('mxrot', {target!r}, '').load()();"
    assert start("-c", program + "print('torch' in sys.modules)").stdout == "False\n"


@pytest.mark.parametrize("program", ["import transformers", "import torch, transformers"])
def test_from_pretrained_without_importing_mxrot(tmp_path: Path, start: Start, program: str) -> None:
    folder = tmp_path / "quantized"
    write(write_tiny_model(tmp_path / "tiny"), folder, recipe("hadamard"))
    program += f"; model = transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r});"
    program += "print(type(model.model.layers[0].mlp.down_proj).__name__)"
    for switch, expected in (("1", True), ("0", False)):
        shown = start("-c", program, TORCH_DEVICE_BACKEND_AUTOLOAD=switch)
        assert ("QuantLinear" in shown.stdout) == expected, shown.stderr


WARNED = "RuntimeWarning: mxrot "
BROKEN = {
    "files are gone": {},
    "another folder of that name": {"mxrot/notes.txt": ""},
    "a package that raises": {"mxrot/__init__.py": "raise RuntimeError('no')"},
    "a package that is no Python": {"mxrot/__init__.py": "def ("},
    "a module is gone": {"mxrot/__init__.py": "from mxrot import autoload"},
    "another autoload": {"mxrot/__init__.py": "", "mxrot/autoload.py": ""},
}


@pytest.mark.parametrize(
    ("files", "warnings"),
    [(files, "default") for files in BROKEN.values()] + [({}, "error")],
    ids=[*BROKEN, "warnings are errors"],
)
def test_torch_is_imported_where_mxrot_is_broken(
    tmp_path: Path, start: Start, files: dict[str, str], warnings: str
) -> None:
    """With -S, so that the mxrot that is installed here is not found by a .pth file."""
    installed = tmp_path / "installed"
    shutil.copy(mxrot_autoload.__file__, installed)
    for name, text in files.items():
        (installed / name).parent.mkdir(exist_ok=True)
        (installed / name).write_text(text)
    paths = os.pathsep.join([str(installed), sysconfig.get_path("purelib")])
    done = start("-S", "-W", warnings, "-c", "import torch; print(torch.ones(1))", PYTHONPATH=paths)
    assert (done.returncode, done.stdout) == (0, "tensor([1.])\n"), done.stderr
    assert done.stderr.count(WARNED) == (warnings == "default")


@pytest.fixture
def other_transformers(tmp_path: Path) -> str:
    """A folder with a transformers that keeps nothing where mxrot looks."""
    for package in ("transformers", "transformers/quantizers"):
        (tmp_path / "others" / package).mkdir(parents=True)
        (tmp_path / "others" / package / "__init__.py").touch()
    (tmp_path / "others/transformers/quantizers/auto.py").write_text("KEPT = 1")
    return os.pathsep.join([str(tmp_path / "others"), str(ROOT / "src")])


@pytest.mark.parametrize("order", ["mxrot, transformers.quantizers.auto", "transformers.quantizers.auto, mxrot"])
def test_a_transformers_without_the_tables_is_imported(start: Start, other_transformers: str, order: str) -> None:
    program = f"import {order}; print(transformers.quantizers.auto.KEPT)"
    done = start("-c", program, PYTHONPATH=other_transformers)
    assert (done.returncode, done.stdout, done.stderr.count(WARNED)) == (0, "1\n", 1), done.stderr
    assert start("-W", "error", "-c", program, PYTHONPATH=other_transformers).stdout == "1\n"


def test_transformers_is_found_as_if_nobody_had_looked(start: Start, other_transformers: str) -> None:
    """By a loader of Python's own; what the module raises is its own, too."""
    program = "import mxrot, transformers.quantizers.auto as found; print(found.__loader__, found.__spec__.loader)"
    done = start("-c", program, PYTHONPATH=other_transformers)
    assert done.stdout.count("SourceFileLoader") == 2, done.stderr
    Path(other_transformers.split(os.pathsep)[0], "transformers/quantizers/auto.py").write_text("raise KeyError('own')")
    done = start("-c", program, PYTHONPATH=other_transformers)
    assert done.stderr.endswith("KeyError: 'own'\n") and WARNED not in done.stderr


TASK = """
task: letters
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {file}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_target: right
doc_to_choice: choices
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.mark.slow
def test_plain_lm_eval_scores_a_checkpoint(tmp_path: Path, start: Start) -> None:
    """As docs/tasks.md has it; of six questions, as many right as here."""
    from lm_eval.tasks import TaskManager

    from mxrot import api
    from mxrot.evaluation.tasks import score_tasks

    folder = tmp_path / "quantized"
    write(write_scorable_model(tmp_path / "tiny"), folder, recipe("hadamard"))
    rows = [f'{{"question": "{n} or", "choices": ["{n}{n}", "a", "b c"], "right": {n % 3}}}' for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "letters.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    options = f"--model hf --model_args pretrained={folder},dtype=float32 --device cpu --batch_size 4 --tasks letters"
    cache = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "home")}
    result = start("-m", "lm_eval", *options.split(), "--include_path", str(tmp_path), **cache)
    assert result.returncode == 0, result.stderr[-2000:]
    tasks = TaskManager(include_defaults=False, include_path=str(tmp_path)).load(["letters"])["tasks"]
    model = api.open_model(folder, "cpu")[0]
    expected = score_tasks(model, api.load_tokenizer(folder), tasks)["letters"].mean("acc")
    assert f"|{expected:.4f}|" in result.stdout
