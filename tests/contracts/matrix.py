"""Every family by three recipes, on tiny random models.

`make matrix`, or `python -m tests.contracts.matrix FAMILY ...` for some families. Prints a table and counts. The exit
code is 1 if a cell failed.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contracts.test_families import TINY_FAMILIES, spread_gains
from tests.contracts.test_family_generation import NO_TIME, bytes_in
from tests.contracts.tiny_configs import auto_class, config_of
from tests.tiny_model import write_tokenizer
from tests.unit.checkpoint.folders import recipe, write
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

import mxrot
from mxrot.errors import ConfigError, MxrotWarning
from mxrot.models import Family
from mxrot.planning import make_plan
from mxrot.quantizing import run as pipeline
from mxrot.recipe import Recipe

RECIPES = ("rtn", "duquant++", "mxrot")
IDS = torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(1))
WINDOWS = torch.randint(0, 50, (6, 24), generator=torch.Generator().manual_seed(0))


def write_model(folder: Path, family: Family) -> Path:
    """A random model of a family, with biases and gains that count; returns `folder`."""
    torch.manual_seed(0)
    model = auto_class(family).from_config(config_of(family))
    spread_gains(model, family)
    model.half().save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def unsmoothed(family: Family, name: str) -> list[str]:
    """Sites that a recipe cannot smooth, because nothing before them takes the scales."""
    smooths = name == "duquant++"
    sites = [site for index in range(2) for site in family.sites_of(index)]
    return list(dict.fromkeys(site.group for site in sites if smooths and not site.norm and not site.producer))


def try_cell(family: Family, name: str, folder: Path, scratch: Path) -> str:
    """Quantize, save, load, generate and plan; "yes", with what the recipe had to leave out. Raises if it fails.

    A loaded checkpoint has the logits of the model that was quantized in memory, bit for bit, in mxrot and in
    transformers. It writes the same tokens with a cache and without. A plan has no problem, and counts the parameters
    as transformers does and the bytes as the files do.
    """
    chosen, left_out = recipe(name), unsmoothed(family, name)
    if left_out:
        with pytest.raises(ConfigError, match="has nothing before it that can take smoothing scales; list it under"):
            write(folder, scratch / "out", chosen, windows=_windows(chosen))
        chosen = chosen.changed({"smoothing.skip": left_out})
    in_memory = pipeline.quantize(folder, chosen, windows=_windows(chosen)).model
    assert in_memory is not None
    write(folder, scratch / "out", chosen, windows=_windows(chosen))
    loaded = mxrot.load(scratch / "out", device="cpu")
    by_transformers = auto_class(family).from_pretrained(scratch / "out", dtype=torch.float32)
    expected = _logits(in_memory)
    assert bool(expected.isfinite().all()), "logits are not finite"
    assert torch.equal(_logits(loaded), expected), "mxrot.load has other logits"
    assert torch.equal(_logits(by_transformers), expected), "transformers has other logits"
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    written = [loaded.generate(IDS, use_cache=uses, **options) for uses in (True, False)]
    assert torch.equal(*written), "a cache changes tokens"
    _check_plan(family, chosen, folder, scratch / "out")
    return f"yes, `{'`, `'.join(left_out)}` not smoothed" if left_out else "yes"


def _windows(chosen: Recipe) -> Tensor | None:
    return None if chosen.is_data_free else WINDOWS


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    found: Tensor = model(IDS).logits
    return found.float()


def _check_plan(family: Family, chosen: Recipe, folder: Path, output: Path) -> None:
    plan = make_plan(family.name, folder / "config.json", chosen, NO_TIME)
    assert plan.problems == [] and plan.sizes is not None, plan.problems
    parameters = auto_class(family).from_pretrained(folder).num_parameters()
    assert plan.sizes.shape.parameters == parameters, "a plan counts other parameters"
    assert plan.sizes.after.total_bytes == bytes_in(output), "a plan counts other bytes"


def matrix(names: Iterable[str], say: Callable[[str], None] = print) -> Counter[str]:
    """Say one row a family, and how many cells there are of each kind (yes, failed); these counts."""
    counts: Counter[str] = Counter()
    began = time.perf_counter()
    say(f"| family | {' | '.join(RECIPES)} |\n|---|{'---|' * len(RECIPES)}")
    failures = []
    for name in names:
        cells = []
        with tempfile.TemporaryDirectory() as scratch:
            folder = write_model(Path(scratch) / "model", TINY_FAMILIES[name])
            for each in RECIPES:
                try:
                    cells.append(try_cell(TINY_FAMILIES[name], each, folder, Path(scratch) / each))
                except (Exception, pytest.fail.Exception) as error:
                    cells.append("FAILED")
                    failures.append(f"{name}, {each}: {type(error).__name__}: {error}")
                counts["failed" if cells[-1] == "FAILED" else "yes"] += 1
        say(f"| {name} | {' | '.join(cells)} |")
    for failure in failures:
        say(failure)
    families = counts.total() // len(RECIPES)
    say(
        f"{families} families x {len(RECIPES)} recipes: {counts['yes']} of {counts.total()} cells hold, "
        f"{counts['failed']} failed ({time.perf_counter() - began:.0f} s)"
    )
    return counts


if __name__ == "__main__":
    warnings.simplefilter("ignore", MxrotWarning)
    transformers_logging.disable_progress_bar()
    unknown = [name for name in sys.argv[1:] if name not in TINY_FAMILIES]
    if unknown:
        sys.exit(f"no such family: {', '.join(unknown)}; there are {', '.join(TINY_FAMILIES)}")
    sys.exit(matrix(sys.argv[1:] or TINY_FAMILIES)["failed"] > 0)
