"""A long text read through packed caches in pieces, and tokens generated after it, beside one pass over all of them.

    python benchmarks/long_context.py --device cuda --json long_context.json

For each format of keys and values, with the first 16 and the last 128 tokens in 16 bits and without: the text goes
through the cache in pieces of 1000 tokens, then 64 tokens are generated, one at a time, each the likeliest. The other
way is one pass over the text with its cache, and the same; and the third one pass over the text and all that was
generated, without a cache. Says how many of the tokens are the same, and what the cache takes after the text, all
of its buffers, beside keys and values in bfloat16. Ends with 1 where tokens differ, or a cache takes more than 0.30 of
that.

In float64, because sums of another order are other numbers, and a number across the middle between two codes is another
code: in float32 (`--dtype`) a few of a million are, and each of them moves many in the blocks behind; then what is
generated may part after a while, as two runs of different batch sizes do. Tokens in 16 bits take the bytes of this
type: so the cache that is weighed is read anew in bfloat16, without a look at tokens.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import sys
import time
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from mxrot.environment import device_name, versions
from mxrot.formats import CacheScheme, TensorQuantizer
from mxrot.layers import PackedCache, quantize_cache, restore_cache
from mxrot.models import find_family, find_model, value_heads
from mxrot.text import load_text

KEPT = ((16, 128), (0, 0))
"""First and last tokens in 16 bits."""
LARGEST_SHARE = 0.30


def main() -> None:
    options = parse_options()
    folder = find_model(options.model)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype))
    model.to(options.device).eval().requires_grad_(False)
    ids = text_ids(str(folder), options.text, options.tokens).to(options.device)
    rows = []
    for format in options.kv.split(","):
        for first, last in KEPT:
            scheme = scheme_of(format, options.transform, first, last)
            rows.append({"format": format, "first": first, "last": last} | measure(model, scheme, ids, options))
            print(described(rows[-1]), flush=True)
    if options.json is not None:
        record = {"command": shlex.join(sys.argv), "model": options.model, "dtype": options.dtype, "rows": rows}
        record |= {"device": device_name(torch.device(options.device)), "versions": versions()}
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
    if any(not row["are_equal"] or row["share_of_bfloat16"] > LARGEST_SHARE for row in rows):
        sys.exit(1)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", default="demo", help="as for mxrot eval")
    parser.add_argument("--kv", default="mxfp4,int4_row_asym", help="formats, separated by commas")
    parser.add_argument("--transform", default="hadamard", choices=("none", "hadamard"))
    parser.add_argument("--tokens", type=int, default=8128, help="of the text")
    parser.add_argument("--piece", type=int, default=1000)
    parser.add_argument("--made", type=int, default=64, help="tokens that are generated")
    parser.add_argument("--dtype", default="float64", choices=("float64", "float32", "bfloat16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json")
    return parser.parse_args()


def text_ids(folder: str, name: str, tokens: int) -> Tensor:
    """[1, tokens], the start of a text."""
    content = load_text(name, "evaluation").content
    text = content if isinstance(content, str) else "\n".join(str(document) for document in content)
    ids: Tensor = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    if ids.shape[1] < tokens:
        sys.exit(f"{name} has {ids.shape[1]} tokens, fewer than {tokens}")
    return ids[:, :tokens]


def scheme_of(format: str, transform: Any, first: int, last: int) -> CacheScheme:
    quantizer = TensorQuantizer.of(format)
    return CacheScheme(quantizer, quantizer, first, last, transform, transform)


@torch.no_grad()
def measure(model: PreTrainedModel, scheme: CacheScheme, ids: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """What the three ways give, and the bytes."""
    family = find_family(model.config, options.model)
    attentions = [block.get_submodule(family.attention) for block in model.get_submodule(family.blocks).children()]
    heads, width = value_heads(model.config)
    for attention in attentions:
        quantize_cache(attention, scheme, width, heads)
    try:
        pieces, _ = made_after(model, ids, options.piece, options.made)
        at_once, seconds = made_after(model, ids, ids.shape[1], options.made)
        logits = model(torch.cat([ids, pieces], dim=1), use_cache=False, logits_to_keep=options.made + 1).logits[0]
        best = logits[:-1].float().topk(2, dim=-1)
        taken = cache_bytes(model, ids, options.piece)
    finally:
        for attention in attentions:
            restore_cache(attention)
    plain = 2 * len(attentions) * heads * width * ids.shape[1] * 2
    same = [int((pieces[0] == other).sum()) for other in (at_once[0], best.indices[:, 0])]
    return {
        "tokens": ids.shape[1],
        "piece": options.piece,
        "made": options.made,
        "same_as_one_pass": same[0],
        "same_without_cache": same[1],
        "are_equal": same == [options.made] * 2,
        "smallest_margin_of_logits": float((best.values[:, 0] - best.values[:, 1]).min()),
        "cache_bytes": taken,
        "bfloat16_bytes": plain,
        "share_of_bfloat16": taken / plain,
        "milliseconds_per_token": 1000 * seconds / options.made,
    }


def made_after(model: PreTrainedModel, ids: Tensor, piece: int, made: int) -> tuple[Tensor, float]:
    """The likeliest tokens after a text that is read in pieces, [1, made], and the seconds that those took."""
    cache = PackedCache.of(model)
    for some in ids.split(piece, dim=1):
        logits = model(some, past_key_values=cache, logits_to_keep=1).logits
    found = [logits.argmax(dim=-1)]
    found[0].tolist()  # waits for the device
    started = time.monotonic()
    for _ in range(made - 1):
        found.append(model(found[-1], past_key_values=cache).logits.argmax(dim=-1))
    tokens = torch.cat(found, dim=1)
    tokens.tolist()
    return tokens, time.monotonic() - started


def cache_bytes(model: PreTrainedModel, ids: Tensor, piece: int) -> int:
    """Of the cache after a text, in the model in bfloat16."""
    half: Any = copy.deepcopy(model).to(torch.bfloat16)
    cache = PackedCache.of(half)
    for some in ids.split(piece, dim=1):
        half(some, past_key_values=cache, logits_to_keep=1)
    return cache.nbytes


def described(row: dict[str, Any]) -> str:
    return (
        f"{row['format']}, first {row['first']}, last {row['last']}: of {row['made']} tokens after {row['tokens']} in "
        f"pieces of {row['piece']}, {row['same_as_one_pass']} are those after one pass and {row['same_without_cache']} "
        f"those without a cache (smallest margin {row['smallest_margin_of_logits']:.4f}); cache "
        f"{row['cache_bytes'] / 2**20:.2f} MiB, {row['share_of_bfloat16']:.4f} of bfloat16; "
        f"{row['milliseconds_per_token']:.1f} ms a token"
    )


if __name__ == "__main__":
    main()
