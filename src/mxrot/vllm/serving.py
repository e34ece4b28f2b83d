"""The command that serves a checkpoint: with vLLM if it is installed, otherwise with transformers.

Both have a server with the API of OpenAI. This module only chooses the server and its options, and says which code will
compute what. Neither server runs code that comes with a model.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

import torch

from mxrot.errors import ConfigError
from mxrot.kernels.warm_up import path_lines
from mxrot.models.positions import position_count
from mxrot.shell import command
from mxrot.vllm.devices import VERSION, arithmetic_of
from mxrot.vllm.facts import Facts
from mxrot.vllm.verdict import VllmReport, judge

PROGRAMS = ("auto", "vllm", "transformers")
WEIGHTS_SHARE = 0.7
"""The largest share of a GPU's memory for weights, when tensor parallelism is chosen here."""
_SERVER_PACKAGES = ("fastapi", "uvicorn", "openai", "pydantic")
_TRUST = "--trust-remote-code"
_GROUP, _PLUGIN = "vllm.general_plugins", "mxrot"
_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
_DTYPES = ("bfloat16", "float16")


@dataclass(frozen=True)
class Machine:
    """What is installed on this machine, and its devices."""

    vllm: str | None
    """The version of vLLM; None: it is not installed."""
    lacks: tuple[str, ...]
    """Missing packages that the server of transformers needs."""
    plugin_stop: str | None
    """Why vLLM would not find mxrot's plugin. None if it does."""
    gpu_bytes: tuple[int, ...]
    """The memory of each GPU."""
    capability: tuple[int, int] | None
    """The compute capability of the first GPU. (0, 0) if it is not from NVIDIA, None without a GPU."""
    autoloads: bool = True
    """True if `import torch` makes transformers recognize mxrot's checkpoints."""

    @staticmethod
    def here() -> Machine:
        """The machine that this program runs on."""
        try:
            vllm = version("vllm") if importlib.util.find_spec("vllm") else None
        except PackageNotFoundError:
            vllm = "unknown"
        lacks = tuple(name for name in _SERVER_PACKAGES if importlib.util.find_spec(name) is None)
        count = torch.cuda.device_count()
        sizes = tuple(torch.cuda.get_device_properties(index).total_memory for index in range(count))
        capability = torch.cuda.get_device_capability(0) if count else None
        capability = (0, 0) if count and torch.version.hip else capability
        autoloads = os.environ.get(_AUTOLOAD, "1") == "1" and bool(entry_points(group="torch.backends", name="mxrot"))
        return Machine(vllm, lacks, _plugin_stop(), sizes, capability, autoloads)

    @property
    def device(self) -> torch.device:
        """The device that computes linears."""
        return torch.device("cuda" if self.gpu_bytes else "cpu")


@dataclass(frozen=True)
class Wish:
    """What the user requests."""

    program: str = "auto"
    stock: bool = False
    """Stock vLLM runs the checkpoint, without the plugin."""
    tensor_parallel: int | None = None
    max_len: int | None = None
    more: tuple[str, ...] = ()
    """Options for the program, after all others."""


@dataclass(frozen=True)
class Server:
    """A command, and what it will do."""

    words: tuple[str, ...]
    lines: tuple[str, ...]
    """Which code computes what."""
    missing: str | None
    """Why it cannot be started here. None if it can."""

    @property
    def line(self) -> str:
        """The command as a line for a shell."""
        return command(*self.words)


def server_for(folder: Path, facts: Facts, wish: Wish, machine: Machine) -> Server:
    """The server of the checkpoint in `folder`. ConfigError, with what to do, if it cannot be served as requested."""
    if wish.program not in PROGRAMS:
        raise ConfigError(f"--program {wish.program}: expected one of {', '.join(PROGRAMS)}")
    _check_passed_on(wish.more)
    if wish.program == "transformers" or (wish.program == "auto" and machine.vllm is None):
        return _by_transformers(folder, facts, wish, machine)
    return _by_vllm(folder, facts, wish, machine)


def _by_vllm(folder: Path, facts: Facts, wish: Wish, machine: Machine) -> Server:
    report = judge(facts)
    with_plugin = _takes_plugin(folder, report, wish, machine)
    serving = report.plugin if with_plugin else report.stock
    size = _tensor_parallel(folder, serving.tensor_parallel, wish, machine)
    dtype = facts.dtype if with_plugin and facts.dtype in _DTYPES else "bfloat16"
    words = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder.resolve())]
    words += ["--served-model-name", folder.resolve().name, "--dtype", dtype, "--tensor-parallel-size", str(size)]
    length = position_count(facts.config) if wish.max_len is None else wish.max_len
    words += [] if length is None else ["--max-model-len", str(length)]
    words += [] if with_plugin else ["--quantization", "compressed-tensors"]
    lines = _plugin_lines(facts, machine) if with_plugin else _stock_lines(report, machine)
    missing = None if machine.vllm else "vLLM is not installed here"
    return Server((*words, *wish.more), (f"vLLM {machine.vllm or VERSION}, OpenAI-compatible", *lines), missing)


def _takes_plugin(folder: Path, report: VllmReport, wish: Wish, machine: Machine) -> bool:
    """True if the plugin runs the checkpoint. ConfigError if neither the plugin nor stock vLLM does."""
    if not wish.stock and not report.plugin.stops:
        if machine.plugin_stop is not None:
            raise ConfigError(f"{folder}: {machine.plugin_stop}; --stock leaves it to stock vLLM")
        return True
    stops = report.stock.stops
    if not stops and report.stock.needs_export:
        written = command("mxrot", "export", folder, "--to", "vllm", "-o", "OUT")
        raise ConfigError(f"{folder}: stock vLLM runs what `{written}` writes of it, not the folder itself")
    if stops:
        other = "" if wish.stock else "; --program transformers serves it"
        raise ConfigError(f"{folder}: vLLM does not run it: {stops[0]}{other}")
    if machine.gpu_bytes == () and machine.vllm is not None:
        raise ConfigError(f"{folder}: stock vLLM has no MXFP4 product for a CPU; leave out --stock")
    return False


def _tensor_parallel(folder: Path, sizes: tuple[int, ...], wish: Wish, machine: Machine) -> int:
    """The requested number of GPUs. By default, the fewest that hold the weights; 1 without a GPU."""
    said = ", ".join(map(str, sizes))
    count = len(machine.gpu_bytes)
    if wish.tensor_parallel is not None:
        if wish.tensor_parallel not in sizes:
            raise ConfigError(f"--tensor-parallel {wish.tensor_parallel}: {folder} can be shared by {said}")
        if 0 < count < wish.tensor_parallel:
            raise ConfigError(f"--tensor-parallel {wish.tensor_parallel}: there are {count} GPUs here")
        return wish.tensor_parallel
    if not count:
        return 1
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    room = WEIGHTS_SHARE * min(machine.gpu_bytes)
    for size in sizes:
        if size <= count and weights / size <= room:
            return size
    raise ConfigError(
        f"{folder}: {weights / 1e9:.1f} GB of weights on GPUs of {min(machine.gpu_bytes) / 1e9:.0f} GB want more of "
        f"them than the {count} here, or than it can be shared by ({said}); say --tensor-parallel to try all the same"
    )


def _by_transformers(folder: Path, facts: Facts, wish: Wish, machine: Machine) -> Server:
    for option, is_given in (
        ("--stock", wish.stock),
        ("--tensor-parallel", wish.tensor_parallel),
        ("--max-len", wish.max_len),
    ):
        if is_given:
            raise ConfigError(f"{option}: needs vLLM; the server of transformers has no such option")
    path = str(folder.resolve())
    if "@" in path or ":" in path:
        raise ConfigError(f"{path}: the server of transformers reads @ and : in a name otherwise; rename the folder")
    words = (sys.executable, "-m", "transformers.cli.transformers", "serve", path)
    lines = (
        f"transformers {version('transformers')}, OpenAI-compatible",
        *_own_lines(facts, machine),
        *_head_lines(facts),
    )
    lacks = " and ".join(machine.lacks)
    missing = f"its server needs {lacks}: pip install 'transformers[serving]'" if lacks else None
    if not machine.autoloads:
        missing = f"transformers would not know mxrot: install mxrot as a package, and leave {_AUTOLOAD} at 1"
    return Server((*words, *wish.more), lines, missing)


def _own_lines(facts: Facts, machine: Machine) -> Iterator[str]:
    """What mxrot's own code computes, in transformers and as the plugin of vLLM."""
    for one in facts.scheme.distinct:
        weights = one.weights.format.name
        if one.activations is None:
            yield f"weights {weights}, inputs as they are: weights are written out and multiplied"
            continue
        inputs = one.activations
        yield (
            f"weights {weights}, inputs {inputs.format.name} by rule {inputs.spelled_rule}, as accuracy was measured: "
            "the numbers that these codes stand for are multiplied exactly, and summed in float32"
        )
        if not (one.weights.is_mxfp4 and inputs.is_mxfp4):
            yield "  weights are written out and multiplied"
            continue
        yield from (f"  {line}" for line in path_lines(machine.device))


def _head_lines(facts: Facts) -> Iterator[str]:
    if facts.scheme.head is not None:
        yield f"the head: {facts.scheme.head.spelled}"


def _plugin_lines(facts: Facts, machine: Machine) -> Iterator[str]:
    yield "linears by mxrot's plugin, as mxrot.load computes them"
    yield from _own_lines(facts, machine)
    yield from _head_lines(facts)
    head = facts.scheme.head
    if head is not None and head.activations is None and facts.dtype == "float16":
        yield "  dequantized in each step, because its kernel takes bfloat16 only: -- --dtype bfloat16"


def _stock_lines(report: VllmReport, machine: Machine) -> Iterator[str]:
    found = arithmetic_of(machine.capability)
    yield f"linears by stock vLLM, as {VERSION} chooses:"
    yield f"  {found.device}: {found.computes}" + (f" ({found.note})" if found.note else "")
    yield from (f"  note: {note}" for note in report.notes)


def _plugin_stop() -> str | None:
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is not None and _PLUGIN not in chosen.split(","):
        return f"VLLM_PLUGINS={chosen} switches mxrot's plugin off"
    if not entry_points(group=_GROUP, name=_PLUGIN):
        return "mxrot is not installed as a package, so vLLM does not find its plugin"
    return None


def _check_passed_on(more: tuple[str, ...]) -> None:
    """ConfigError for an option after -- that lets code of a model run, in any spelling that vLLM accepts."""
    for word in more:
        name = word.split("=")[0].replace("_", "-")
        if len(name) > 3 and _TRUST.startswith(name):
            raise ConfigError(f"{word}: mxrot serves no model whose code would have to be trusted")
        if name == "--config" or (len(name) > 4 and "--config".startswith(name)):
            raise ConfigError(f"{word}: a file of options may trust a model's code; give the options themselves")
