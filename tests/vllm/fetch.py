"""Put the Python files of vLLM's wheel into a folder: nothing compiled, a sixth of the size.

python tests/vllm/fetch.py FOLDER
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSION = "0.32.0"
_WHEEL = ("--platform", "manylinux_2_28_x86_64", "--abi", "abi3", "--implementation", "cp", "--python-version", "3.12")
_KEPT = (".py", ".json", "METADATA")


def fetch(folder: Path) -> None:
    """Download the wheel with pip, unpack what is kept, and let the wheel go."""
    with tempfile.TemporaryDirectory() as download:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", *_WHEEL]
        subprocess.run([*command, "--dest", download, f"vllm=={VERSION}"], check=True)
        (wheel,) = Path(download).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.endswith(_KEPT)])


if __name__ == "__main__":
    fetch(Path(sys.argv[1]))
