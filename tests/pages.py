"""What the README and docs/ tell a reader to run, and what stands for the models and data that they name."""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import typer
from tests.contracts.tiny_configs import config_of
from tests.tiny_model import write_tiny_model, write_tokenizer
from tests.unit.evaluation.task_folder import write_scorable_model, write_task_folder
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from mxrot.cli import app
from mxrot.models import FAMILIES

ROOT = Path(__file__).parent.parent
PAGES = [
    *("README.md", "CONTRIBUTING.md", "examples/README.md"),
    *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").glob("*.md"))),
]
PROGRAMS = ("mxrot", "torchrun", "python", "pip", "make", "vllm", "lm_eval", "accelerate", "scontrol", "sbatch", "hf")
"""An indented line is a command if it begins with one of these, behind variables and a folder of programs."""
_BEFORE = r"(?:[A-Z_]+=\S* +)*(?:\S+/bin/)?"
COMMAND = re.compile(rf"^ {{4,}}({_BEFORE}(?:if [^\n]*|(?:{'|'.join(PROGRAMS)}) (?:[^\n]*\\\n)*[^\n]*))$", re.MULTILINE)
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
WAITING = re.compile(r"<!-- ([a-z]+)\n(?: {4}mxrot[^\n]*\n)+-->\n")
"""A comment that holds a command waits for that command to come."""

COMMIT = "0123456789abcdef" * 2 + "01234567"
LLAMA: dict[str, Any] = {"max_position_embeddings": 4096, "head_dim": 32, "intermediate_size": 128}
OF_THE_HUB = (
    *("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B", "google/gemma-2-9b", "google/gemma-3-1b-it"),
    *("google/gemma-3-4b-it", "allenai/OLMo-1B-hf"),
)
FOLDERS = ("demo-model", "some/folder", "MODEL", "SmolLM2-135M")


@dataclass(frozen=True)
class Snippet:
    """Something to run: a command line, or Python."""

    kind: str
    """mxrot (also behind torchrun), python, or command for any other program."""
    text: str

    @property
    def words(self) -> list[str]:
        """Of a command of mxrot: what follows `mxrot`."""
        found = shlex.split(self.text, comments=True)
        return found[found.index("mxrot") + 1 :]


def shown(page: str) -> str:
    """What a reader sees of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    assert not set(WAITING.findall(text)) & set(commands()), f"{page}: a command that exists is commented out"
    return WAITING.sub("", text)


def snippets(page: str) -> list[Snippet]:
    """In the order of the page."""
    text = shown(page)
    fenced = [range(match.start(), match.end()) for match in FENCED.finditer(text)]
    found = [(match.start(), Snippet("python", match[1])) for match in PYTHON.finditer(text)]
    for match in COMMAND.finditer(text):
        if not any(match.start() in lines for lines in fenced):
            line = match[1].replace("\\\n", " ")
            is_ours = line.startswith("mxrot ") or (line.startswith("torchrun ") and " -m mxrot " in line)
            found.append((match.start(), Snippet("mxrot" if is_ours else "command", line)))
    return [snippet for _, snippet in sorted(found, key=lambda pair: pair[0])]


@cache
def commands() -> dict[str, typer.core.TyperCommand]:
    """mxrot's, by name."""
    group = typer.main.get_command(app)
    return group.commands  # type: ignore[attr-defined]


def write_hub(cache: Path) -> None:
    """A cache of the hub, as huggingface_hub lays it out, with a tiny model for each id that the pages name."""
    for name in OF_THE_HUB:
        folder = cache / f"models--{name.replace('/', '--')}"
        write_stand_in(folder / "snapshots" / COMMIT, name)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(COMMIT)


def write_stand_in(folder: Path, name: str) -> None:
    """A tiny random model of the architecture that the model of this name has."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "max_position_embeddings": 4096}
    if "gemma-3-4b" in name:
        config = config_of(FAMILIES["gemma3_with_images"], vocab_size=256)
        AutoModelForImageTextToText.from_config(config).half().save_pretrained(folder)
        write_tokenizer(folder)
    elif "gemma" in name:
        config = config_of(FAMILIES["gemma2" if "gemma-2" in name else "gemma3"], **sizes)
        AutoModelForCausalLM.from_config(config).half().save_pretrained(folder)
        write_tokenizer(folder)
    elif "OLMo" in name:
        tiny = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        more = {"architectures": ["OlmoForCausalLM"], "pad_token_id": 0, "eos_token_id": 0}
        AutoModelForCausalLM.from_config(AutoConfig.for_model("olmo", **sizes, **tiny, **more)).save_pretrained(folder)
        write_tokenizer(folder)
    elif name == "MODEL":
        write_scorable_model(folder)
    else:
        wide = {"hidden_size": 576, "num_attention_heads": 18} if name == "SmolLM2-135M" else {}
        write_tiny_model(folder, **LLAMA | wide)


def write_place(folder: Path) -> None:
    """Where the commands run: model folders, two texts, and the data of tasks."""
    for name in FOLDERS:
        write_stand_in(folder / name, name)
    for name, step in (("my-text.txt", 1), ("other-text.txt", 7)):
        lines = (f"the number {number} follows {number - step}; " for number in range(0, 250 * step, step))
        (folder / name).write_text("".join(lines))
    write_task_folder(folder / "task-data")


def copied(place: Path, to: Path) -> Path:
    """`to`, with what `write_place` has written."""
    shutil.copytree(place, to, dirs_exist_ok=True)
    return to
