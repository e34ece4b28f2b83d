"""Logits from the last hidden states, when not all logits fit in memory at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mxrot.errors import FamilyError
from mxrot.models import FAMILIES, LogitKeys

_TOKENS = 2
_TOLERANCE = 2.0**-5
"""Relative to the largest logit: four roundings of bfloat16. A missing factor makes a larger difference."""


@dataclass(frozen=True)
class _Scaling:
    """What a model does with the output of its head."""

    factor: float | None
    divisor: float | None
    bound: float | None


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits [..., vocabulary] of the output of the body of `model`, [..., hidden], with the bits of its own forward.

    Some models scale logits by a factor or a divisor in their config, or bound them: c tanh(x / c). The record of the
    family names these config keys (`LogitKeys`).
    """
    logits: Tensor = model.get_output_embeddings()(hidden)
    scaling = _scaling(model)
    if scaling.factor is not None:
        logits = logits * scaling.factor
    if scaling.divisor is not None:
        logits = logits / scaling.divisor
    return logits if scaling.bound is None else torch.tanh(logits / scaling.bound) * scaling.bound


@torch.no_grad()
def check_logits(model: PreTrainedModel, ids: Tensor) -> None:
    """FamilyError unless `logits_of` gives the logits of the model's own forward, on two of the token ids [W, T].

    If the record of a family does not name how its logits are scaled, results would be wrong without an error.
    """
    few = ids[:1, :_TOKENS].to(next(model.parameters()).device)
    own = model(input_ids=few, use_cache=False).logits.float()
    found = logits_of(model, model.get_decoder()(input_ids=few, use_cache=False).last_hidden_state).float()
    if torch.isfinite(own).all() and not torch.allclose(found, own, rtol=0, atol=_TOLERANCE * float(own.abs().max())):
        largest = [float(logits.abs().max()) for logits in (own, found)]
        raise FamilyError(
            f"{type(model).__name__}: its logits reach {largest[0]:.4g}, and what is known of its family makes them "
            f"{largest[1]:.4g}: name the key of its config that scales them in the record of the family (LogitKeys)"
        )


def _scaling(model: PreTrainedModel) -> _Scaling:
    name = type(model).__name__
    keys = next((family.logits for family in FAMILIES.values() if name in family.architectures), LogitKeys())
    config = model.config.get_text_config()
    named = (keys.factor, keys.divisor, keys.bound)
    return _Scaling(*(None if key is None else getattr(config, key, None) for key in named))
