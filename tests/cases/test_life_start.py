"""What answers at once, without torch; and interrupts, from the first moment on."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.tiny_model import write_tiny_model

COMMAND = [sys.executable, "-c", "from mxrot.cli import main; main()"]
SHOWS_TORCH = """
import sys
sys.argv = ["mxrot", *sys.argv[1:]]
try:
    from mxrot.cli import main
    main()
finally:
    print("loaded:", sorted({"torch", "transformers"} & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.case("F13")
def test_import_mxrot_imports_nothing_that_takes_longer_than_itself() -> None:
    slow = {"torch", "typing", "pathlib", "re", "importlib.metadata"}
    program = f"import sys; before = set(sys.modules); import mxrot; print({slow} & set(sys.modules) - before)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.case("F13")
@pytest.mark.parametrize(
    ("words", "exit_code", "expected"),
    [
        ("--help", 0, "quantize"),
        ("-h", 0, "quantize"),
        ("quantize --help", 0, "--recipe"),
        ("bench kernels --help", 0, "--rows"),
        ("--version", 0, "mxrot 0."),
        ("recipes", 0, "duquant++"),
        ("recipes mxrot", 0, 'method = "moments"'),
        ("", 2, "quantize"),
        ("quantise", 2, "Did you mean 'quantize'?"),
        ("quantize --recipie x", 2, "--recipe"),
        ("eval --windows none", 2, "--windows"),
        ("recipes mxrto", 2, "did you mean 'mxrot'?"),
    ],
)
def test_answers_without_torch(words: str, exit_code: int, expected: str) -> None:
    found = subprocess.run([sys.executable, "-c", SHOWS_TORCH, *words.split()], capture_output=True, text=True)
    assert found.returncode == exit_code, found.stderr
    assert expected in found.stdout + found.stderr
    assert "loaded: []" in found.stderr and "Traceback" not in found.stderr


@pytest.mark.case("F13")
def test_python_dash_m() -> None:
    for module in ("mxrot", "mxrot.cli"):
        found = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True)
        assert found.returncode == 0 and found.stdout.startswith("mxrot 0."), found.stderr


@pytest.mark.case("F13")
def test_recipes_take_less_than_half_of_the_time_of_torch() -> None:
    """In seconds of the processor, the least of three: other programs run beside."""

    def seconds(*words: str) -> float:
        def once() -> float:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, *words], capture_output=True, check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

        return min(once() for _ in range(3))

    assert seconds("-m", "mxrot.cli", "recipes") < seconds("-c", "import torch") / 2


def interrupted(after: float, number: int, *words: str) -> tuple[int, list[str]]:
    """Exit code and lines of a command that gets a signal so many seconds after its first line of Python ran."""
    program = "import os, signal; os.write(1, b'.'); from mxrot.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    os.read(process.stdout.fileno(), 1)
    time.sleep(after)
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1]
    return process.returncode, errors.splitlines()


@pytest.mark.case("G15")
@pytest.mark.parametrize("after", [0.05, 0.1, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_modules_are_imported(tmp_path: Path, after: float, number: int) -> None:
    words = ("quantize", "demo", "-o", str(tmp_path / "out"), "--samples", "2", "--seq-len", "64")
    code, lines = interrupted(after, number, *words)
    assert code == (143 if number == signal.SIGTERM else 1)
    assert not [line for line in lines if "Traceback" in line or "ignored" in line], lines
    assert [line for line in lines if line.startswith("mxrot: error: ")] == lines[-1:]
    assert lines[-1].startswith("mxrot: error: interrupted")
    assert not (tmp_path / "out").exists()


@pytest.mark.case("G15")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_that_end_a_run_keep_its_finished_blocks(tmp_path: Path, name: str) -> None:
    model = write_tiny_model(tmp_path / "deep", num_hidden_layers=60)
    (tmp_path / "text.txt").write_text("".join(f"the number {number}; " for number in range(3000)))
    words = [
        "quantize",
        str(model),
        "-o",
        str(tmp_path / "out"),
        "--recipe",
        "duquant++",
        "--set",
        "transform.steps=512",
    ]
    words += ["--samples", "8", "--seq-len", "256", "--calib", str(tmp_path / "text.txt")]
    process = subprocess.Popen([*COMMAND, *words], stderr=subprocess.PIPE, text=True)
    first = tmp_path / "out.partial" / "block-00000.json"
    deadline = time.monotonic() + 60
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(getattr(signal, name))
    process.send_signal(getattr(signal, name))  # as a wrapper does that hands it on
    lines = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == (143 if name == "SIGTERM" else 1), lines
    own = [line for line in lines if not line.startswith("Quantizing with duquant++: ")]
    by = "" if name == "SIGINT" else f" by {name}"
    assert len(own) == 1 and own[0].startswith(f"mxrot: error: interrupted{by}; finished blocks are kept"), lines
    assert first.exists() and not (tmp_path / "out").exists()


@pytest.mark.case("G15")
def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """As nohup leaves SIGHUP."""
    program = (
        "import os, signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); from mxrot.cli import main;"
        "import mxrot.commands.app as a; a.app = lambda **_: os.kill(os.getpid(), signal.SIGHUP); main(); print('on')"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "on\n")
