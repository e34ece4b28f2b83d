"""Data sets of the Hugging Face hub, through the package `datasets`."""

from __future__ import annotations

import re
from typing import Any

from mxrot.errors import ConfigError, DataError
from mxrot.text.document import Document, Origin
from mxrot.text.roles import Role, split_for
from mxrot.text.rows import Table, documents_of

KNOWN: dict[str, dict[str, Any]] = {
    "wikitext2": {
        "path": "Salesforce/wikitext",
        "name": "wikitext-2-raw-v1",
        "splits": {"calibration": "train", "evaluation": "test"},
    },
    "c4": {
        "path": "allenai/c4",
        "data_files": {
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
        "splits": {"calibration": "train[:2000]", "evaluation": "validation[:2000]"},
    },
}
"""Data sets with a short name, and the options to load them."""

_BETWEEN = re.compile(r":(?![^\[]*\])")
"""A colon outside of the brackets of a split slice, as in train[:1000]."""
_LONGEST_ID = 300
_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:.*)?", re.DOTALL)


def looks_like_id(place: str) -> bool:
    """True if it has the form NAME[:CONFIG[:SPLIT[:COLUMN]]]."""
    return _ID.fullmatch(place) is not None and not place.startswith((".", "-")) and len(place) <= _LONGEST_ID


def read_hub(place: str, role: Role) -> tuple[list[Document], Origin]:
    """The documents of a data set, by its short name or its id. If there are several splits, the one for the role is
    read.

    ConfigError if `datasets` is not installed, DataError if the hub does not provide the data.
    """
    if place in KNOWN:
        options = dict(KNOWN[place])
        split, column = options.pop("splits")[role], "text"
    else:
        parts = _BETWEEN.split(place)
        if len(parts) > 4:
            raise ConfigError(f"{place}: expected NAME[:CONFIG[:SPLIT[:COLUMN]]]")
        path, config, split, column = parts + [""] * (4 - len(parts))
        options = {"path": path} | ({"name": config} if config else {})
    loaded = _loaded(place, options | ({"split": split} if split else {}))
    if isinstance(loaded, dict):  # by split, also as datasets.DatasetDict
        loaded = loaded[split_for(role, loaded, place)]
    return documents_of(table_of(loaded, place), column or None)


def table_of(data: Any, where: str) -> Table:
    """The rows of a `datasets.Dataset`, or of any other iterable of rows."""
    names = getattr(data, "column_names", None)
    columns = tuple(names) if isinstance(names, (list, tuple)) else None
    return Table(where, list(data), columns=columns, can_name_column=False)


def _loaded(place: str, options: dict[str, Any]) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f"the data set {place} needs the package datasets: pip install 'mxrot[data]'") from error
    own = getattr(getattr(datasets, "exceptions", None), "DatasetsError", OSError)
    try:
        return datasets.load_dataset(**options)
    except (OSError, ValueError, KeyError, RuntimeError, own) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{place}: no such text file, and the hub did not give it: {first_line}") from error
