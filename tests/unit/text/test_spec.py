from pathlib import Path

import pytest

from mxrot.errors import ConfigError
from mxrot.text.spec import Spec, exists, parse_spec


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("a.csv", "x=1.csv", "b:c.csv", "d@2", "lang=en/e.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "parsed"),
    {
        "a.csv": Spec("", "a.csv"),
        "n=a.csv": Spec("n", "a.csv"),
        "a.csv:col": Spec("", "a.csv", "col"),
        "n=a.csv:col@2": Spec("n", "a.csv", "col", 2.0),
        "n=a.csv:a=b:c": Spec("n", "a.csv", "a=b:c"),
        "a.csv@0.5": Spec("", "a.csv", None, 0.5),
        "a.csv@1e-3": Spec("", "a.csv", None, 0.001),
        "x=1.csv": Spec("", "x=1.csv"),
        "x=1.csv:col": Spec("", "x=1.csv", "col"),
        "n=x=1.csv:col": Spec("n", "x=1.csv", "col"),
        "b:c.csv": Spec("", "b:c.csv"),
        "b:c.csv:col": Spec("", "b:c.csv", "col"),
        "d@2": Spec("", "d@2"),
        "d@2@3": Spec("", "d@2", None, 3.0),
        "lang=en/e.csv:col": Spec("", "lang=en/e.csv", "col"),
        "demo": Spec("", "demo"),
        "n=demo@2": Spec("n", "demo", None, 2.0),
        "owner/name:config:train": Spec("", "owner/name:config:train"),
        "n=owner/name@2": Spec("n", "owner/name", None, 2.0),
        "nothing.csv:col": Spec("", "nothing.csv:col"),
        r"C:\texts\a.txt": Spec("", r"C:\texts\a.txt"),
        "a@b.csv": Spec("", "a@b.csv"),
    }.items(),
)
def test_parts(spec: str, parsed: Spec) -> None:
    assert parse_spec(spec) == parsed


@pytest.mark.parametrize("weight", ["0", "0.0", "1.2.3", ".", "1e999"])
def test_weights_that_are_none(weight: str) -> None:
    with pytest.raises(ConfigError, match="must be a positive number"):
        parse_spec(f"a.csv@{weight}")


def test_what_cannot_be_a_path_does_not_exist() -> None:
    assert exists("a.csv")
    for name in ("", "x" * 5000, "a\0b", "~nobody-by-this-name/x"):
        assert not exists(name)
