from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from mxrot.errors import FamilyError
from mxrot.models import find_config, find_model, lookup


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids that the hub would have been asked for."""
    asked: list[str] = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append(name)
        assert not any("bin" in pattern or "pt" in pattern or "py" in pattern for pattern in allow_patterns)
        raise LocalEntryNotFoundError("cannot reach the hub\nsecond line")

    monkeypatch.setattr(lookup, "snapshot_download", snapshot_download)
    return asked


def test_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_model(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert find_model(f"~/{tmp_path.name}") == tmp_path


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(FamilyError, match=r"model.gguf: is a file; GGUF files are for llama.cpp"):
        find_model(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "../no", "~/no", "no-such-model", "a/b/c", "a b/c"])
def test_what_is_neither_there_nor_an_id_never_reaches_the_hub(name: str, no_network: list[str]) -> None:
    with pytest.raises(FamilyError, match="no such model folder"):
        find_model(name)
    assert no_network == []


def test_an_id_that_the_hub_does_not_give(no_network: list[str]) -> None:
    with pytest.raises(FamilyError) as raised:
        find_model("owner/name")
    assert str(raised.value) == "owner/name: no such folder, and the hub did not give it: cannot reach the hub"
    assert no_network == ["owner/name"]


def test_demo_is_the_demo_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "demo_folder", lambda: tmp_path)
    assert find_model("demo") == tmp_path


def test_where_a_config_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[str]) -> None:
    """A folder, a file of any name, the demo model, or one file of the hub; nothing else of it is asked for."""
    file = tmp_path / "some.json"
    file.write_text("{}")
    monkeypatch.setattr(lookup, "demo_folder", lambda: tmp_path / "demo")
    monkeypatch.setattr(lookup, "hf_hub_download", lambda name, wanted: f"/cache/{name}/{wanted}")
    assert find_config(str(tmp_path)) == tmp_path
    assert find_config(str(file)) == file
    assert find_config("demo") == tmp_path / "demo"
    assert find_config("owner/name") == Path("/cache/owner/name/config.json")
    with pytest.raises(FamilyError, match="no such model folder"):
        find_config("./nothing")
    assert no_network == []
