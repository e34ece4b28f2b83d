"""Models of the hub: nothing twice, a revision, and one line where the hub gives nothing. No network: its functions are
stand-ins."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import errors
from tests.cases.commands import mxrot, refused
from tests.tiny_model import write_tiny_model

COMMIT = "0123456789abcdef" * 2 + "01234567"
TWICE = (
    "consolidated.safetensors",
    "original/consolidated.00.pth",
    "pytorch_model.bin",
    "model-Q4.gguf",
    "onnx/model.onnx",
)


class Hub:
    """One repository, owner/tiny, with the weights in several layouts."""

    def __init__(self, root: Path) -> None:
        self.source, self.cache = write_tiny_model(root / "source"), root / "models--owner--tiny" / "snapshots" / COMMIT
        for name in TWICE:
            (self.source / name).parent.mkdir(exist_ok=True)
            (self.source / name).write_bytes(b"0" * 1000)
        self.asked: list[str | None] = []
        self.error: Exception | None = None

    @property
    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.source)) for path in self.source.rglob("*") if path.is_file())

    def snapshot_download(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        allow_patterns: Any = "*",
        ignore_patterns: Any = (),
        **_: Any,
    ) -> str:
        self._answer(repo_id, revision)
        for name in self.files:
            is_wanted = any(fnmatch(name, pattern) for pattern in allow_patterns)
            if is_wanted and not any(fnmatch(name, pattern) for pattern in ignore_patterns or ()):
                (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.source / name, self.cache / name)
        return str(self.cache)

    def hf_hub_download(self, repo_id: str, filename: str, *, revision: str | None = None, **_: Any) -> str:
        self._answer(repo_id, revision)
        self.cache.mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(self.source / filename, self.cache / filename))

    def model_info(self, repo_id: str, *, revision: str | None = None, **_: Any) -> Any:
        self._answer(repo_id, revision)
        siblings = [SimpleNamespace(rfilename=name, size=(self.source / name).stat().st_size) for name in self.files]
        return SimpleNamespace(siblings=siblings, sha=COMMIT)

    def _answer(self, repo_id: str, revision: str | None) -> None:
        assert repo_id == "owner/tiny"
        self.asked.append(revision)
        if self.error is not None:
            raise self.error


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    from mxrot.models import lookup

    stand_in = Hub(tmp_path)
    monkeypatch.setattr(lookup, "snapshot_download", stand_in.snapshot_download)
    monkeypatch.setattr(lookup, "hf_hub_download", stand_in.hf_hub_download)
    monkeypatch.setattr(
        "huggingface_hub.HfApi.model_info", lambda _, *names, **options: stand_in.model_info(*names, **options)
    )
    return stand_in


@pytest.mark.case("F15")
def test_weights_are_not_fetched_twice(hub: Hub, tmp_path: Path) -> None:
    result = mxrot("quantize", "owner/tiny", "-r", "rtn", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    got = {str(path.relative_to(hub.cache)) for path in hub.cache.rglob("*") if path.is_file()}
    assert got == set(hub.files) - set(TWICE)
    size = sum((hub.cache / name).stat().st_size for name in got)
    assert (
        f"Getting owner/tiny from the hub, unless it is here already: {len(got)} files, {size / 1e9:.2f} GB"
        in result.stderr
    )


@pytest.mark.case("F15")
def test_a_revision_is_asked_for_and_the_commit_is_recorded(hub: Hub, tmp_path: Path) -> None:
    text = tmp_path / "words.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 8)
    measured = ("--text", text, "--seq-len", "64")
    commands: list[tuple[str | Path, ...]] = [
        ("quantize", "owner/tiny", "-r", "rtn", "-o", tmp_path / "out"),
        ("plan", "owner/tiny", "-r", "rtn"),
        ("eval", "owner/tiny", *measured),
        ("compare", "owner/tiny", "--recipes", "rtn", *measured),
        ("inspect", "owner/tiny", *measured),
        ("generate", "owner/tiny", "ab", "--max-tokens", "2"),
    ]
    for words in commands:
        hub.asked.clear()
        result = mxrot(*words, "--revision", "v1.0")
        assert result.exit_code == 0, result.output
        assert set(hub.asked) == {"v1.0"}, words
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (run["model"], run["revision"]) == ("owner/tiny", COMMIT)
    assert f"`owner/tiny` at commit `{COMMIT}`" in (tmp_path / "out" / "README.md").read_text()
    hub.asked.clear()
    assert mxrot("eval", tmp_path / "out", "--against", "owner/tiny@v2", *measured).exit_code == 0
    assert set(hub.asked) == {"v2"}


@pytest.mark.case("F15")
@pytest.mark.parametrize("model", ["demo", "owner/tiny@v1", "{folder}"])
def test_a_revision_of_what_has_none_is_refused(tmp_path: Path, model: str) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    line = refused("eval", model.format(folder=folder), "--revision", "main")
    assert line.startswith("--revision main: needs a hub id")


def _http(kind: Any, status: int) -> Exception:
    try:
        import httpx2 as httpx
    except ImportError:
        import httpx
    request = httpx.Request("GET", "https://huggingface.co/api/models/owner/tiny")
    error: Exception = kind("no\nsecond line", response=httpx.Response(status, request=request))
    return error


def _unreachable() -> Exception:
    try:
        import httpx2 as httpx
    except ImportError:
        import httpx
    return httpx.ConnectError("no route to host")


REFUSALS = {
    "gated": (lambda: _http(errors.GatedRepoError, 403), "ask for access at https://huggingface.co/owner/tiny"),
    "a typo": (lambda: _http(errors.RepositoryNotFoundError, 404), "no such model on the hub; check the spelling"),
    "a revision": (lambda: _http(errors.RevisionNotFoundError, 404), "has no revision"),
    "not in the cache": (lambda: errors.LocalEntryNotFoundError("no"), "with `hf download owner/tiny`"),
    "offline": (lambda: errors.OfflineModeIsEnabled("no"), "with `hf download owner/tiny`"),
    "no connection": (_unreachable, "with `hf download owner/tiny`"),
    "a broken hub": (lambda: _http(errors.HfHubHTTPError, 500), "the hub did not give it: no"),
}


@pytest.mark.case("F15")
@pytest.mark.parametrize("kind", REFUSALS)
def test_what_the_hub_does_not_give_is_one_line(hub: Hub, tmp_path: Path, kind: str) -> None:
    make, said = REFUSALS[kind]
    hub.error = make()
    for words in (("quantize", "owner/tiny", "-o", tmp_path / "out"), ("plan", "owner/tiny"), ("eval", "owner/tiny")):
        line = refused(*words)
        assert line.startswith("owner/tiny: ") and said in line


@pytest.mark.case("F15", "F1")
def test_a_repository_without_weights_is_refused_before_it_is_fetched(hub: Hub, tmp_path: Path) -> None:
    (hub.source / "model.safetensors").unlink()
    for left, said in (("model-Q4.gguf", "llama.cpp"), ("consolidated.safetensors", "Mistral's own layout")):
        assert (hub.source / left).exists()
        assert said in refused("quantize", "owner/tiny", "-o", tmp_path / "out")
        (hub.source / left).unlink()
    (hub.source / "adapter_config.json").write_text("{}")
    assert "merge it first" in refused("eval", "owner/tiny")
    assert not hub.cache.exists()
