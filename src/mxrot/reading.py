"""Texts as a model reads them: windows to calibrate on, and windows to evaluate on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxrot.errors import ConfigError
from mxrot.models import read_config, start_token
from mxrot.opening import load_tokenizer
from mxrot.pipeline import windows_to_write
from mxrot.progress import Progress, silent
from mxrot.recipe import Recipe
from mxrot.text import Reader, Text, TokenWindows, Windows, load_texts, mixed_windows, read_windows


@dataclass(frozen=True)
class Calibration:
    """Token windows, and where they came from."""

    windows: Tensor | None
    description: dict[str, Any] | None
    recipe: Recipe
    """The recipe with the windows that there are, which may be fewer than it asks for."""


def reader_for(config: Any, tokenizer: Any, embedding_rows: int | None = None) -> Reader:
    """What reads texts for the model of a config; the rows of its embedding are those of the config, unless given."""
    rows = config.get_text_config().vocab_size if embedding_rows is None else embedding_rows
    return Reader(tokenizer, start_token(config), rows)


def calibrate(
    folder: Path,
    recipe: Recipe,
    calib: Any = "demo",
    samples: int | None = None,
    seq_len: int | None = None,
    progress: Progress = silent,
) -> Calibration:
    """Calibration windows for a recipe; none for one that needs no data.

    `calib` is whatever `load_texts` takes. `samples` and `seq_len` replace those of the recipe; windows that were given
    as such are all taken, unless `samples` asks for fewer.
    """
    if recipe.is_data_free:
        return Calibration(None, None, recipe)
    texts = load_texts(calib, "calibration")
    reader = reader_for(read_config(folder), load_tokenizer(folder))
    only = texts[0].content if len(texts) == 1 else None
    given = only.ids if isinstance(only, TokenWindows) else None
    if samples is None:
        samples = recipe.calibration.samples if given is None else len(given)
    if seq_len is None:
        seq_len = recipe.calibration.seq_len if given is None else given.shape[1]
    parts = mixed_windows(texts, reader, seq_len, samples, progress)
    windows = torch.cat([part.ids for part in parts])
    happened = replace(recipe.calibration, samples=len(windows), seq_len=seq_len)
    each = recipe.calibration.generated
    description = {
        "text": " + ".join(text.name for text in texts),
        "sha256": _digest(texts),
        "windows_asked": samples,
        "windows": len(windows),
        "seq_len": seq_len,
        "generated": windows_to_write(each, len(windows)) if each else 0,
        "texts": [part.as_table() | {"weight": part.text.weight} for part in parts],
    }
    return Calibration(windows, description, replace(recipe, calibration=happened))


def _digest(texts: Sequence[Text]) -> str:
    """Of one text its own; of several one of theirs."""
    digests = [text.digest for text in texts]
    return digests[0] if len(digests) == 1 else sha256("".join(digests).encode()).hexdigest()


def evaluation_windows(
    text: Any, reader: Reader, windows: int | None, seq_len: int, progress: Progress = silent
) -> list[Windows]:
    """The first `windows` of each text, or all; `text` is whatever `load_texts` takes, or the result of this."""
    if isinstance(text, list) and text and all(isinstance(item, Windows) for item in text):
        return text
    loaded = load_texts(text, "evaluation")
    for item in loaded:
        if item.weight != 1.0:
            raise ConfigError(
                f"{item.name}: a weight (@{item.weight:g}) is for calibration; each text is measured alone"
            )
    return [read_windows(item, reader, seq_len, windows, progress=progress) for item in loaded]
