"""lm-eval's model for transformers, with stored answers. It needs lm-eval, so only its users import it."""

from __future__ import annotations

import copy
import math
from typing import Any, cast

import torch
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel

from mxrot.calibration import World
from mxrot.errors import NumericsError
from mxrot.evaluation.answers import Answer, Answers
from mxrot.progress import Progress
from mxrot.text import Reader, check_ids


class Harness(HFLM):
    """Asks the model each request only once. The softmax is in float32, whatever the dtype of the logits."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        answers: Answers,
        batch_size: int,
        progress: Progress,
        world: World,
    ) -> None:
        own = copy.deepcopy(tokenizer)  # lm-eval adds a padding token if it has none
        super().__init__(pretrained=model, tokenizer=own, batch_size=batch_size, softmax_dtype="float32")
        self._answers = answers
        self._progress = progress
        self._world = world
        rows = cast(Any, model).get_input_embeddings().weight.shape[0]
        self._reader = Reader(own, embedding_rows=rows)
        self._task = ""
        self._total = 0
        self._done = 0
        self.set_cache_hook(self)  # receives each answer as soon as it is known

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Answer]:
        """The answer to each request. Only unknown requests go through the model, each once, in one process."""
        asked = {request.args: request for request in requests}
        missing = [request for args, request in asked.items() if self._answers.get(args) is None]
        self._task = requests[0].task_name
        own = missing[self._world.rank :: self._world.size]
        known = len(asked) - len(missing)
        self._total, self._done = known + len(own), known
        self._tell()
        if own:
            super().loglikelihood(own, disable_tqdm=True)
        self._take_answers_of_others(missing)
        found = [answer for request in requests if (answer := self._answers.get(request.args)) is not None]
        assert len(found) == len(requests), "a request has no answer, and those after it would be taken for its own"
        return found

    def _take_answers_of_others(self, missing: list[Any]) -> None:
        """Each request was asked by one process. After this, all know the answer."""
        if self._world.size == 1:
            return
        ranks = range(self._world.size)
        own = [self._answers.get(request.args) for request in missing[self._world.rank :: self._world.size]]
        given = self._world.gather(torch.tensor(own, dtype=torch.float64).reshape(len(own), 2))
        for rank, answers in zip(ranks, given, strict=True):
            if rank != self._world.rank:
                asked = missing[rank :: self._world.size]
                for request, (value, greedy) in zip(asked, answers.tolist(), strict=True):
                    self._answers.add(request.args, (value, bool(greedy)))

    def tok_encode(self, *arguments: Any, **options: Any) -> list[int]:
        """The tokens of a string. ConfigError if one is beyond the model's embedding."""
        ids: list[int] = super().tok_encode(*arguments, **options)
        check_ids(torch.tensor(ids, dtype=torch.int64), self._task, self._reader)
        return ids

    def add_partial(self, kind: str, request: tuple[str, str], answer: Answer) -> None:
        """Store an answer. lm-eval calls this for each one."""
        if not math.isfinite(answer[0]):
            raise NumericsError(f"{self._task}: the model's logits hold NaN or Inf; nothing can be scored")
        self._answers.add(request, answer)
        self._done += 1
        self._tell()

    def _tell(self) -> None:
        self._progress(self._done, self._total, f"{self._task}, requests")
