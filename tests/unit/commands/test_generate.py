"""mxrot generate: chat template, sampling, streaming, and options that would do nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cases.odd_tokenizers import TEMPLATE, change_tokenizer
from tests.tiny_model import write_tiny_model
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

from mxrot.cli import app
from mxrot.errors import ConfigError
from mxrot.models import read_config
from mxrot.prompting import Sampling, chat_ids
from mxrot.tokenizing import reader_for

LENGTH = ("--max-tokens", "12")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """One without a chat template, one with."""
    root = tmp_path_factory.mktemp("generate")
    plain = write_tiny_model(root / "plain")
    chats = change_tokenizer(write_tiny_model(root / "chats", vocab_size=300), TEMPLATE)
    transformers_logging.disable_progress_bar()
    yield str(plain), str(chats or root / "chats")
    transformers_logging.enable_progress_bar()


def run(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["generate", *words])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


def test_greedy_continues_the_prompt_and_streams_the_same(models: tuple[str, str]) -> None:
    whole = run(models[0], "One two", *LENGTH)
    assert whole.startswith("One two")
    assert run(models[0], "One two", *LENGTH, "--stream").rstrip("\n") == whole.rstrip("\n")


def test_sampling_is_that_of_the_seed(models: tuple[str, str]) -> None:
    def sampled(*options: str) -> str:
        return run(models[0], "One two", *LENGTH, "--temperature", "5", *options)

    assert sampled("--seed", "1") == sampled("--seed", "1") != sampled("--seed", "2")
    greedy = run(models[0], "One two", *LENGTH)
    assert sampled("--top-k", "1") == greedy == sampled("--top-p", "1e-6")
    assert sampled("--seed", "1") != greedy


def test_a_chat_prints_the_answer_alone(models: tuple[str, str]) -> None:
    answer = run(models[1], "One two", "--chat", *LENGTH)
    assert not answer.startswith("One two")
    assert answer != run(models[1], "One two", "--chat", "--system", "Be brief", *LENGTH)


def test_a_chat_is_the_template_of_the_tokenizer(models: tuple[str, str]) -> None:
    folder = Path(models[1])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = chat_ids("One two", "Be brief", reader_for(read_config(folder), tokenizer))
    turns = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "One two"}]
    assert tokenizer.decode(ids[0]) == tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)


def test_a_template_that_refuses_is_a_sentence(models: tuple[str, str]) -> None:
    folder = Path(models[1])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(ConfigError, match=r"the chat template refuses this .*no system message"):
        chat_ids("One", "Be brief", reader_for(read_config(folder), tokenizer))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--chat"], "the tokenizer has no chat template"),
        (["--system", "x"], "--system: needs --chat"),
        (["--top-p", ".5"], "--top-p: needs sampling"),
        (["--top-k", "5"], "--top-k: needs sampling"),
        (["--temperature", "1", "--top-p", "0"], "leaves no token to draw"),
    ],
)
def test_options_that_do_nothing_are_refused(models: tuple[str, str], options: list[str], says: str) -> None:
    assert says in run(models[0], "One", *options, code=2)


def test_greedy_takes_no_temperature() -> None:
    assert Sampling(top_p=0.5).options() == {"do_sample": False}
