"""Names are printed as they are, commands so that a shell takes them."""

from __future__ import annotations

import io
import shlex
from pathlib import Path

import pytest
from tests.cases.commands import mxrot, refused
from tests.tiny_model import write_tiny_model

ODD = "x[/b] [red]v2 :smile: & 'q'  two"
"""What rich reads as markup and an emoji, and a shell as several words."""
REFUSED = ("--set", 'ignore=["nothing"]', "--device", "cpu")
"""For `plan`, which measures no time for what would be refused."""


def printed_path(stdout: str) -> str:
    """The output folder in the first line of `mxrot quantize`."""
    return next(line for line in stdout.splitlines() if "blocks with" in line).partition(": ")[0]


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A model in a folder with an odd name, a checkpoint of it in another, and what was printed."""
    folder = tmp_path_factory.mktemp("odd")
    model = write_tiny_model(folder / f"model {ODD.replace('/', '-')}")
    output = folder / ODD.replace("/", "-")
    result = mxrot("quantize", model, "-o", output, "--recipe", "hadamard", "--device", "cpu")
    assert result.exit_code == 0, result.output
    return model, output, result.stdout


@pytest.mark.case("A8")
@pytest.mark.parametrize("name", ["x[/b]", "q[v2]", "[bold]", ":smile:", "a" * 120 + "/long"])
def test_an_output_is_printed_as_it_is(tmp_path: Path, name: str) -> None:
    model = write_tiny_model(tmp_path / "model")
    output = tmp_path / name
    result = mxrot("quantize", model, "-o", output, "--recipe", "rtn", "--device", "cpu", COLUMNS="80")
    assert result.exit_code == 0, repr(result.exception)
    assert printed_path(result.stdout) == str(output) and output.is_dir()


@pytest.mark.case("A8")
def test_titles_of_tables_are_in_one_piece(odd: tuple[Path, Path, str]) -> None:
    """With the path that was given, whatever the width of the terminal."""
    model, output, _ = odd
    few = ("--windows", "1", "--seq-len", "8", "--device", "cpu")
    for words, titles in (
        (("eval", output, *few), [f"Perplexity of {output}"]),
        (("eval", output, "--against", model, *few), [f"{output} against {model}; "]),
        (("compare", model, "--recipes", "rtn", *few), [f"{model}, windows of 8"]),
        (("plan", model, "--recipe", "rtn", *REFUSED), [f"{model} with rtn"]),
    ):
        result = mxrot(*words, COLUMNS="60")
        assert result.exit_code == (1 if "plan" in words else 0), result.output
        for title in titles:
            assert any(line.startswith(title) for line in result.stdout.splitlines()), result.stdout


@pytest.mark.case("A8")
def test_names_of_recipes_are_printed_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('name = "[/red] :smile:"\n[weights]\nformat = "mxfp4"\n')
    model = write_tiny_model(tmp_path / "model")
    few = ("--windows", "1", "--seq-len", "8", "--device", "cpu")
    result = mxrot("compare", model, "--recipes", f"rtn,{file}", *few)
    assert result.exit_code == 0 and "[/red] :smile:" in result.stdout, result.output
    planned = mxrot("plan", model, "--recipe", file, *REFUSED)
    assert planned.exit_code == 1 and "with [/red] :smile:" in planned.stdout, planned.output


@pytest.mark.case("A8")
def test_progress_is_shown_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from mxrot.progress import display as shown

    terminal = io.StringIO()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with shown.progress_on_stderr("Quantizing with [/red]") as told:
        told(0, 2, "model.[/b] :smile:")
        told(1, 2, "model.[/b] :smile:")
    assert "[/b] :smile:" in terminal.getvalue()


@pytest.mark.case("A8")
def test_an_error_keeps_the_spaces_of_a_path(tmp_path: Path) -> None:
    missing = tmp_path / "two  spaces [/b]"
    assert str(missing) in refused("eval", missing)


@pytest.mark.case("F7")
def test_the_next_commands_can_be_copied(odd: tuple[Path, Path, str]) -> None:
    _, output, stdout = odd
    measure, write = stdout.splitlines()[-2:]
    assert shlex.split(measure.removeprefix("next: ")) == ["mxrot", "eval", str(output)]
    assert shlex.split(write.removeprefix("  or: ")) == ["mxrot", "generate", str(output), "Once upon a time"]


@pytest.mark.case("F7")
def test_a_name_that_starts_with_a_hyphen_is_no_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_tiny_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    result = mxrot("quantize", model, "-o", "-x", "--recipe", "rtn", "--device", "cpu")
    assert result.exit_code == 0 and "next: mxrot eval ./-x\n" in result.stdout, result.output


@pytest.mark.case("F7")
def test_what_serves_an_export_can_be_copied(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    made = mxrot("quantize", model, "-o", tmp_path / "made", "--recipe", "rtn", "--device", "cpu")
    assert made.exit_code == 0, made.output
    output = tmp_path / ODD.replace("/", "-")
    result = mxrot("export", tmp_path / "made", "--to", "vllm", "-o", output)
    assert result.exit_code == 0, result.output
    line = next(line for line in result.stdout.splitlines() if "next: " in line)
    assert shlex.split(line.partition("next: ")[2]) == ["vllm", "serve", str(output)]
    assert line.startswith(f"{output}: written")


@pytest.mark.case("A8")
def test_a_path_that_is_not_utf_8(tmp_path: Path) -> None:
    """No reader of tokenizers takes it for a model; files may be called so."""
    model = write_tiny_model(tmp_path / "model")
    said = refused("quantize", model, "-o", tmp_path / "out \udcff", "--recipe", "rtn", "--device", "cpu")
    assert "not UTF-8" in said
    assert "not UTF-8" in refused("eval", tmp_path / "out \udcff") and "not UTF-8" in refused("plan", "a/\udcff")
    made = mxrot("quantize", model, "-o", tmp_path / "out", "--recipe", "rtn", "--device", "cpu")
    assert made.exit_code == 0, made.output
    few = ("--windows", "1", "--seq-len", "8", "--device", "cpu")
    page = tmp_path / "page \udcff.html"
    written = mxrot("report", tmp_path / "out", "-o", page, *few)
    assert written.exit_code == 0 and page.is_file(), written.output
    assert f"{page}: ".encode("utf-8", "surrogateescape") in written.stdout_bytes
    assert mxrot("eval", model, *few, "--json", tmp_path / "\udcff.json").exit_code == 0


NAME = "a [b](c) `d` <i> *e* | f"


@pytest.mark.case("A8")
def test_a_card_shows_names_as_they_are(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / NAME)
    recipe = tmp_path / "mine.toml"
    recipe.write_text('name = "[x](y)"\nsummary = "``` <b>"\n[weights]\nformat = "mxfp4"\n')
    made = mxrot("quantize", model, "-o", tmp_path / "out", "--recipe", recipe, "--device", "cpu")
    assert made.exit_code == 0, made.output
    card = (tmp_path / "out" / "README.md").read_text()
    title = next(line for line in card.splitlines() if line.startswith("# "))
    assert title == r"# a \[b\](c) \`d\` \<i\> \*e\* \| f, quantized to mxfp4 weights and 16-bit activations " + (
        r"with mxrot (\[x\](y))"
    )
    assert f"the folder ``{NAME}``" in card
    assert "````toml\n" in card, "a fence that the summary does not close"


@pytest.mark.case("A8")
def test_one_name_for_two_things_is_found_before_the_work(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    place = tmp_path / "out"
    assert "also the output folder" in refused("quantize", model, "-o", place, "--recipe", "rtn", "--json", place)
    assert not place.exists()
