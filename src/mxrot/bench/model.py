"""A whole model of random weights, quantized and not: what a prompt and what a generated token take.

Speed does not depend on what weights are, so nothing is quantized here: codes are drawn. Both models are run by
transformers, recorded as CUDA graphs on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel

from mxrot.bench.timing import Seconds, seconds_of
from mxrot.calibration.generation import FixedCache
from mxrot.layers import ModelSize, QuantLinear
from mxrot.models import build_skeleton, find_family, rebuild_rotary
from mxrot.recipe import Recipe
from mxrot.surgery import install_empty_site, scheme_name
from mxrot.transforms.base import BlockTransform, random_orthogonal


@dataclass(frozen=True)
class ModelRow:
    """One model, one kind of work."""

    model: str
    work: str
    seconds: Seconds | None
    """None if its logits were not finite."""
    linear_bytes: int
    """Of the linears of all decoder blocks, transforms included."""

    def as_record(self) -> dict[str, Any]:
        """For a JSON file."""
        return vars(self) | {"seconds": None if self.seconds is None else vars(self.seconds)}


def bench_model(
    config: LlamaConfig,
    recipe: Recipe,
    device: torch.device,
    prompt: int = 8192,
    context: int = 1024,
    told: Callable[[str], None] = lambda line: None,
) -> list[ModelRow]:
    """A prompt of so many tokens, and one token after a context of so many, by the model and by the quantized one."""
    rows = []
    makers = (("bf16", random_model), (recipe.name, partial(random_quantized_model, recipe=recipe)))
    for name, make in makers:
        model = make(config, device)
        linears = linear_bytes(model)
        for work, step in (
            (f"prompt of {prompt}", prompt_step(model, prompt)),
            (f"token after {context}", token_step(model, context)),
        ):
            seconds = seconds_of([step], device) if bool(step().isfinite().all()) else None
            rows.append(ModelRow(name, work, seconds, linears))
            told(f"{name}, {work}: {seconds or 'LOGITS ARE NOT FINITE'}")
        del model, step
    return rows


def llama_config(
    hidden: int, ffn: int, blocks: int, heads: int, kv_heads: int, vocabulary: int, positions: int = 8192
) -> LlamaConfig:
    """A Llama of this shape, with a head of its own."""
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
def random_model(config: LlamaConfig, device: torch.device) -> PreTrainedModel:
    """Of normal weights 1/sqrt(inputs) wide, bfloat16."""
    generator = torch.Generator(device).manual_seed(0)
    model = build_skeleton(config)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            drawn = torch.ones(parameter.shape, dtype=torch.bfloat16, device=device)
            if parameter.dim() == 2:
                drawn.normal_(generator=generator).mul_(parameter.shape[1] ** -0.5)
            setattr(module, name, nn.Parameter(drawn, requires_grad=False))
    rebuild_rotary(model, find_family(config, "the model"), device)
    return model


@torch.no_grad()
def random_quantized_model(config: LlamaConfig, device: torch.device, recipe: Recipe) -> PreTrainedModel:
    """The same sizes with drawn codes and orthogonal transforms, in MXFP4 on both sides."""
    model, family = random_model(config, device), find_family(config, "the model")
    generator, codes = torch.Generator().manual_seed(0), torch.Generator(device).manual_seed(1)
    assert recipe.activations is not None
    weights, activations = recipe.weights.quantizer(), recipe.activations.quantizer()
    for index, block in enumerate(model.get_submodule(family.blocks).children()):
        for site in family.active_sites(index, recipe.ignore):
            width = block.get_submodule(site.linears[0]).in_features
            assert isinstance(width, int)
            count = 1 if recipe.sharing == "site" else width // recipe.input_block
            matrices = random_orthogonal(count, recipe.input_block, generator)
            stored = BlockTransform(matrices.to(device)).to_stored() if recipe.has_transform else None
            install_empty_site(block, scheme_name(index, site), site, stored, weights, activations)
            for name in site.linears:
                linear = block.get_submodule(name)
                assert isinstance(linear, QuantLinear)
                linear.weight_packed.data.random_(0, 256, generator=codes)
                # Codes are 3 in the mean square, so 2^-e is about 1/sqrt(inputs).
                byte = 127 - round(torch.tensor(3.0 * width**0.5).log2().item())
                linear.weight_scale.data.fill_(byte)
    return model


def linear_bytes(model: PreTrainedModel) -> int:
    """Bytes of the linears of the decoder blocks, and of what belongs to them."""
    family = find_family(model.config, "the model")
    blocks = model.get_submodule(family.blocks)
    linears = {name: value for name, value in blocks.state_dict().items() if value.dim() > 1}
    return ModelSize.of(linears).total_bytes


def prompt_step(model: PreTrainedModel, tokens: int) -> Callable[[], Tensor]:
    """Logits of the last token of one sequence."""
    ids = torch.arange(tokens, device=model.device)[None] % model.config.vocab_size

    @torch.no_grad()
    def step() -> Tensor:
        logits: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        return logits

    return step


def token_step(model: PreTrainedModel, context: int) -> Callable[[], Tensor]:
    """Logits of one token, with keys and values of so many before it."""
    cache = FixedCache(context + 1)
    place = torch.tensor([context], device=model.device)
    visible = torch.ones(1, 1, 1, context + 1, dtype=torch.bool, device=model.device)
    ids = torch.zeros(1, 1, dtype=torch.int64, device=model.device)

    @torch.no_grad()
    def step() -> Tensor:
        cache.position = place
        output = model(
            input_ids=ids, position_ids=place[None], attention_mask=visible, past_key_values=cache, use_cache=True
        )
        logits: Tensor = output.logits
        return logits

    return step
