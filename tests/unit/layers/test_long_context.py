"""8k tokens through a packed cache in pieces, and 64 tokens after them: what one pass over all of them gives."""

from __future__ import annotations

import torch
from tests.tiny_model import random_windows, tiny_config
from transformers import LlamaForCausalLM

from mxrot.formats import CacheScheme, TensorQuantizer
from mxrot.layers import PackedCache, quantize_cache

TOKENS, PIECE, MADE = 8192, 1000, 64


@torch.no_grad()
def test_pieces_of_a_long_text_and_what_is_generated_are_one_pass() -> None:
    """In float64, in which sums of another order are no other numbers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "head_dim": 32, "num_attention_heads": 1}
    more = {"num_hidden_layers": 1, "num_key_value_heads": 1, "max_position_embeddings": TOKENS + MADE}
    model = LlamaForCausalLM(tiny_config(**sizes, **more)).eval().double()
    for name, parameter in model.named_parameters():
        if "_proj" in name or "lm_head" in name:
            parameter.mul_(10)  # scores and logits that differ
    mxfp4 = TensorQuantizer.of("mxfp4")
    scheme = CacheScheme(mxfp4, mxfp4, first=16, last=128, key_transform="hadamard")
    quantize_cache(model.model.layers[0].self_attn, scheme, 32, 1)
    ids, cache, logits = random_windows(1, TOKENS), PackedCache.of(model), []
    for piece in ids[:, :-1].split(PIECE, dim=1):
        logits.append(model(piece, past_key_values=cache).logits)
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=MADE,
        do_sample=False,
        pad_token_id=0,
    )
    whole = model(made, use_cache=False).logits
    assert torch.equal(whole[:, TOKENS - 1 : -1].argmax(dim=-1), made[:, TOKENS:])
    assert torch.allclose(torch.cat(logits, dim=1), whole[:, : TOKENS - 1], rtol=0, atol=1e-9)
    assert cache.get_seq_length() == TOKENS + MADE - 1 and len(made[0, TOKENS:].unique()) > 8
