"""Makes, measures and releases the models of a comparison, one at a time."""

from __future__ import annotations

import gc
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mxrot import api, quantizing
from mxrot.evaluation import (
    Divergence,
    KeptOriginal,
    Perplexity,
    count_examples,
    measured_cache,
    perplexity,
    score_tasks,
)
from mxrot.heap import give_back
from mxrot.layers import HeadLinear, ModelSize, QuantLinear
from mxrot.layers.cache_size import bits_per_element, cache_of
from mxrot.models import find_family, value_heads
from mxrot.progress import Progress
from mxrot.report.checkpoints import GivenCheckpoint, errors_by_block
from mxrot.report.peak_memory import peak_memory
from mxrot.report.rows import Run
from mxrot.run_time_cache import RunTimeCache, set_cache
from mxrot.text import Windows
from mxrot.tokenizing import Calibration


@dataclass
class Trials:
    """The common settings of all models of a comparison."""

    folder: Path
    """The folder of the original."""
    stored: torch.dtype
    """The type of most of its weights."""
    device: str
    read: list[Windows]
    """The windows that are measured on."""
    kept: KeptOriginal | None
    """The states of the original. None if no KL is measured."""
    tasks: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None
    prompt: str | None = None
    fitted_on: Tensor | None = None
    """Token windows [W, T] that fitted caches are fitted on."""

    @property
    def examples(self) -> list[int]:
        """The number of examples of each task."""
        return [count_examples(task, self.limit) for task in self.tasks.values()]

    def original(self, progress: Progress) -> Run:
        """The original model. The data of it that the other models need are kept."""
        model, _ = api.open_model(self.folder, self.device)
        return self._measured(model, progress, is_original=True)

    def made(
        self,
        calibration: Calibration | None,
        seed: int,
        cache: RunTimeCache | None,
        quantizes: Progress,
        measures: Progress,
        checkpoint: GivenCheckpoint | None = None,
    ) -> Run:
        """The model quantized by a recipe, or read from a checkpoint, or else the original, with a cache in place of
        its own if one is given.

        Errors of `quantize`, `load` and `set_cache`, and NumericsError for logits that are not finite.
        """
        if checkpoint is not None:
            model, made = api.open_model(checkpoint.folder, self.device)[0], checkpoint.made
        elif calibration is None:
            model, made = api.open_model(self.folder, self.device)[0], dict[str, Any]()
        else:
            model, made = self._quantized(calibration, seed, quantizes)
        if cache is not None:
            set_cache(model, cache, self.fitted_on, quantizes)
        return self._measured(model, measures, **made)

    def _quantized(
        self, calibration: Calibration, seed: int, progress: Progress
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The model, and the costs of quantizing."""
        options: dict[str, Any] = {"windows": calibration.windows, "device": self.device, "seed": seed}
        with peak_memory(self.device) as peak:
            result = quantizing.quantize(self.folder, calibration.recipe, progress=progress, **options)
        assert result.model is not None
        blocks = [[vars(linear) for linear in block.linears] for block in result.record.blocks]
        made = {"seed": seed, "seconds": result.record.seconds, "peak_bytes": peak.bytes, **errors_by_block(blocks)}
        return result.model, made

    def has_states(self) -> bool:
        """True if all states that quantized models are compared with exist."""
        kept = self.kept
        return kept is None or all(kept.holds(part.text.name, part.ids, self._at_once(part)) for part in self.read)

    def _measured(self, model: PreTrainedModel, progress: Progress, is_original: bool = False, **made: Any) -> Run:
        scores, apart = self._scores(model, progress, is_original)
        tokenizer = api.load_tokenizer(self.folder) if self.tasks or self.prompt is not None else None
        return Run(
            model_size(model, self.stored),
            scores,
            divergence=apart,
            stored_bits=8 * self.stored.itemsize,
            bits_per_kv_element=bits_per_kv_element(model, self.stored),
            cache=measured_cache(model),
            tasks=score_tasks(model, tokenizer, self.tasks, limit=self.limit, progress=progress) if self.tasks else {},
            extra={} if self.prompt is None else {"generated": _sentence(model, tokenizer, self.prompt)},
            **made,
        )

    def _scores(
        self, model: PreTrainedModel, progress: Progress, is_original: bool
    ) -> tuple[dict[str, Perplexity], dict[str, Divergence]]:
        """The perplexity on each text and, for a quantized model, its divergence from the original."""
        if self.kept is None:  # not shared: other processes measure other models
            return {
                part.text.name: perplexity(model, part.ids, self._at_once(part), progress) for part in self.read
            }, {}
        options = [(part.text.name, part.ids, self._at_once(part), progress) for part in self.read]
        if is_original:
            return {one[0]: self.kept.keep(model, *one) for one in options}, {}
        head = self.kept.head(self.device)
        both = {one[0]: self.kept.measure(model, head, *one) for one in options}
        return {name: found[0] for name, found in both.items()}, {name: found[1] for name, found in both.items()}

    def _at_once(self, part: Windows) -> int:
        """The number of windows in a batch, as in `api.evaluate`."""
        return api.batch_windows(torch.device(self.device), part)


def model_size(model: PreTrainedModel, stored: torch.dtype) -> ModelSize:
    """The bytes of the model in a checkpoint. Unquantized tensors count in the type `stored`."""
    family, tensors = find_family(model.config, "the model"), model.state_dict()
    head = family.head if isinstance(model.get_submodule(family.head), HeadLinear) else ""
    linears = (one for one in model.modules() if isinstance(one, QuantLinear) and not isinstance(one, HeadLinear))
    quantized = sum(one.in_features * one.out_features for one in linears)
    left = {name for name in tensors if family.is_linear(name)}
    return ModelSize.of(tensors, quantized, stored.itemsize, left, head)


def bits_per_kv_element(model: PreTrainedModel, stored: torch.dtype) -> float:
    """The bits of a cached key or value. An unquantized cache has the type of the model."""
    scheme = cache_of(model)
    if scheme is None:
        return 8.0 * stored.itemsize
    return bits_per_element(scheme, value_heads(model.config.get_text_config())[1])


def let_go() -> None:
    """Release the memory of the previous model, in main memory and on the GPU."""
    gc.collect()
    give_back()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _sentence(model: PreTrainedModel, tokenizer: Any, prompt: str) -> str:
    """The prompt and the first sentence of the model's continuation."""
    continuation = api.generate_text(model, tokenizer, prompt, max_tokens=32)
    sentence = re.split(r"(?<=[.!?])\s|\n", continuation.strip(), maxsplit=1)[0]
    return f"{prompt} {sentence}"
