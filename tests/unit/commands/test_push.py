"""mxrot push, with a hub that only notes what it is given."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_model import write_tiny_model
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

import mxrot
from mxrot.checkpoint import publishing
from mxrot.cli import app


class Hub:
    """What has been asked of it."""

    made: list[tuple[str, bool]]
    files: dict[str, bytes]

    def __init__(self) -> None:
        self.made, self.files, self.refuses = [], {}, False

    def create_repo(self, repository: str, private: bool, exist_ok: bool) -> None:
        if self.refuses:
            raise publishing.HTTP_ERROR("401 Client Error")
        self.made.append((repository, private))

    def create_commit(self, repository: str, operations: list[Any], commit_message: str) -> Any:
        for one in operations:
            content = one.path_or_fileobj
            self.files[one.path_in_repo] = content if isinstance(content, bytes) else Path(content).read_bytes()
        return type("Commit", (), {"commit_url": f"https://hub/{repository}/commit/1"})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(publishing, "HfApi", lambda: hub)
    return hub


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    transformers_logging.disable_progress_bar()
    mxrot.quantize(write_tiny_model(tmp_path / "tiny"), "hadamard", tmp_path / "out")
    transformers_logging.enable_progress_bar()
    return tmp_path / "out"


def push(*words: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["push", *map(str, words)])
    assert result.exit_code == code, result.output
    return result


def test_the_hub_gets_a_checkpoint_whose_hashes_are_right(checkpoint: Path, hub: Hub) -> None:
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    (checkpoint / "notes.txt").write_text("mine")
    result = push(checkpoint, "owner/tiny", "--private")
    assert hub.made == [("owner/tiny", True)] and "https://hub/owner/tiny/commit/1" in result.stdout
    assert hub.files.keys() == before.keys()
    listed = json.loads(hub.files["run.json"])["files"]
    assert {name: sha256(data).hexdigest() for name, data in hub.files.items() if name != "run.json"} == {
        name: entry["sha256"] for name, entry in listed.items()
    }
    card = hub.files["README.md"].decode()
    assert 'from_pretrained("owner/tiny")' in card and "path/to/this/folder" not in card
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.name != "notes.txt"} == before


def test_what_the_card_lacks_is_said(checkpoint: Path, hub: Hub) -> None:
    result = push(checkpoint, "owner/tiny", "--dry-run")
    assert [word in result.stderr for word in ("no base_model", "no license", "no figures")] == [True] * 3
    assert not hub.made and "files" in result.stdout


def test_damage_is_not_published(checkpoint: Path, hub: Hub) -> None:
    (checkpoint / "config.json").write_text((checkpoint / "config.json").read_text() + " ")
    assert "config.json" in push(checkpoint, "owner/tiny", code=2).stderr
    assert not hub.made and not hub.files


@pytest.mark.parametrize(
    ("folder", "name", "says"), [("", "a/b/c", "not the name of a repository"), ("tiny", "a/b", "not a folder")]
)
def test_what_cannot_be_published_is_one_line(checkpoint: Path, hub: Hub, folder: str, name: str, says: str) -> None:
    result = push(checkpoint.parent / folder if folder else checkpoint, name, code=2)
    assert says in result.stderr.splitlines()[-1] and not hub.made


def test_a_hub_that_refuses_is_one_line(checkpoint: Path, hub: Hub) -> None:
    hub.refuses = True
    assert "the hub refuses (401 Client Error" in push(checkpoint, "owner/tiny", code=2).stderr
