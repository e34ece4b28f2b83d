"""The results of a comparison: runs of models, and a row for each recipe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from mxrot.evaluation import Divergence, Perplexity, Recovery, TaskScore, mean_score, recovery, standard_error
from mxrot.layers import ModelSize


class Mean(NamedTuple):
    """The mean over the seeds of a row."""

    value: float
    error: float | None
    """The standard error over seeds. None with one seed."""


def mean_of(values: Sequence[float]) -> Mean:
    """The mean of at least one value."""
    return Mean(sum(values) / len(values), standard_error(values))


@dataclass(frozen=True)
class Run:
    """One model, quantized once and measured."""

    size: ModelSize
    perplexity: dict[str, Perplexity]
    """The perplexity by text name."""
    seed: int | None = None
    """The seed. None for the original."""
    seconds: float | None = None
    """The time to quantize. None for the original."""
    peak_bytes: int | None = None
    """The peak while quantizing: allocated on a GPU, resident on a CPU. None if not reported, and for the original."""
    divergence: dict[str, Divergence] = field(default_factory=dict)
    """The divergence from the original, by text. Empty if it was not measured."""
    stored_bits: int = 16
    """The bits of an unquantized weight."""
    bits_per_kv_element: float = 16.0
    cache: dict[str, Any] | None = None
    """The measured memory of keys and values of one sequence (`evaluation.measured_cache`). None if unquantized."""
    tasks: dict[str, TaskScore] = field(default_factory=dict)
    weight_errors: list[float] = field(default_factory=list)
    """The relative Frobenius error of the weights by decoder block, the mean over its linears. Empty if it is not
    known, and for the original."""
    output_errors: list[float] = field(default_factory=list)
    """The same for the outputs on the calibration text. Empty without one."""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float:
        """Bits of codes and scales, or of the stored type if nothing is quantized."""
        return self.size.bits_per_weight or float(self.stored_bits)

    def measures_as(self, other: Run) -> bool:
        """True if its figures are the same to the last bit."""
        mine, others = ([x.nll for x in run.perplexity.values()] for run in (self, other))
        my_kl, other_kl = ([x.kl for x in run.divergence.values()] for run in (self, other))
        return mine == others and my_kl == other_kl

    def to_json(self) -> dict[str, Any]:
        """The run as a table for `from_json`."""
        return asdict(self)

    @staticmethod
    def from_json(table: dict[str, Any]) -> Run:
        """The run of such a table. KeyError or TypeError for anything else."""
        tasks = {
            name: TaskScore({key: tuple(hits) for key, hits in score["hits"].items()}, score["split"], score["digest"])
            for name, score in table["tasks"].items()
        }
        return Run(
            **{
                **table,
                "size": ModelSize(**table["size"]),
                "perplexity": {name: Perplexity(**one) for name, one in table["perplexity"].items()},
                "divergence": {name: Divergence(**one) for name, one in table["divergence"].items()},
                "tasks": tasks,
            }
        )

    def as_table(self) -> dict[str, Any]:
        """The figures of one seed as `compare --json` writes them."""
        return {
            "seed": self.seed,
            "perplexity": {name: one.ppl for name, one in self.perplexity.items()},
            "divergence": {name: finite(vars(one)) for name, one in self.divergence.items()},
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
        }


@dataclass(frozen=True)
class ComparedRow:
    """One recipe of a comparison, or the original: a run for each seed, or the reason why there is none."""

    recipe: str
    """The name of the recipe, or of the checkpoint's folder. For the original model, the type of its weights."""
    runs: tuple[Run, ...] = ()
    original: Run | None = None
    """The reference of ratios. None in the row of the original, whose ratio is 1."""
    reason: str | None = None
    """The reason why the recipe cannot be used, or the error."""
    recipe_toml: str | None = None
    """The recipe with every key."""
    checkpoint: str | None = None
    """The folder that it was read from. None if it was quantized here."""
    is_alike: bool = False
    """True if another seed gave the same figures, so that no more seeds were run."""

    @property
    def texts(self) -> list[str]:
        return list(self.runs[0].perplexity) if self.runs else []

    @property
    def size(self) -> ModelSize:
        return self.runs[0].size

    @property
    def perplexity(self) -> dict[str, Perplexity]:
        """The perplexity of the first seed, by text."""
        return self.runs[0].perplexity

    @property
    def cache(self) -> dict[str, Any] | None:
        """The cache of the first seed."""
        return self.runs[0].cache if self.runs else None

    @property
    def extra(self) -> dict[str, Any]:
        """The extra fields of the first seed."""
        return self.runs[0].extra

    @property
    def quantize_seconds(self) -> float | None:
        """The mean over seeds."""
        seconds = [run.seconds for run in self.runs if run.seconds is not None]
        return sum(seconds) / len(seconds) if seconds else None

    @property
    def peak_bytes(self) -> int | None:
        """The largest peak over seeds."""
        return max((run.peak_bytes for run in self.runs if run.peak_bytes is not None), default=None)

    @property
    def tasks(self) -> dict[str, TaskScore]:
        """The scores of tasks. Each answer is a mean over seeds."""
        scores = {name: [run.tasks[name] for run in self.runs] for name in (self.runs[0].tasks if self.runs else ())}
        return {name: mean_score(each) for name, each in scores.items()}

    def mean_perplexity(self, text: str) -> Mean:
        return mean_of([run.perplexity[text].ppl for run in self.runs])

    def ratio(self, text: str | None = None) -> Mean:
        """The perplexity divided by that of the original, on one text or as the geometric mean over all."""
        return mean_of([self._ratio(run, text) for run in self.runs])

    def _ratio(self, run: Run, text: str | None) -> float:
        if self.original is None:
            return 1.0
        chosen = self.texts if text is None else [text]
        apart = [run.perplexity[name].nll - self.original.perplexity[name].nll for name in chosen]
        return math.exp(sum(apart) / len(apart))

    def kl(self, text: str | None = None) -> Mean | None:
        """KL(original || quantized), in nats per token, on one text or as the mean over all. None if not measured."""
        return self._apart("kl", text)

    def agreement(self, text: str | None = None) -> Mean | None:
        """The share of positions with the same most likely token as in the original. None as for `kl`."""
        return self._apart("agreement", text)

    def _apart(self, measure: str, text: str | None) -> Mean | None:
        if not all(run.divergence for run in self.runs):
            return None
        chosen = self.texts if text is None else [text]
        each = [[getattr(run.divergence[name], measure) for name in chosen] for run in self.runs]
        return mean_of([sum(values) / len(chosen) for values in each])

    def recovery(self, normed: bool) -> Recovery:
        """The recovery of the mean over tasks of `acc`, or with `normed` of each task's first metric, relative to the
        original."""
        original = self if self.original is None else ComparedRow("", (self.original,))
        return recovery(self.tasks, original.tasks, normed)

    def _means_of_tasks(self) -> dict[str, float | None]:
        """The means over tasks by metric, with standard errors and recoveries. Null for values that are not finite."""
        found: dict[str, float | None] = {}
        for metric, one in (("acc", self.recovery(False)), ("first", self.recovery(True))):
            figures = {"": one.mean, "_stderr": one.error, "_recovered": one.relative}
            figures["_recovered_stderr"] = one.relative_error
            found |= {metric + key: value if math.isfinite(value) else None for key, value in figures.items()}
        return found

    def as_table(self) -> dict[str, Any]:
        """The row as `compare --json` writes it. Errors are standard errors over seeds, null with one seed."""
        if not self.runs:
            return {"recipe": self.recipe, "recipe_toml": self.recipe_toml, "reason": self.reason, "runs": []}
        run, ratio, kl, agreement = self.runs[0], self.ratio(), self.kl(), self.agreement()
        by_text = {text: (self.mean_perplexity(text), self.ratio(text), self.kl(text)) for text in self.texts}
        agreed = {text: self.agreement(text) for text in self.texts}
        return {
            "recipe": self.recipe,
            "bits_per_weight": run.bits_per_weight,
            "transform_bits_per_weight": run.size.transform_bits_per_weight or 0.0,
            "bits_per_kv_element": run.bits_per_kv_element,
            **({} if run.cache is None else {"cache": run.cache}),
            "megabytes": run.size.total_bytes / 1e6,
            "seconds": self.quantize_seconds,
            "peak_bytes": self.peak_bytes,
            "perplexity": {text: found[0].value for text, found in by_text.items()},
            "perplexity_error": {text: found[0].error for text, found in by_text.items()},
            "ratio": ratio.value,
            "ratio_error": ratio.error,
            "ratio_of_text": {text: found[1].value for text, found in by_text.items()},
            "kl": None if kl is None else kl.value,
            "kl_error": None if kl is None else kl.error,
            "kl_of_text": {text: found[2].value for text, found in by_text.items() if found[2] is not None},
            "agreement": None if agreement is None else agreement.value,
            "agreement_error": None if agreement is None else agreement.error,
            "agreement_of_text": {text: found.value for text, found in agreed.items() if found is not None},
            **({"tasks": {name: score.as_table() for name, score in self.tasks.items()}} if run.tasks else {}),
            **({"tasks_mean": self._means_of_tasks()} if run.tasks else {}),
            "seeds": [each.seed for each in self.runs if each.seed is not None],
            "seeds_alike": self.is_alike,
            "runs": [each.as_table() for each in self.runs],
            "reason": self.reason,
            **({} if self.checkpoint is None else {"checkpoint": self.checkpoint}),
            "recipe_toml": self.recipe_toml,
            **self.extra,
        }


def in_order(rows: Sequence[ComparedRow]) -> list[ComparedRow]:
    """The original, then rows by ratio, then rows without figures, in their given order."""

    def place(row: ComparedRow) -> tuple[int, float]:
        if row.reason is not None:
            return 2, 0.0
        return (0, 0.0) if row.original is None else (1, row.ratio().value)

    return sorted(rows, key=place)


def finite(table: dict[str, Any]) -> dict[str, Any]:
    """The table with null for values that JSON cannot express."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in table.items()
    }
