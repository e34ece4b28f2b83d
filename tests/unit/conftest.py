from pathlib import Path

import pytest
from tests.tiny_model import write_tiny_model


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model folder; nobody writes into it."""
    return write_tiny_model(tmp_path_factory.mktemp("source") / "tiny")
