"""Anything that a person can type is one line and an exit code."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.cases.commands import mxrot, refused
from tests.tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("absurd") / "model")


@pytest.mark.case("D1")
@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("auto", "no device is called so; take cpu, or cuda"),
        ("tpu", "no device is called so; take cpu, or cuda"),
        ("gpu", "no device is called so; take cpu, or cuda"),
        ("CUDA", "did you mean 'cuda'?"),
        ("cdua", "did you mean 'cuda'?"),
        ("cuda:x", "no device is called so"),
        ("", "no device is called so; take cpu, or cuda"),
        ("\udcff", "no device is called so; take cpu, or cuda"),
        ("x" * 3000, "no device is called so; take cpu, or cuda"),
        ("cpu:1", "has no number"),
        ("cuda:99", "not usable here"),
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_devices(model: Path, device: str, said: str) -> None:
    line = refused("eval", model, "--device", device)
    assert said in line and len(line) < 400


@pytest.mark.case("D1")
def test_sites_that_are_not_there(model: Path, tmp_path: Path) -> None:
    made = mxrot("quantize", model, "-o", tmp_path / "made", "--recipe", "rtn", "--device", "cpu")
    assert made.exit_code == 0, made.output
    words = ("report", tmp_path / "made", "-o", tmp_path / "r.html", "--device", "cpu", "--site")
    assert "did you mean 'mlp.down_proj'" in refused(*words, "mlp.dwon_proj")
    assert "did you mean '0.mlp.down_proj'" in refused(*words, "0.mlp.down_prj")
    assert "mlp.down_proj" in refused(*words, "x" * 500)
    assert "did you mean 'vllm'" in refused("export", tmp_path / "made", "--to", "VLM")


@pytest.mark.case("F4")
@pytest.mark.parametrize("name", ["", " ", "~nobody-of-this-name/x", "a" * 300, "a" * 5000, "a\0b", "a/b/c"])
def test_names_of_models(name: str, tmp_path: Path) -> None:
    for command in ("eval", "plan", "inspect", "export"):
        assert len(refused(command, name)) < 6000


@pytest.mark.case("F4")
@pytest.mark.parametrize("name", ["", "~nobody-of-this-name/x", "a" * 5000, "a\0b", "/dev/null", "."])
def test_names_of_recipes(name: str, model: Path) -> None:
    assert len(refused("recipes", name)) < 500
    assert len(refused("plan", model, "--recipe", name)) < 500


@pytest.mark.case("A8")
@pytest.mark.parametrize("content", ["", "\0", "name = ", "a=" + "[" * 5000, "name='a'\nname='b'", "\ufeff"], ids=ascii)
def test_files_of_recipes(content: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(content, encoding="utf-8")
    assert refused("plan", "demo", "--recipe", file).startswith("mine.toml: ")
    file.write_text("name = 'a'\n[weights]\nformat = 'mxfp4'\n", encoding="utf-16")
    assert "not a text file in UTF-8" in refused("plan", "demo", "--recipe", file)


@pytest.mark.case("A8")
def test_a_recipe_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("name = 'a'\r\n[weights]\r\nformat = 'mxfp4'\r\n", encoding="utf-8-sig")
    assert mxrot("recipes", file).stdout.startswith('name = "a"')


@pytest.mark.case("A7")
@pytest.mark.parametrize("option", ["--json", "--output"])
def test_files_that_cannot_be_written_are_found_before_the_work(model: Path, tmp_path: Path, option: str) -> None:
    """No minute of work is lost to the name of its result."""
    words = ("eval", model) if option == "--json" else ("report", model)
    for place in (tmp_path, tmp_path / "no" / "x", tmp_path / ("x" * 300), "/proc/x"):
        said = refused(*words, "--device", "cpu", option, place)
        assert said.startswith(option) and len(said) < 800
    assert not list(tmp_path.iterdir())


@pytest.mark.case("D1")
@pytest.mark.parametrize("memory", ["inf", "1e300"])
def test_a_gpu_that_nobody_has(model: Path, memory: str) -> None:
    assert "--gpu-memory" in refused("plan", model, "--gpu-memory", memory)


@pytest.mark.case("D1")
def test_a_shape_that_fits_nowhere() -> None:
    assert "weights" in refused("bench", "kernels", "--device", "cpu", "--shape", "9" * 400 + "x32")
