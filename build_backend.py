"""setuptools, with an editable install that does not break `import torch` when the checkout is gone.

Metadata of an editable install stays in the environment when its folder is removed, the entry point that torch calls
among it. So the module of that entry point is put beside the metadata, as in an ordinary install.
"""

from __future__ import annotations

from base64 import urlsafe_b64encode
from hashlib import sha256
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 # the hooks that stay as they are

KEPT = Path(__file__).parent / "src/mxrot_autoload.py"


def build_editable(wheel_directory: str, *settings: object) -> str:
    """Build the wheel of setuptools, and add the module to it; its name in that folder."""
    name: str = build_meta.build_editable(wheel_directory, *settings)
    wheel = Path(wheel_directory) / name
    with ZipFile(wheel) as archive:
        contents = {member: archive.read(member) for member in archive.namelist()}
    (record,) = (member for member in contents if member.endswith(".dist-info/RECORD"))
    kept = KEPT.read_bytes()
    digest = urlsafe_b64encode(sha256(kept).digest()).rstrip(b"=").decode()
    contents[KEPT.name] = kept
    contents[record] += f"{KEPT.name},sha256={digest},{len(kept)}\n".encode()
    with ZipFile(wheel, "w", ZIP_DEFLATED) as archive:
        for member, content in contents.items():
            archive.writestr(member, content)
    return name
