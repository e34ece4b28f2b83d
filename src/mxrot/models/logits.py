"""From the last hidden states to logits, where not all of them can exist at once."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits [..., vocabulary] of what the body of `model` gives, [..., hidden], with the bits of its own forward.

    Some models bound them: c tanh(x / c) with c the config's `final_logit_softcapping`.
    """
    logits: Tensor = model.get_output_embeddings()(hidden)
    bound = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if bound is None else torch.tanh(logits / bound) * bound
