"""One way to quantize a model: what plans of memory, disk and time depend on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from mxrot.calibration.executor import HELD
from mxrot.calibration.placement import MOST_REMEMBERED, most_on_device
from mxrot.calibration.spreading import Room, Spread, spread_over
from mxrot.calibration.writing_sizes import WritingSizes
from mxrot.errors import ConfigError
from mxrot.layers.attention import has_indexer
from mxrot.planning.shape import ModelShape, SiteShape
from mxrot.quantizing.batches import held_out, tokens_at_once
from mxrot.recipe import Recipe
from mxrot.transforms import FitSize


@dataclass(frozen=True)
class Run:
    """One way to quantize a model: what the estimates depend on."""

    shape: ModelShape
    recipe: Recipe
    device: str
    """"cpu" or "cuda"."""
    stored: torch.dtype
    """The model's own type."""
    windows: int
    """Calibration windows of the text."""
    seq_len: int
    keeps_model: bool = False
    """In memory, for `compare`, instead of being written to a folder block by block."""
    room: Room | None = None
    """On GPUs and beside them, to spread the model that writes text over; None where that is unknown."""
    gpu_memory: float | None = None
    """Bytes that a GPU has; None where that is unknown."""

    @property
    def itemsize(self) -> int:
        """Bytes of a number that the model computes with."""
        return 4 if self.device == "cpu" else self.stored.itemsize

    @property
    def is_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def all_windows(self) -> int:
        """With those that the model writes."""
        if self.recipe.is_data_free:
            return 0
        return self.windows + self.recipe.calibration.written(self.windows)

    @property
    def tuned_windows(self) -> int:
        """For each of which tuning has others written."""
        return self.windows + self.recipe.calibration.own

    @property
    def tokens(self) -> int:
        return self.all_windows * self.seq_len

    @cached_property
    def groups(self) -> dict[str, int]:
        """Tokens by what their windows are for, as `window_groups` parts them; of all where none are held out."""
        share = self.recipe.calibration.held_out
        if not share or not self.tokens:
            return {"": self.tokens}
        found: dict[str, int] = {}
        for kind, windows in (("text", self.windows), ("written", self.all_windows - self.windows)):
            held = int(held_out(windows, share, kind).sum()) if windows > 1 else 0
            counts = {kind: windows - held, f"{HELD} {kind}": held}
            found |= {name: count * self.seq_len for name, count in counts.items() if count}
        return found

    @property
    def kinds(self) -> int:
        """Kinds of text that are fitted to."""
        return sum(not name.startswith(HELD) for name in self.groups)

    @property
    def fitted_tokens(self) -> int:
        """Those that are not held out."""
        return sum(count for name, count in self.groups.items() if not name.startswith(HELD))

    @property
    def batch_tokens(self) -> int:
        """Tokens that pass through a block together, at most: a batch holds windows of one group."""
        return self.batch_of(max(self.groups.values()))

    def batch_of(self, tokens: int) -> int:
        """The same of a group of so many."""
        widest = max(self.shape.widest, self.token_scores)
        return min(tokens, max(1, tokens_at_once(widest, self.device) // self.seq_len) * self.seq_len)

    @property
    def token_scores(self) -> int:
        """Scores that attention writes out for a token."""
        return self.shape.score_heads * self.seq_len

    @property
    def rounded_in_attention(self) -> float:
        """Numbers that the products of attention round for a token: probabilities, and values of the block it is in."""
        if self.recipe.attention is None:
            return 0.0
        values = self.recipe.attention.operands().probabilities_values
        own = 0 if values is None else self.token_scores + self.shape.query_width * (values.format.block or 1)
        return float(own + 3 * self.shape.query_width)

    @property
    def mask_bytes(self) -> int:
        """Masks that blocks are called with: none where attention is plainly causal, one for each kind of blocks."""
        config: Any = self.shape.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ("full_attention",))
        if not self.shape.score_heads:
            is_short = self.seq_len <= (getattr(config, "sliding_window", None) or self.seq_len)
            return 0 if is_short and not has_indexer(config) else self.seq_len**2
        return len(kinds) * self.itemsize * self.seq_len**2

    @property
    def remembered(self) -> int:
        return MOST_REMEMBERED["cuda" if self.is_gpu else "cpu"]

    @property
    def stream_bytes(self) -> int:
        """The states between two blocks, of all tokens, and what blocks pass on beside them."""
        shape = self.shape
        beside = 0
        if shape.passes_on is not None:
            beside = shape.passes_on.token_bytes(shape.config.get_text_config(), self.seq_len)
        return self.tokens * (shape.hidden * self.itemsize + beside)

    @property
    def is_on_host(self) -> bool:
        """Do the states between blocks, and the outputs of attention and MLP, wait in main memory beside a GPU?"""
        return self.is_gpu and self.stream_bytes > most_on_device("cuda", self.gpu_memory)

    @property
    def model_bytes(self) -> float:
        """The original model."""
        return float(self.shape.parameters * self.itemsize)

    @cached_property
    def writing(self) -> WritingSizes:
        """The original model, and the text that it writes to be calibrated on."""
        return WritingSizes(
            self.shape.config,
            self.recipe.calibration,
            self.all_windows - self.windows,
            self.seq_len,
            self.itemsize,
            "cuda" if self.is_gpu else "cpu",
            float(self.shape.outer_parameters * self.itemsize),
            tuple(float(count * self.itemsize) for count in self.shape.each_block),
            float(self.rotation_bytes),
            self.shape.family,
        )

    @cached_property
    def spread(self) -> Spread | None:
        """How that model is spread over devices; None where it is not."""
        if self.room is None or not self.is_gpu or not self.recipe.writes_text:
            return None
        try:
            return spread_over(self.writing, self.room)
        except ConfigError:  # which is a problem of the plan
            return None

    @property
    def rotates_residual(self) -> bool:
        """Is a rotation of the residual stream merged into the weights?"""
        return self.recipe.rotation is not None and self.recipe.rotation.residual != "none"

    @property
    def rotation_bytes(self) -> int:
        """Of the matrices that are merged into the weights, in float64."""
        wanted, shape = self.recipe.rotation, self.shape
        if wanted is None:
            return 0
        of_heads = len(shape.blocks) * shape.head_width**2 if wanted.value_heads != "none" else 0
        return 8 * (of_heads + (shape.hidden**2 if self.rotates_residual else 0))

    @property
    def packed_block(self) -> float:
        """A quantized block."""
        after = self.shape.size_after(self.stored)
        inside = after.code_bytes + after.scale_bytes + after.transform_bytes
        return inside / max(1, len(self.shape.blocks))

    @property
    def sees_original(self) -> bool:
        """Does rounding look at the original block's inputs?"""
        return any(one.rounding.requirements.target != "own" for one in self.recipe.variants)


def keeps_share(run: Run, here: SiteShape) -> float:
    """The share of a site's inputs that are kept for the pass that its Hessian is taken from; none are held out."""
    beside = run.stream_bytes if reads_residual(run, here) else 0
    whole = here.share * run.tokens * here.inputs * run.itemsize + beside
    return min(run.fitted_tokens / max(1, run.tokens), run.remembered / max(1, whole))


def reads_residual(run: Run, here: SiteShape) -> bool:
    """Does rounding look at the residual stream that a site's output is added to?"""
    requirements = here.recipe.rounding.requirements
    return here.site.residual is not None and (requirements.relative or requirements.target == "residual")


def fit_size(run: Run, here: SiteShape) -> FitSize:
    """What one transform of a site is fitted to; on a GPU the fits of all sites are recorded."""
    recorded = tuple(site.inputs for site in run.shape.fullest) if run.is_gpu else ()
    return FitSize(here.outputs // here.transforms, here.inputs, here.recipe.sharing, run.tokens, recorded)
