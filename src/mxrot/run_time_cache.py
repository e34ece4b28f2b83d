"""A quantized cache that is requested when a model is opened. The model may be an original or a checkpoint.

Nothing is folded into weights. Keys and values are multiplied by the transform at run time, and queries and head
outputs by the inverse. The cache can therefore be switched on and off, and one model can be compared under several
caches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedModel

from mxrot.errors import ConfigError, MxrotError
from mxrot.formats import FORMATS, CacheScheme, CacheTransform
from mxrot.layers import QuantLinear, operands_of, quantize_cache, restore_cache
from mxrot.layers.cache_size import cache_of
from mxrot.marker import MARKER
from mxrot.models import Family, find_family, find_model, quantized_by, read_config, value_heads
from mxrot.nearest import not_known
from mxrot.opening import open_model
from mxrot.progress import Progress, silent
from mxrot.quantizing.cache import fit_cache
from mxrot.quantizing.problems import heads_problem
from mxrot.sections import QuantizerChoice
from mxrot.tokenizing import fitting_windows
from mxrot.transforms.orders import factors_of

NAMES = {"mxfp8": "mxfp8_e4m3", "int4": "int4_row_asym", "int2": "int2_g32_asym"}
"""Short names of formats, for users who do not need the full names."""
NOTHING = "none"
"""Used in place of a format: keys and values are not quantized."""
Transform = Literal["none", "hadamard", "second-moment"]
_NO_ATTENTION = "the operands of its attention's products are quantized, and no attention does both"
_INSTALLED: dict[str, CacheTransform] = {"none": "none", "hadamard": "hadamard", "second-moment": "stored"}


@dataclass(frozen=True)
class RunTimeCache:
    """The requested cache."""

    keys: str | None
    """The full name of the format of keys, with its default rule; None: keys and values are not quantized."""
    values: str | None
    transform: Transform = "hadamard"
    first: int = 0
    """Tokens at the start of a sequence that are read in 16 bits."""
    last: int = 0
    """The newest tokens, the query's own included, that each query reads in 16 bits."""

    @staticmethod
    def of(format: str, transform: str = "hadamard", first: int = 0, last: int = 0) -> RunTimeCache:
        """The cache for names as a user types them: one format, or KEYS/VALUES. ConfigError for unknown names, and for
        formats that a cache cannot have."""
        if format == NOTHING:
            return RunTimeCache(None, None, "none")
        keys, slash, values = format.partition("/")
        full = [NAMES.get(name, name) for name in ((keys, values) if slash else (keys, keys))]
        for name in full:
            if name not in FORMATS:
                raise ConfigError(f"--kv: {not_known('format', name, [*NAMES, NOTHING, *FORMATS])}")
        if transform not in _INSTALLED:
            raise ConfigError(f"--kv-transform: {not_known('transform', transform, _INSTALLED)}")
        found = RunTimeCache(full[0], full[1], transform, first, last)  # type: ignore[arg-type]
        try:
            _ = found.scheme
        except ConfigError as error:
            raise ConfigError(f"--kv {format}: {error}") from error
        return found

    @property
    def scheme(self) -> CacheScheme | None:
        """The scheme that is installed."""
        if self.keys is None or self.values is None:
            return None
        keys, values = (QuantizerChoice(name).for_inputs() for name in (self.keys, self.values))
        transform = _INSTALLED[self.transform]
        return CacheScheme(keys, values, self.first, self.last, transform, transform)

    @property
    def needs_text(self) -> bool:
        """True if the transform is fitted to keys and values."""
        return self.transform == "second-moment"

    @property
    def label(self) -> str:
        """A short description: "mxfp4 hadamard", "mxfp8/int4 first 16 last 128"."""
        if self.keys is None or self.values is None:
            return "16 bit"
        parts = [self.formats, *([self.transform] if self.transform != "none" else [])]
        parts += [f"{name} {count}" for name, count in (("first", self.first), ("last", self.last)) if count]
        return " ".join(parts)

    @property
    def formats(self) -> str:
        """The formats as a user types them."""
        short = {full: name for name, full in NAMES.items()}
        return "/".join(dict.fromkeys(short.get(str(name), str(name)) for name in (self.keys, self.values)))

    def problems(self, config: Any, family: Family, where: str) -> Iterator[MxrotError]:
        """Reasons why a model with this config cannot have the cache. No weight is read."""
        if self.scheme is None:
            return
        if family.heads_obstacle is not None:
            yield heads_problem(f"{where}: --kv {self.formats}", family, f"take --kv {NOTHING}")
            return
        width, block = value_heads(config.get_text_config())[1], self.scheme.head_block
        if width % block:
            yield ConfigError(
                f"{where}: --kv {self.formats}: heads are {width} wide, which is not a multiple of {block}, as it "
                "needs; take another, such as int4"
            )
        if self.transform != "none":
            try:
                factors_of(width)
            except ConfigError as error:
                yield ConfigError(
                    f"{where}: --kv-transform {self.transform}: {error}, which the width of a head is; take "
                    "--kv-transform none"
                )
        if self.needs_text and not family.names_values:
            yield ConfigError(
                f"{where}: --kv-transform second-moment: is fitted to the weights that read values, and family "
                f"{family.name} does not name them; take hadamard"
            )
        if "attention" in _marker(config):
            yield ConfigError(f"{where}: --kv {self.formats}: {_NO_ATTENTION}")
        if self.needs_text and quantized_by(config) is not None:
            yield ConfigError(
                f"{where}: --kv-transform second-moment: is fitted to the weights that read values, which are "
                'quantized here; take hadamard, or quantize the original with cache.transform = "second_moment"'
            )


def _marker(config: Any) -> dict[str, Any]:
    """The marker in a checkpoint of mxrot. Empty for other models."""
    table = getattr(config, "quantization_config", None)
    found = table.get(MARKER) if isinstance(table, dict) else None
    return found if isinstance(found, dict) else {}


def check_cache(cache: RunTimeCache, model: str) -> None:
    """ConfigError if a model, given by name, cannot have this cache. Only its config is read."""
    config = read_config(find_model(model))
    for problem in cache.problems(config, find_family(config, model), model):
        raise problem


def set_cache(
    model: PreTrainedModel, cache: RunTimeCache, windows: Tensor | None = None, progress: Progress = silent
) -> CacheScheme | None:
    """Set how a model keeps keys and values from now on. Returns the scheme that it had before.

    `windows` [W, T] of token ids are the text for a transform that is fitted. ConfigError if the model cannot have this
    cache.
    """
    name = str(model.name_or_path or type(model).__name__)
    family = find_family(model.config, name)
    for problem in cache.problems(model.config, family, name):
        raise problem
    attentions = family.attentions(model)
    scheme = cache.scheme
    if scheme is not None and any(operands_of(attention) is not None for attention in attentions):
        raise ConfigError(f"{name}: --kv {cache.formats}: {_NO_ATTENTION}")
    if cache.needs_text and any(isinstance(module, QuantLinear) for module in model.modules()):
        raise ConfigError(f"{name}: --kv-transform second-moment: is fitted to weights that are not quantized")
    if cache.needs_text and windows is None:
        raise ConfigError(f"{name}: --kv-transform second-moment: is fitted on a text, and none was given")
    before = cache_of(model)
    for attention in attentions:
        restore_cache(attention)
    if scheme is not None and windows is not None and cache.needs_text:
        fit_cache(model, family, windows, scheme)
    elif scheme is not None:
        heads, width = value_heads(model.config.get_text_config())
        for attention in attentions:
            quantize_cache(attention, scheme, width, heads)
    return before


def open_with_cache(
    name: str,
    cache: RunTimeCache | None,
    device: str | None = None,
    verify: bool | None = None,
    calib: Any = (),
    seq_len: int = 2048,
    progress: Progress = silent,
) -> tuple[PreTrainedModel, Path, CacheScheme | None]:
    """A model with the cache, ready to run, its folder, and the scheme that the cache replaces, if it had one."""
    model, folder = open_model(name, device, verify)
    if cache is None:
        return model, folder, None
    windows = fitting_windows(folder, calib, seq_len, progress=progress) if cache.needs_text else None
    return model, folder, set_cache(model, cache, windows, progress)
