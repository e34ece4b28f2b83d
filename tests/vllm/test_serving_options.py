"""vLLM's own parser takes what `mxrot serve` gives it."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from mxrot.vllm.facts import Facts
from mxrot.vllm.serving import Machine, Wish, server_for


@pytest.fixture
def parser(monkeypatch: pytest.MonkeyPatch) -> Any:
    watchfiles = ModuleType("watchfiles")  # not installed, and not needed to parse
    watchfiles.Change = watchfiles.awatch = None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "watchfiles", watchfiles)
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser())


@pytest.mark.parametrize(("kind", "stock"), [("block", False), ("plain", True)])
def test_vllm_parses_the_command(kind: str, stock: bool, checkpoint: Any, parser: Any) -> None:
    folder = checkpoint(kind)
    machine = Machine("0.32.0", (), None, (80 * 10**9,) if stock else (), (9, 0) if stock else None)
    words = server_for(folder, Facts.written(folder), Wish(stock=stock, more=("--port", "81")), machine).words
    found = parser.parse_args(list(words[4:]))
    assert (found.model_tag, found.served_model_name, found.port) == (str(folder), [kind], 81)
    assert (found.dtype, found.tensor_parallel_size, found.trust_remote_code) == ("bfloat16", 1, False)
    assert found.quantization == ("compressed-tensors" if stock else None)


def test_vllm_takes_shortened_options_so_these_are_refused_too(parser: Any) -> None:
    assert parser.parse_args(["model", "--trust-rem"]).trust_remote_code
