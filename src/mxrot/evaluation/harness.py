"""lm-eval's model for transformers, with answers that are kept. Needs lm-eval, so it is imported by what uses it."""

from __future__ import annotations

import copy
import math
from typing import Any, cast

import torch
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel

from mxrot.errors import NumericsError
from mxrot.evaluation.answers import Answer, Answers
from mxrot.progress import Progress
from mxrot.text import Reader, check_ids


class Harness(HFLM):
    """Asks the model for no answer twice; the softmax is in float32, whatever the type of the logits."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        answers: Answers,
        batch_size: int,
        progress: Progress,
    ) -> None:
        own = copy.deepcopy(tokenizer)  # lm-eval gives it a padding token where it has none
        super().__init__(pretrained=model, tokenizer=own, batch_size=batch_size, softmax_dtype="float32")
        self._answers = answers
        self._progress = progress
        rows = cast(Any, model).get_input_embeddings().weight.shape[0]
        self._reader = Reader(own, embedding_rows=rows)
        self._task = ""
        self._total = 0
        self._done = 0
        self.set_cache_hook(self)  # is told each answer as soon as there is one

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Answer]:
        """The answer to each request; only what is not known yet goes through the model, each once."""
        asked = {request.args: request for request in requests}
        missing = [request for args, request in asked.items() if self._answers.get(args) is None]
        self._task = requests[0].task_name
        self._total, self._done = len(asked), len(asked) - len(missing)
        self._tell()
        if missing:
            super().loglikelihood(missing, disable_tqdm=True)
        found = [answer for request in requests if (answer := self._answers.get(request.args)) is not None]
        assert len(found) == len(requests), "a request has no answer, and those after it would be taken for its own"
        return found

    def tok_encode(self, *arguments: Any, **options: Any) -> list[int]:
        """The tokens of a string; ConfigError if one is beyond the model's embedding."""
        ids: list[int] = super().tok_encode(*arguments, **options)
        check_ids(torch.tensor(ids, dtype=torch.int64), self._task, self._reader)
        return ids

    def add_partial(self, kind: str, request: tuple[str, str], answer: Answer) -> None:
        """What lm-eval calls with each answer."""
        if not math.isfinite(answer[0]):
            raise NumericsError(f"{self._task}: the model's logits hold NaN or Inf; nothing can be scored")
        self._answers.add(request, answer)
        self._done += 1
        self._tell()

    def _tell(self) -> None:
        self._progress(self._done, self._total, f"{self._task}, requests")
