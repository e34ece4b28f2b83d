from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from mxrot.errors import FamilyError
from mxrot.models import find_config, find_model, lookup


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids that the hub would have been asked for."""
    asked: list[str] = []

    def snapshot_download(
        name: str, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        asked.append(name if revision is None else f"{name} at {revision}")
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


@pytest.mark.parametrize(("name", "asked"), [("owner/name", "owner/name"), ("owner/name@v1", "owner/name at v1")])
def test_an_id_that_the_hub_does_not_give(no_network: list[str], name: str, asked: str) -> None:
    with pytest.raises(FamilyError) as raised:
        find_model(name)
    message = str(raised.value)
    assert message.startswith(f"{name}: no such folder, it is not in the cache of the hub, and ")
    assert message.endswith("get it where there is a connection, with `hf download owner/name`")
    assert no_network == [asked]


REPOSITORY = [
    *("config.json", "tokenizer.json", "tokenizer.model", "README.md", "LICENSE", "chat_template.jinja"),
    *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"),
    "additional_chat_templates/tool.jinja",
]
TWICE = [
    *("consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "consolidated.safetensors.index.json"),
    *("original/consolidated.00.pth", "original/params.json", "pytorch_model-00001-of-00002.bin", "model-Q4.gguf"),
    *("onnx/model.onnx", "fp32/model.safetensors", "modeling_evil.py", "tf_model.h5", "training_args.bin"),
]


def test_what_is_downloaded() -> None:
    assert [file for file in REPOSITORY + TWICE if lookup.is_wanted(file)] == REPOSITORY


def test_patterns_mean_the_same_to_the_hub() -> None:
    found = list(
        filter_repo_objects(REPOSITORY + TWICE, allow_patterns=lookup._WANTED, ignore_patterns=lookup._UNWANTED)
    )
    assert found == REPOSITORY


def test_the_commit_of_a_folder_of_the_cache(tmp_path: Path) -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    folder = tmp_path / "models--owner--name" / "snapshots" / commit
    assert lookup.commit_of(folder) == commit
    assert lookup.commit_of(tmp_path / commit) is None and lookup.commit_of(folder.parent / "main") is None


def test_demo_is_the_demo_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "demo_folder", lambda: tmp_path)
    assert find_model("demo") == tmp_path


def test_where_a_config_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[str]) -> None:
    """A folder, a file of any name, the demo model, or one file of the hub; nothing else of it is asked for."""
    file = tmp_path / "some.json"
    file.write_text("{}")
    monkeypatch.setattr(lookup, "demo_folder", lambda: tmp_path / "demo")
    monkeypatch.setattr(lookup, "hf_hub_download", lambda name, wanted, revision: f"/cache/{name}/{revision}/{wanted}")
    assert find_config(str(tmp_path)) == tmp_path
    assert find_config(str(file)) == file
    assert find_config("demo") == tmp_path / "demo"
    assert find_config("owner/name") == Path("/cache/owner/name/None/config.json")
    assert find_config("owner/name@v1") == Path("/cache/owner/name/v1/config.json")
    with pytest.raises(FamilyError, match="no such model folder"):
        find_config("./nothing")
    assert no_network == []
