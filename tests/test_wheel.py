"""A wheel builds, holds what is not Python, and runs where nothing else of mxrot is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "-qq", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, with the setuptools that is here."""
    source = tmp_path_factory.mktemp("wheel") / "source"
    for name in ("src", "pyproject.toml", "build_backend.py", "README.md", "LICENSE"):
        place = ROOT / name
        (shutil.copytree if place.is_dir() else shutil.copy)(place, _made(source) / name)
    subprocess.run(
        [*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", str(source.parent), str(source)], check=True
    )
    (found,) = source.parent.glob("*.whl")
    return found


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


@pytest.mark.slow
def test_the_wheel_holds_what_is_not_python(wheel: Path) -> None:
    import mxrot

    names = ZipFile(wheel).namelist()
    assert wheel.name == f"mxrot-{mxrot.__version__}-py3-none-any.whl"
    sources = [path for path in (ROOT / "src/mxrot").rglob("*") if path.suffix in (".py", ".toml", ".html", ".typed")]
    assert {path.relative_to(ROOT / "src").as_posix() for path in sources} <= set(names)
    own = ("mxrot/", f"mxrot-{mxrot.__version__}.dist-info/", "mxrot_autoload.py")
    assert not [name for name in names if not name.startswith(own)] and own[-1] in names


def test_an_editable_install_keeps_what_torch_calls(tmp_path: Path) -> None:
    """Beside its metadata, not only in the checkout, which may be removed."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "build_backend.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("mxrot_autoload.py", "mxrot/__init__.py", "mxrot/version.py"):
        shutil.copy(ROOT / "src" / name, _made(_made(source / "src") / Path(name).parent))
    program = f"import build_backend; print(build_backend.build_editable({str(tmp_path)!r}))"
    built = subprocess.run([sys.executable, "-c", program], cwd=source, check=True, capture_output=True, text=True)
    wheel = ZipFile(tmp_path / built.stdout.split()[-1])
    assert wheel.testzip() is None and "mxrot/__init__.py" not in wheel.namelist()
    assert wheel.read("mxrot_autoload.py") == (ROOT / "src/mxrot_autoload.py").read_bytes()
    (record,) = (name for name in wheel.namelist() if name.endswith("/RECORD"))
    listed = {row.partition(",")[0] for row in wheel.read(record).decode().splitlines()}
    assert listed == set(wheel.namelist())


@pytest.mark.slow
def test_the_wheel_runs_in_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:
    """Its dependencies are those of this environment, found by their folder; mxrot is not: that is installed here by a
    finder, which a folder on a path does not bring along."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "fresh")], check=True)
    python = tmp_path / "fresh/bin/python"
    subprocess.run([*PIP, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], check=True)
    (site,) = (tmp_path / "fresh/lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*words: str) -> str:
        found = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert found.returncode == 0, found.stderr
        return found.stdout

    command = str(tmp_path / "fresh/bin/mxrot")
    home = run(str(python), "-c", "import mxrot; print(mxrot.__file__)")
    assert home.startswith(str(site))
    assert run(command, "--version").startswith("mxrot ")
    assert "duquant++" in run(command, "recipes")
    assert run(command, "recipes", "rtn").startswith('name = "rtn"')
    assert run(str(python), "-m", "mxrot", "recipes", "mxrot")
    page = "from importlib.resources import files; print((files('mxrot') / 'report/page.html').read_text())"
    assert "<html" in run(str(python), "-c", page)
