"""The options of a run-time cache, and their meaning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mxrot.commands.options import announce, loaded_texts
from mxrot.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mxrot.progress import Progress
    from mxrot.run_time_cache import RunTimeCache

KV_HELP = "Store keys and values in mxfp4, mxfp8, int4, int2, KEYS/VALUES or another format; none: unquantized"
TRANSFORM_HELP = "Transform of keys and values: none, hadamard, second-moment (fitted; needs --calib)"
Kv = Annotated[str | None, typer.Option("--kv", metavar="FORMAT", help=KV_HELP)]
KvTransform = Annotated[
    str | None, typer.Option("--kv-transform", metavar="KIND", help=f"{TRANSFORM_HELP} (default: hadamard)")
]
Kvs = Annotated[str | None, typer.Option("--kv", metavar="FORMATS", help=f"{KV_HELP}; comma-separated")]
KvTransforms = Annotated[
    str | None,
    typer.Option("--kv-transform", metavar="KINDS", help=f"{TRANSFORM_HELP} (default: hadamard); comma-separated"),
]
KvFirst = Annotated[int, typer.Option("--kv-first", min=0, metavar="N", help="First tokens that are read in 16 bits")]
KvLast = Annotated[int, typer.Option("--kv-last", min=0, metavar="N", help="Newest tokens that are read in 16 bits")]
KvCalib = Annotated[
    list[str], typer.Option("--calib", metavar="TEXT", help="Text to fit --kv-transform second-moment on")
]


@dataclass(frozen=True)
class Asked:
    """The request for a cache, or for the model's own."""

    cache: RunTimeCache | None
    calib: Any
    """The texts that it is fitted on."""
    seq_len: int
    """The tokens of a window of these texts."""

    def check(self, model: str) -> None:
        """ConfigError if the model of this name cannot have the cache, before a weight is read."""
        if self.cache is not None:
            from mxrot.run_time_cache import check_cache

            check_cache(self.cache, model)

    def open(
        self, model: str, device: str | None, verify: bool | None, progress: Progress | None = None
    ) -> tuple[PreTrainedModel, Path]:
        """The model with the cache, and its folder. The replaced cache is reported on standard error."""
        from mxrot.progress import silent
        from mxrot.run_time_cache import open_with_cache

        fitted: dict[str, Any] = {"calib": self.calib, "seq_len": self.seq_len, "progress": progress or silent}
        opened, folder, before = open_with_cache(model, self.cache, device, verify, **fitted)
        if before is not None and self.cache is not None:
            announce(f"mxrot: --kv {self.cache.label} replaces the cache of {model}: {before.spelled}")
        return opened, folder


def cache_asked_for(
    kv: str | None, transform: str | None, first: int, last: int, calib: list[str], seq_len: int = 2048
) -> Asked:
    """The request of one model's options. ConfigError if they contradict each other."""
    cache = chosen_cache(kv, transform, first, last)
    check_calib(cache, calib)
    return Asked(cache, loaded_texts("--calib", calib) if calib else (), seq_len)


def chosen_cache(kv: str | None, transform: str | None, first: int, last: int) -> RunTimeCache | None:
    """The cache of these options. None without `--kv`.

    ConfigError for an unknown name, for several names, and for options without effect.
    """
    found = chosen_caches(kv, transform, first, last)
    if len(found) > 1:
        raise ConfigError(
            f"--kv {kv} --kv-transform {transform or 'hadamard'}: names several caches; only compare takes several"
        )
    return found[0] if found else None


def chosen_caches(kv: str | None, transform: str | None, first: int, last: int) -> list[RunTimeCache]:
    """The caches for comma-separated formats and transforms: each format with each transform."""
    from mxrot.run_time_cache import RunTimeCache

    if kv is None:
        given = {"--kv-transform": transform is not None, "--kv-first": first > 0, "--kv-last": last > 0}
        for option in (name for name, is_given in given.items() if is_given):
            raise ConfigError(f"{option}: needs --kv; name the format of keys and values")
        return []
    formats, transforms = _split("--kv", kv), _split("--kv-transform", transform or "hadamard")
    found = [RunTimeCache.of(name, kind, first, last) for name in formats for kind in transforms]
    return list(dict.fromkeys(found))


def check_calib(cache: RunTimeCache | None, calib: list[str]) -> None:
    """ConfigError if a text is needed but missing, or given but not needed."""
    needs = cache is not None and cache.needs_text
    if needs and not calib:
        raise ConfigError("--kv-transform second-moment: is fitted to keys and values of a text; name one with --calib")
    if calib and not needs:
        raise ConfigError("--calib: only --kv-transform second-moment needs it here; leave it out")


def _split(option: str, names: str) -> list[str]:
    found = [name.strip() for name in names.split(",") if name.strip()]
    if not found:
        raise ConfigError(f"{option}: names nothing")
    return found
