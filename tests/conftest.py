"""Triton's interpreter where there is no GPU; and `--quick`, which runs a sample of every file."""

import importlib.util
import os
from collections import defaultdict

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    collect_ignore = ["vllm"]  # `make test-vllm` runs them where vLLM's Python code is

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # must be chosen before anything imports Triton

NOT_QUICK = ("slow", "demo", "gpu", "nightly")
"""Markers of tests that `--quick` leaves out."""
NOT_QUICK_PLACES = (
    *("cases", "faults", "oracles", "unit/bench", "unit/evaluation", "unit/report", "contracts/test_packages.py"),
    *("unit/test_api.py", "unit/test_autoload.py", "unit/test_cli.py", "unit/tuning/test_paths.py"),
    *("unit/calibration/test_world.py", "unit/planning/test_memory.py"),
    *("unit/checkpoint/test_huggingface.py", "unit/checkpoint/test_other_readers.py", "unit/checkpoint/test_resume.py"),
)
"""Their tests run commands, start processes, tune, or import what takes seconds."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick", action="store_true", help="of each test function the first case only, and nothing that takes long"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--quick"):
        return
    left_out = tuple(str(config.rootpath / "tests" / place) for place in NOT_QUICK_PLACES)
    functions: dict[tuple[str, str], list[pytest.Item]] = defaultdict(list)
    for item in items:
        takes_long = any(item.get_closest_marker(name) for name in NOT_QUICK) or str(item.path).startswith(left_out)
        if not takes_long:
            functions[str(item.path), getattr(item, "originalname", item.name)].append(item)
    kept = {cases[0] for cases in functions.values()}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]
