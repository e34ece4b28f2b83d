"""A whole model of random weights, quantized and not: the time of a prompt and of a generated token.

Speed does not depend on the values of weights, so nothing is quantized here: codes are random. All models are run by
transformers. Their decoder blocks are compiled by torch.compile if requested. On a GPU a token is recorded as a CUDA
graph. A prompt is not, because it keeps the device busy anyway, and transformers masks attention differently in a
graph.

With the scheme of a packed cache, each model generates a token with that cache and with one of its own type, in turns.
Both then run as transformers has them, not compiled. All positions of both caches hold random numbers.

In a batch, every sequence generates a token in the same step. The caches of one batch and context are gone before those
of the next are made.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PretrainedConfig, PreTrainedModel

from mxrot.bench.breakdown import Breakdown, break_down
from mxrot.bench.timing import Seconds, seconds_of_each
from mxrot.formats import CacheScheme, quantize
from mxrot.kernels import plain_append_tokens
from mxrot.layers import (
    FixedCache,
    FixedPackedCache,
    InputTransform,
    QuantLinear,
    build_apart,
    quantize_cache,
    restore_cache,
    unmasked,
)
from mxrot.layers.kv_cache import states_in
from mxrot.models import find_family, rebuild_buffers
from mxrot.recipe import Recipe
from mxrot.scheme import Scheme, install, prepare
from mxrot.transforms.base import random_orthogonal
from mxrot.transforms.stages import BlockDiagonal

DRAWN_AT_ONCE = 2048
"""The number of tokens of a layer that are packed at once."""


@dataclass(frozen=True)
class ModelRow:
    """One model and one kind of work."""

    model: str
    work: str
    seconds: Seconds | None
    """None if its logits were not finite."""
    linear_bytes: int
    """The bytes of the linears of all decoder blocks, transforms included."""
    cache: str = ""
    """The format of keys and values."""
    cache_bytes: int | None = None
    """The bytes of keys and values of this context, including the new tokens'. None if there are none."""
    batch: int = 1
    """The number of sequences."""
    breakdown: Breakdown | None = None
    """Where the time goes, without torch.compile, if requested."""

    def as_record(self) -> dict[str, Any]:
        """The row for a JSON file."""
        seconds = None if self.seconds is None else vars(self.seconds)
        return vars(self) | {
            "seconds": seconds,
            "breakdown": None if self.breakdown is None else self.breakdown.as_record(),
        }


@dataclass(frozen=True)
class Works:
    """The work of the models."""

    prompt: int | None = 8192
    """The tokens of the prompt. None for no prompt."""
    contexts: tuple[int, ...] = (1024,)
    """The numbers of tokens before the generated one, in each sequence."""
    cache: CacheScheme | None = None
    """A cache that is also used to generate a token."""
    compiler: str | None = "inductor"
    """A backend of torch.compile. None for no compilation."""
    batches: tuple[int, ...] = (1,)
    """The numbers of sequences that generate a token at once."""
    with_breakdown: bool = False
    """Also find where the time of a generated token goes."""


Key = tuple[str, str, str]
"""The model, work and cache of a row."""


def bench_model(
    config: LlamaConfig,
    recipe: Recipe,
    device: torch.device,
    works: Works = Works(),
    told: Callable[[str], None] = lambda line: None,
) -> list[ModelRow]:
    """Measure the work of `works`, by the model and by the quantized one.

    On a GPU the quantized one is also measured with weights in FP8, besides the packed ones.
    """
    rows: list[ModelRow] = []
    plain: dict[Key, Seconds] = {}
    makers: dict[str, Callable[[LlamaConfig, torch.device], PreTrainedModel]] = {
        "bf16": random_model,
        recipe.name: partial(random_quantized_model, recipe=recipe),
    }
    if device.type == "cuda":
        makers[f"{recipe.name}, kept in FP8"] = partial(random_quantized_model, recipe=recipe, keeps_fp8=True)
    for name, make in makers.items():
        model = make(config, device)
        for row in _rows_of(name, model, works, plain):
            rows.append(row)
            told(f"{name}, {row.work}{row.cache and ', cache '}{row.cache}: {row.seconds or 'LOGITS ARE NOT FINITE'}")
        del model
        _release(device)
    if not works.with_breakdown:
        return rows
    # The profiler can slow down whatever follows it in this process, so all times are measured before it starts.
    parts: dict[Key, Breakdown | None] = {}
    for name, make in makers.items():
        model = make(config, device)
        parts |= _breakdowns(name, model, works, plain)
        del model
        _release(device)
    for key in [key for key, found in parts.items() if found is None]:
        told(f"{', '.join(key)}: torch.profiler recorded no kernels")
    return [replace(row, breakdown=parts.get((row.model, row.work, row.cache))) for row in rows]


def _rows_of(name: str, model: PreTrainedModel, works: Works, plain: dict[Key, Seconds]) -> Iterator[ModelRow]:
    """The rows of a model. With a breakdown, `plain` gets the times of tokens without torch.compile."""
    device = model.device
    if works.prompt is not None:
        step = prompt_step(model, works.prompt, works.compiler)
        yield ModelRow(name, f"prompt of {works.prompt}", _seconds([step], device, False)[0], linear_bytes(model))
    for context, batch in product(works.contexts, works.batches):
        rows = _token_rows(name, model, works, (batch, context), plain)
        if works.compiler is not None:
            torch.compiler.reset()  # it would compile the next size with dimensions that vary, which is slower
        _release(device)
        yield from rows


def _token_rows(
    name: str, model: PreTrainedModel, works: Works, size: tuple[int, int], plain: dict[Key, Seconds]
) -> list[ModelRow]:
    """A row for each cache, of this batch and context. Nothing refers to the caches afterwards."""
    tokens = _token_steps(model, works, size)
    linears, found = linear_bytes(model), _seconds(tokens, model.device, True)
    rows = [
        ModelRow(name, _work(size), seconds, linears, token.kept, token.cache.nbytes, size[0])
        for token, seconds in zip(tokens, found, strict=True)
    ]
    if works.with_breakdown:
        if works.compiler is not None:
            found = _seconds([token.plain for token in tokens], model.device, True)
        plain.update(
            {
                (name, row.work, row.cache): seconds
                for row, seconds in zip(rows, found, strict=True)
                if seconds is not None
            }
        )
    return rows


def _breakdowns(
    name: str, model: PreTrainedModel, works: Works, plain: dict[Key, Seconds]
) -> dict[Key, Breakdown | None]:
    """The breakdown of each token that has a time."""
    found: dict[Key, Breakdown | None] = {}
    for context, batch in product(works.contexts, works.batches):
        for token in _token_steps(model, works, (batch, context)):
            key = name, _work((batch, context)), token.kept
            if key in plain:
                found[key] = break_down(token.plain, plain[key], model)
            del token
        _release(model.device)
    return found


def _token_steps(model: PreTrainedModel, works: Works, size: tuple[int, int]) -> list[TokenStep]:
    """A step with each cache."""
    batch, context = size
    tokens = [token_step(model, context, works.compiler, batch)]
    if works.cache is not None:
        tokens.append(packed_token_step(model, context, works.cache, batch))
    return tokens


def _work(size: tuple[int, int]) -> str:
    batch, context = size
    return f"token after {context}" if batch == 1 else f"{batch} tokens after {context} each"


def _release(device: torch.device) -> None:
    """Free models and caches that are no longer used."""
    gc.collect()  # a packed cache and its layers refer to each other
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _seconds(steps: Sequence[Callable[[], Tensor]], device: torch.device, is_recorded: bool) -> list[Seconds | None]:
    """The seconds of each step, measured in turns. None if its logits are not finite."""
    are_fine = [bool(step().isfinite().all()) for step in steps]
    fine = [[step] for step, is_fine in zip(steps, are_fine, strict=True) if is_fine]
    seconds = iter(seconds_of_each(fine, device, is_recorded=is_recorded) if fine else [])
    return [next(seconds) if is_fine else None for is_fine in are_fine]


def llama_config(
    hidden: int, ffn: int, blocks: int, heads: int, kv_heads: int, vocabulary: int, positions: int = 8192
) -> LlamaConfig:
    """The config of a Llama of this shape, with an untied head."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )


@torch.no_grad()
def random_model(config: PretrainedConfig, device: torch.device) -> PreTrainedModel:
    """A bfloat16 model of normal weights with standard deviation 1/sqrt(inputs)."""
    generator = torch.Generator(device).manual_seed(0)
    model = build_apart(config)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            drawn = torch.ones(parameter.shape, dtype=torch.bfloat16, device=device)
            if parameter.dim() > 1:
                drawn.normal_(generator=generator).mul_(parameter.shape[-1] ** -0.5)
            setattr(module, name, nn.Parameter(drawn, requires_grad=False))
    rebuild_buffers(model, find_family(config, "the model"), device)
    return model


@torch.no_grad()
def random_quantized_model(
    config: LlamaConfig, device: torch.device, recipe: Recipe, keeps_fp8: bool = False
) -> PreTrainedModel:
    """The same sizes with random codes and orthogonal transforms, in the formats of the recipe."""
    model, family = random_model(config, device), find_family(config, "the model")
    generator, codes = torch.Generator().manual_seed(0), torch.Generator(device).manual_seed(1)
    scheme = Scheme.of(recipe, family, model)
    install(model, scheme, family)
    for index, block in enumerate(model.get_submodule(family.blocks).children()):
        for site in scheme.active_sites(family, index):
            for name in site.linears:
                linear = block.get_submodule(name)
                assert isinstance(linear, QuantLinear)
                if linear.transform is not None and name == site.linears[0]:
                    draw_transform(linear.transform, generator)
                draw_weight(linear, codes)
    head = model.get_submodule(family.head)
    if isinstance(head, QuantLinear):
        draw_weight(head, codes)
        if head.transform is not None:
            draw_transform(head.transform, generator)
    prepare(model, scheme, keeps_fp8)
    return model


def draw_transform(transform: InputTransform, generator: torch.Generator) -> None:
    """Draw the orthogonal matrices and permutations of all stages."""
    for tensor in transform.parameters():
        if not tensor.is_floating_point():
            tensor.data = torch.randperm(len(tensor), generator=generator).to(tensor)
        else:
            blocks, size = tensor.shape[:-2].numel(), tensor.shape[-1]
            matrices = random_orthogonal(blocks, size, generator)
            tensor.data = BlockDiagonal(matrices.to(tensor.device)).to_stored()


def draw_weight(linear: QuantLinear, generator: torch.Generator) -> None:
    """Draw a random weight. MXFP4 codes are drawn directly. In other formats a code can be no number: weights are
    drawn."""
    width, weights = linear.in_features, linear.weights
    if not weights.is_mxfp4:
        drawn = torch.empty(linear.out_features, width, device=generator.device).normal_(generator=generator)
        linear.set_weight(quantize(drawn * width**-0.5, weights.format, weights.rule))
        return
    linear.weight_packed.data.random_(0, 256, generator=generator)
    # Codes have a root mean square of 3, so 2^-e is about 1/sqrt(inputs).
    byte = 127 - round(torch.tensor(3.0 * width**0.5).log2().item())
    linear.weight_scale.data.fill_(byte)


def linear_bytes(model: PreTrainedModel) -> int:
    """The bytes of the linears of the decoder blocks, with transforms and prepared data. Shared tensors count once."""
    blocks = model.get_submodule(find_family(model.config, "the model").blocks)
    tensors = [*blocks.parameters(), *blocks.buffers()]
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors if tensor.dim() > 1
    }
    return sum(storages.values())


def prompt_step(model: PreTrainedModel, tokens: int, compiler: str | None = None) -> Callable[[], Tensor]:
    """A step that computes the logits of the last token of a sequence. One block is compiled, because all are alike."""
    ids = torch.arange(tokens, device=model.device)[None] % model.config.get_text_config().vocab_size
    blocks = list(model.get_submodule(find_family(model.config, "the model").blocks).children())
    compiled: list[Any] = []
    if compiler is not None:
        compiled = [torch.compile(block.forward, fullgraph=True, dynamic=False, backend=compiler) for block in blocks]

    @torch.no_grad()
    def step() -> Tensor:
        with forwards_replaced(blocks, compiled):
            logits: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        return logits

    return step


@contextmanager
def forwards_replaced(modules: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """While open, the first modules run these functions instead of their own."""
    for module, forward in zip(modules, forwards, strict=False):
        module.forward = forward
    try:
        yield
    finally:
        for module, _ in zip(modules, forwards, strict=False):
            del module.forward


@dataclass(frozen=True)
class TokenStep:
    """A step for one token, with keys and values of those before it. A call returns its logits."""

    run: Callable[[], Tensor]
    cache: FixedCache | FixedPackedCache
    kept: str
    """The format of keys and values, in words."""
    plain: Callable[[], Tensor]
    """The same step, not compiled."""

    def __call__(self) -> Tensor:
        return self.run()


def token_step(model: PreTrainedModel, context: int, compiler: str | None = None, batch: int = 1) -> TokenStep:
    """A step for one token of each of `batch` sequences, with keys and values of `context` tokens before it, all
    visible. Blocks differ by their index in the cache, so the whole model is compiled."""
    cache = FixedCache(context + 1, model.config)
    run = plain = _step(model, model, cache, (batch, context))
    if compiler is not None:
        compiled = torch.compile(model, fullgraph=True, backend=compiler)
        run = _step(model, compiled, cache, (batch, context))
    return TokenStep(run, cache, str(model.dtype).removeprefix("torch."), plain)


def packed_token_step(model: PreTrainedModel, context: int, scheme: CacheScheme, batch: int = 1) -> TokenStep:
    """As `token_step`, not compiled, with a packed cache. The model has that cache only during this step."""
    cache = FixedPackedCache(context + 1, model.config)
    run = _step(model, model, cache, (batch, context))

    def step() -> Tensor:
        with _packed(model, scheme):
            return run()

    return TokenStep(step, cache, scheme.spelled, step)


def _step(
    model: PreTrainedModel, run: Callable[..., Any], cache: FixedCache | FixedPackedCache, size: tuple[int, int]
) -> Callable[[], Tensor]:
    batch, context = size
    place = torch.tensor([context], device=model.device)
    ids = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
    places = place.expand(batch, 1)

    @torch.no_grad()
    def step() -> Tensor:
        cache.position = place
        arguments = {"input_ids": ids, "position_ids": places, "use_cache": True, "past_key_values": cache}
        with unmasked(model):
            if not cache.is_filled:
                model(**arguments)
                _draw(cache)
            output = run(**arguments)
        logits: Tensor = output.logits
        return logits

    return step


def _draw(cache: FixedCache | FixedPackedCache) -> None:
    """Fill all positions with random numbers, so that no kernel can skip zeros."""
    for state in states_in(cache.layers):
        state.normal_()
    if isinstance(cache, FixedCache):
        for tensor in (tensor for pair in cache.kept for tensor in pair):
            tensor.normal_()
        return
    for exact in cache.kept_exact:
        for tensor in exact.tensors:
            tensor.normal_()
    for tokens in cache.kept:
        batch, heads, positions = tokens.keys.codes.shape[:3]
        for start in range(0, positions, DRAWN_AT_ONCE):
            shape = batch, heads, min(DRAWN_AT_ONCE, positions - start), tokens.keys.width
            key, value = torch.randn(2, *shape, device=tokens.keys.codes.device)
            plain_append_tokens(key, key, value, tokens, start)


@contextmanager
def _packed(model: PreTrainedModel, scheme: CacheScheme) -> Iterator[None]:
    """While open, attention of the decoder blocks keeps keys and values by this scheme."""
    family, config = find_family(model.config, "the model"), model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    modules = family.attentions(model)
    for module in modules:
        quantize_cache(module, scheme, width, config.num_key_value_heads)
    try:
        yield
    finally:
        for module in modules:
            restore_cache(module)
