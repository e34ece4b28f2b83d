"""A text by its name on the command line."""

from __future__ import annotations

from pathlib import Path

from mxrot.errors import DataError
from mxrot.nearest import nearest
from mxrot.shell import expanded
from mxrot.text.contents import check_regular, unpacked_name
from mxrot.text.demo import demo_text
from mxrot.text.document import Document, Origin, Own, Text
from mxrot.text.files import is_known, read_file, read_folder
from mxrot.text.hub import KNOWN, looks_like_id, read_hub
from mxrot.text.roles import Role
from mxrot.text.spec import Spec, exists, parse_spec

DEMO = "demo"
OWN = "own"
"""The name for text that the quantized model writes itself."""
_OF_OTHER_FILES = {
    *(".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub", ".htm", ".html", ".xml", ".xls", ".xlsx", ".yaml", ".yml"),
    *(".zip", ".tar", ".tgz", ".7z", ".rar", ".pkl", ".pt", ".pth", ".bin", ".npy", ".npz", ".gguf", ".safetensors"),
    *(".py", ".toml", ".gz", ".bz2", ".xz", ".zst"),
}
"""Suffixes that no data set name has."""


def load_text(spec: str, role: Role) -> Text:
    """The text that `spec`, [NAME=]PLACE[:COLUMN][@WEIGHT], names. `demo` and data sets have a part for each role.
    `own` is for calibration alone.

    DataError if it does not exist, cannot be read, or is empty. ConfigError if a required package is missing.
    """
    if not spec.strip():
        raise DataError("a text without a name; expected a file, a folder, a data set of the hub or demo")
    parsed = parse_spec(spec)
    if parsed.place == OWN:
        return _own_text(parsed, role)
    documents, origin = _read(parsed, role)
    return make_text(parsed.name or _own_name(parsed.place), documents, origin, parsed.weight, parsed.place)


def _own_text(spec: Spec, role: Role) -> Text:
    if role != "calibration":
        raise DataError(f"{OWN}: is what a model writes while it is quantized, to calibrate on; give a text")
    return Text(spec.name or OWN, Own(), 1.0 if spec.weight is None else spec.weight)


def make_text(name: str, documents: list[Document], origin: Origin, weight: float | None, where: str) -> Text:
    """A text of these documents. DataError, with `where`, if they are empty."""
    first = documents[0] if documents else ""
    content = first if len(documents) < 2 and isinstance(first, str) else tuple(documents)
    text = Text(name, content, 1.0 if weight is None else weight, origin)
    if text.is_empty:
        raise DataError(f"{where}: the text is empty")
    return text


def names_something(spec: str) -> bool:
    """True if it is the name of a text, known or existing, and not a text itself."""
    place = parse_spec(spec).place
    return place in (DEMO, OWN, *KNOWN) or exists(place)


def looks_like_file(place: str) -> bool:
    """True for one line that ends in the suffix of a text file."""
    return "\n" not in place and len(place) < 1000 and is_known(Path(place))


def _read(spec: Spec, role: Role) -> tuple[list[Document], Origin]:
    place = spec.place
    if place == DEMO:
        return [demo_text(role)], Origin()
    if exists(place):
        path = expanded(place)
        if path.is_dir():
            return read_folder(path, role, spec.column)
        check_regular(path)
        return read_file(path, spec.column)
    if place in KNOWN or _may_be_on_hub(place):
        return read_hub(place, role)
    if "://" in place:
        raise DataError(f"{place}: is a web address; download it, and name the file")
    known = [DEMO, OWN, *KNOWN]
    near = nearest(place, known)
    hint = f"did you mean {near[0]}?" if near else f"known names: {', '.join(known)}"
    raise DataError(f"{place}: no such text file ({hint})")


def is_fetched(spec: str) -> bool:
    """True if it will be fetched from the hub."""
    place = parse_spec(spec).place
    return place not in (DEMO, OWN) and not exists(place) and (place in KNOWN or _may_be_on_hub(place))


def _may_be_on_hub(place: str) -> bool:
    """True if it has the form of an id, and is neither like a file name nor close to a known name."""
    first = place.split(":")[0]
    if "://" in place or not looks_like_id(place) or looks_like_file(first):
        return False
    if Path(first).suffix.lower() in _OF_OTHER_FILES:
        return False
    return not nearest(place, [DEMO, *KNOWN]) or ":" in place


def _own_name(place: str) -> str:
    """The name of a text without a given one. For files, it is the file name without its suffix."""
    if not exists(place):
        return place
    path = expanded(place)
    return path.name if path.is_dir() else Path(unpacked_name(path)).stem
