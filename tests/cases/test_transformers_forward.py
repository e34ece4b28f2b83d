"""A plain call of a quantized model, in every mode in which people call models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from tests.cases.commands import IDS
from tests.cases.transformers_models import from_pretrained, loaded, outputs, write_checkpoint
from torch import Tensor
from transformers import PreTrainedModel, pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("forward") / "out")


@pytest.fixture(scope="module")
def expected(folder: Path) -> Tensor:
    return outputs(loaded(folder))


@pytest.mark.case("C1")
def test_a_plain_forward_records_gradients_and_gives_the_same_logits(folder: Path, expected: Tensor) -> None:
    model = from_pretrained(folder)
    found = model(IDS).logits
    assert found.requires_grad and torch.equal(found, expected)


@pytest.mark.case("C1")
@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, torch.enable_grad], ids=lambda mode: mode.__name__
)
@pytest.mark.parametrize("is_prepared", [False, True])
def test_every_mode_gives_the_same_logits(
    folder: Path, expected: Tensor, mode: Callable[[], AbstractContextManager[None]], is_prepared: bool
) -> None:
    model = loaded(folder, is_prepared)
    model.requires_grad_(False)
    with mode():
        assert torch.equal(model(IDS).logits, expected)


def straight_through(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with ordinary linears of the same weights and no rounding of inputs: whose gradient it should be."""
    copied = copy.deepcopy(model)
    for name, module in model.named_modules():
        if hasattr(module, "dequantized_weight"):
            copied.set_submodule(name, WithTransform(module))
    return copied


class WithTransform(torch.nn.Module):
    """(x T) W^T + b, and in its value what was rounded away from x T as a constant."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.linear = [linear]
        self.weight = linear.dequantized_weight()

    def forward(self, x: Tensor) -> Tensor:
        linear = self.linear[0]
        transformed = linear.transform(x)
        rounded = transformed + (linear.quantized_input(x.detach()) - transformed).detach()
        return torch.nn.functional.linear(rounded, self.weight, linear.bias)


@pytest.mark.case("C1")
def test_the_gradient_passes_through_the_rounding_of_inputs(folder: Path) -> None:
    """That of the same model with ordinary linears, whose sums run in another order: 1e-3 of the largest."""
    model = loaded(folder)
    gradients = []
    for which in (model, straight_through(model)):
        embedded = model.get_input_embeddings()(IDS).detach().requires_grad_(True)
        which(inputs_embeds=embedded).logits.square().sum().backward()
        assert embedded.grad is not None
        gradients.append(embedded.grad)
    found, wanted = gradients
    assert float(wanted.abs().max()) > 0
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3 * float(wanted.abs().max()))


@pytest.mark.case("C1")
@pytest.mark.parametrize("is_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(folder: Path, expected: Tensor, is_reentrant: bool) -> None:
    gradients = []
    for recomputes in (False, True):
        model = from_pretrained(folder).train()
        if recomputes:
            # The newer name, which warns about the older one.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": is_reentrant})
        found = model(IDS, use_cache=False).logits
        assert torch.equal(found, expected)
        found.sum().backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    torch.testing.assert_close(*gradients)


class Beside(torch.nn.Module):
    """A low-rank update beside a linear, added to its output in place or not, as libraries do both."""

    def __init__(self, base: Any, is_in_place: bool) -> None:
        super().__init__()
        self.base, self.is_in_place = base, is_in_place
        self.down, self.up = (torch.nn.Linear(*sizes, bias=False) for sizes in ((64, 4), (4, base.out_features)))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.base(x)
        update = self.up(self.down(x))
        if self.is_in_place:
            found += update
            return found
        return found + update


@pytest.mark.case("C1")
def test_a_low_rank_update_beside_a_quantized_linear_learns(folder: Path) -> None:
    gradients, losses = [], []
    for is_in_place in (False, True):
        model = loaded(folder, is_prepared=is_in_place)
        torch.manual_seed(0)
        for block in model.model.layers:
            block.self_attn.q_proj = Beside(block.self_attn.q_proj, is_in_place)
            block.self_attn.v_proj = Beside(block.self_attn.v_proj, is_in_place)
        learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert len(learnt) == 8
        optimizer = torch.optim.SGD(learnt, lr=1.0)
        for _ in range(4):
            loss = model(IDS, labels=IDS).loss
            optimizer.zero_grad()
            loss.backward()
            losses.append(float(loss.detach()))
            gradients.append([parameter.grad.clone() for parameter in learnt])
            optimizer.step()
        assert losses[-1] < losses[-4]
    torch.testing.assert_close(gradients[4], gradients[0])


@pytest.mark.case("C1")
def test_a_compiled_part_has_the_same_values_and_gradients(folder: Path) -> None:
    part = loaded(folder, is_prepared=True).model.layers[0].mlp
    torch.compiler.reset()
    found = []
    for called in (part, torch.compile(part, backend="aot_eager", fullgraph=True)):
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
        value = called(x)
        value.square().sum().backward()
        found.append((value.detach(), x.grad))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(*found)


@pytest.mark.case("C1")
def test_autocast_does_not_reach_into_a_quantized_linear(folder: Path) -> None:
    """Products of quantized numbers in bfloat16 would lose what a checkpoint was measured with."""
    linear = loaded(folder).model.layers[0].mlp.down_proj
    x = torch.randn(5, linear.in_features, generator=torch.Generator().manual_seed(0))
    for made in (x, x.clone().requires_grad_(True)):
        with torch.autocast("cpu", torch.bfloat16):
            found = linear(made)
        assert torch.equal(found, linear(x)) and found.dtype == x.dtype


@pytest.mark.case("C4")
@pytest.mark.parametrize("make", [loaded, from_pretrained])
def test_loaded_and_called_inside_inference_mode(
    folder: Path, expected: Tensor, make: Callable[[Path], PreTrainedModel]
) -> None:
    with torch.inference_mode():
        model = make(folder)
        assert torch.equal(model(IDS).logits, expected)
    assert torch.equal(outputs(model), expected)


@pytest.mark.case("C4")
def test_a_transform_that_changes_inside_inference_mode_is_applied(folder: Path) -> None:
    """Tensors made there do not count their changes."""
    with torch.inference_mode():
        model = from_pretrained(folder)
        before = model(IDS).logits
        transform = model.model.layers[0].mlp.down_proj.transform
        transform.weight.mul_(-1)
        changed = model(IDS).logits
        transform.weight.mul_(-1)
        assert not torch.equal(changed, before) and torch.equal(model(IDS).logits, before)


@pytest.mark.case("C5")
@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, torch.enable_grad], ids=lambda mode: mode.__name__
)
def test_an_input_changed_in_place_between_q_and_k(
    folder: Path, mode: Callable[[], AbstractContextManager[None]]
) -> None:
    found = []
    for is_prepared in (False, True):
        attention = loaded(folder, is_prepared).model.layers[0].self_attn
        with mode():
            x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
            q = attention.q_proj(x)
            x[:, :32] *= 2  # through a view
            found.append((q, attention.k_proj(x), attention.v_proj(x)))
    for alone, together in zip(*found, strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def double(module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
    """A hook that changes an input in place."""
    arguments[0].mul_(2)


@pytest.mark.case("C5")
def test_hooks_that_change_the_input_of_k_or_leave_it_out(folder: Path, expected: Tensor) -> None:
    found = []
    for is_prepared in (False, True):
        model = loaded(folder, is_prepared)
        attention = model.model.layers[0].self_attn
        hook = attention.k_proj.register_forward_pre_hook(double)
        found.append(outputs(model))
        hook.remove()
        own = attention.k_proj.forward
        attention.k_proj.forward = lambda x: torch.zeros(*x.shape[:-1], 32)
        found.append(outputs(model))
        attention.k_proj.forward = own
        torch.testing.assert_close(outputs(model), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[2:], found[:2], rtol=1e-5, atol=1e-5)
    assert not torch.equal(found[0], expected)


@pytest.mark.case("C5")
def test_q_without_and_k_with_gradients(folder: Path) -> None:
    attention = loaded(folder, is_prepared=True).model.layers[0].self_attn
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    with torch.no_grad():
        attention.q_proj(x)
    assert attention.k_proj(x).requires_grad


@pytest.mark.case("C5")
def test_threads_run_one_model(folder: Path) -> None:
    """All at the same site at once: the second is in q while the first waits for its k."""
    model = loaded(folder, is_prepared=True)
    batches = [torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    expected = [outputs(model, ids) for ids in batches]
    wrong: list[int] = []

    def run(number: int) -> None:
        for _ in range(8):
            if not torch.equal(outputs(model, batches[number]), expected[number]):
                wrong.append(number)

    threads = [Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.case("C5")
def test_a_model_called_from_a_hook_in_itself(folder: Path, expected: Tensor) -> None:
    model = loaded(folder, is_prepared=True)
    hook = model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: inner())

    def inner() -> None:
        hook.remove()
        outputs(model, IDS.flip(0))

    torch.testing.assert_close(outputs(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.case("C1")
def test_every_way_to_generate(folder: Path) -> None:
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    for model in (loaded(folder, is_prepared=True), from_pretrained(folder)):
        seen = torch.ones_like(IDS)
        plain = model.generate(IDS, attention_mask=seen, **options)
        ways = {
            "static cache": {"cache_implementation": "static", "disable_compile": True},
            "no cache": {"use_cache": False},
        }
        for name, way in ways.items():
            assert torch.equal(model.generate(IDS, attention_mask=seen, **options, **way), plain), name
        with torch.inference_mode():
            assert torch.equal(model.generate(IDS, attention_mask=seen, **options), plain)
        assert torch.equal(model.generate(IDS[:1], attention_mask=seen[:1], **options), plain[:1])
        assistant = copy.deepcopy(model)
        assisted = model.generate(IDS[:1], attention_mask=seen[:1], assistant_model=assistant, **options)
        assert torch.equal(assisted, plain[:1])
        padded, mask = (torch.nn.functional.pad(tensor, (3, 0)) for tensor in (IDS, seen))
        assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 3:], plain)
        assert model.generate(IDS, attention_mask=seen, num_beams=3, **options).shape == plain.shape


@pytest.mark.case("C1")
def test_a_pipeline(folder: Path) -> None:
    writer = pipeline("text-generation", model=str(folder), dtype=torch.float32)
    ids = writer.tokenizer("Hello", return_tensors="pt").input_ids
    written = loaded(folder).generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    found = writer("Hello", max_new_tokens=3, do_sample=False)
    assert found[0]["generated_text"] == writer.tokenizer.decode(written[0])
