"""Texts as tokens: windows for calibration and for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mxrot.errors import ConfigError
from mxrot.models import find_model, read_config, start_token
from mxrot.opening import load_tokenizer
from mxrot.progress import Progress, silent
from mxrot.recipe import Recipe
from mxrot.text import Reader, Text, TokenWindows, Windows, load_texts, mixed_windows, read_windows, turns_of

FITTING_WINDOWS = 32
"""The maximum number of windows to fit a run-time transform. It has only a few numbers, fitted to many tokens each."""


@dataclass(frozen=True)
class Calibration:
    """Token windows and their origin."""

    windows: Tensor | None
    description: dict[str, Any] | None
    recipe: Recipe
    """The recipe with the number of windows that the text actually has, which may be smaller than the original number.
    """


def reader_for(config: Any, tokenizer: Any, embedding_rows: int | None = None) -> Reader:
    """The reader of texts for a model with this config. The embedding has the rows of the config, unless given."""
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
    """Calibration windows for a recipe. A recipe that needs no data gets none.

    `calib` is any value that `load_texts` accepts. `samples` and `seq_len` replace those of the recipe. Windows that
    were given as windows are all used, unless `samples` asks for fewer.
    """
    if recipe.is_data_free:
        return Calibration(None, None, recipe)
    texts = load_texts(calib, "calibration")
    reader = _reader_of(folder, texts)
    only = texts[0].content if len(texts) == 1 else None
    given = only.ids if isinstance(only, TokenWindows) else None
    if samples is None:
        samples = recipe.calibration.samples if given is None else len(given)
    if seq_len is None:
        seq_len = recipe.calibration.seq_len if given is None else given.shape[1]
    parts = mixed_windows(texts, reader, seq_len, samples, progress)
    windows = torch.cat([part.ids for part in parts])
    own = recipe.calibration.own + sum(part.to_write for part in parts)
    happened = replace(recipe.calibration, samples=len(windows), seq_len=seq_len, own=own)
    description = {
        "text": " + ".join(text.name for text in texts),
        "sha256": _digest(texts),
        "windows_asked": samples,
        "windows": len(windows),
        "seq_len": seq_len,
        "generated": happened.written(len(windows)),
        "texts": [part.as_table() | {"weight": part.text.weight} for part in parts],
    }
    if happened.writes and happened.chats:
        description["chat_template"] = turns_of(load_tokenizer(folder)) is not None
    return Calibration(windows, description, replace(recipe, calibration=happened))


def fitting_windows(
    folder: Path, calib: Any, seq_len: int, samples: int = FITTING_WINDOWS, progress: Progress = silent
) -> Tensor:
    """Token windows [W, T] to fit a transform to a model that does not change. `calib` is as for `calibrate`."""
    texts = load_texts(calib, "calibration")
    parts = mixed_windows(texts, _reader_of(folder, texts), seq_len, samples, progress)
    windows = torch.cat([part.ids for part in parts])
    if not len(windows):
        raise ConfigError("own: the model writes text only while it is quantized; give a text for what is fitted to it")
    return windows


def _reader_of(folder: Path, texts: Sequence[Text]) -> Reader:
    """A reader for the model in `folder`, with a tokenizer if the texts need one."""
    needs_tokenizer = any(text.needs_tokenizer for text in texts)
    return reader_for(read_config(folder), load_tokenizer(folder) if needs_tokenizer else None)


def _digest(texts: Sequence[Text]) -> str:
    """The digest of the text, or one digest of several texts."""
    digests = [text.digest for text in texts]
    return digests[0] if len(digests) == 1 else sha256("".join(digests).encode()).hexdigest()


def read_texts(
    model: PreTrainedModel | str | Path,
    text: Any = "demo",
    *,
    tokenizer: Any = None,
    windows: int | None = None,
    seq_len: int = 2048,
    progress: Progress = silent,
) -> list[Windows]:
    """The windows of each text as `evaluate` reads them, and what was left out. `evaluate` and `diverge` accept the
    result.

    For a model given by name, only the config and the tokenizer are read. ConfigError if a token is beyond its
    embedding.
    """
    loaded = texts_or_windows(text)
    needs_tokenizer = tokenizer is None and need_tokenizer(loaded)
    if isinstance(model, PreTrainedModel):
        if needs_tokenizer:
            raise TypeError("evaluate needs the tokenizer of a model that is passed itself")
        rows = cast(Any, model).get_input_embeddings().weight.shape[0]
        reader = reader_for(model.config, tokenizer, rows)
    else:
        folder = find_model(str(model))
        reader = reader_for(read_config(folder), load_tokenizer(folder) if needs_tokenizer else tokenizer)
    texts = [item for item in loaded if isinstance(item, Text)]
    return _evaluation_windows(texts, reader, windows, seq_len, progress) if texts else text


def texts_or_windows(text: Any) -> list[Text] | list[Windows]:
    """The texts that `text` stands for, or the windows that `read_texts` made of them."""
    if isinstance(text, list) and text and all(isinstance(item, Windows) for item in text):
        return text
    return load_texts(text, "evaluation")


def need_tokenizer(texts: Sequence[Text] | Sequence[Windows]) -> bool:
    """True if any text is not yet token ids."""
    return any(isinstance(text, Text) and text.needs_tokenizer for text in texts)


def _evaluation_windows(
    texts: Sequence[Text], reader: Reader, windows: int | None, seq_len: int, progress: Progress = silent
) -> list[Windows]:
    """The first `windows` windows of each text, or all of them. ConfigError if a text has a weight."""
    for item in texts:
        if item.weight != 1.0:
            raise ConfigError(
                f"{item.name}: a weight (@{item.weight:g}) is for calibration; each text is measured alone"
            )
    return [read_windows(item, reader, seq_len, windows, progress=progress) for item in texts]
