"""Gains, biases and transforms that are learned while codes stay: gradients beside autograd's, and whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contracts.tiny_configs import config_of
from tests.tiny_model import random_windows, write_tiny_model, write_tokenizer
from tests.unit.checkpoint.folders import all_tensors, digests, logits, recipe, without_run, write
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mxrot import api
from mxrot.checkpoint import load
from mxrot.errors import ConfigError
from mxrot.evaluation import divergence
from mxrot.formats import TensorQuantizer, quantize
from mxrot.layers import InputTransform, QuantLinear
from mxrot.models import FAMILIES
from mxrot.quantizing import distilling
from mxrot.quantizing import run as pipeline
from mxrot.quantizing.written import Writing
from mxrot.recipe import Recipe
from mxrot.transforms import BlockDiagonal, BlockDiagonalSpec
from mxrot.tuning import loop
from mxrot.tuning.gains import LearnedGain, LearnedVector, learned_gains
from mxrot.tuning.light import FrozenLinear
from mxrot.tuning.moving_transform import MovingTransform
from mxrot.tuning.shares import split_windows
from mxrot.tuning.straight_inputs import StraightInputs

K, ROWS = 64, 6
WINDOWS = random_windows(20, 32)
SHORT = {
    "rounding__method": "rtn",
    "calibration__generated": 0.0,
    "permutation": "none",
    "tuning__generated": 0.0,
    "tuning__steps": 12,
    "tuning__batch_windows": 4,
    "tuning__held_out": 0.2,
    "tuning__checks": 3,
    "tuning__norm_rate": 0.003,
    "tuning__scale_rate": 0.003,
    "tuning__bias_rate": 0.003,
    "tuning__transform_rate": 0.0005,
}
POLISHED = {
    "tuning__moves": "rounding",
    "tuning__polish_steps": 6,
    "tuning__light_transform_rate": 0.0005,
    "tuning__norm_rate": 0.0,
    "tuning__light_norm_rate": 0.001,
}
ROUNDING_HAS_NONE = "polish_steps", "scale_rate", "bias_rate", "light_norm_rate"
LIGHT_FIRST = {"tuning__moves": "rounding", "tuning__light_steps": 6, "tuning__light_transform_rate": 0.0005}


def light(**changes: Any) -> Recipe:
    return recipe("mxrot-light", **(SHORT | changes))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), torch.bfloat16)


def some_transform(groups: int) -> InputTransform:
    specs = (BlockDiagonalSpec(32, "block" if groups > 1 else "site"),)
    found = InputTransform.empty(specs, K, "cpu")
    matrices = torch.linalg.qr(random(groups, 32, 32)).Q.double()
    found.weight.data = BlockDiagonal(matrices).to_stored()
    return found


@pytest.mark.parametrize(("adds_one", "dtype"), [(False, torch.bfloat16), (True, torch.float16)])
def test_a_gain_starts_as_it_is_and_moves_by_a_share_of_itself(adds_one: bool, dtype: torch.dtype) -> None:
    norm = nn.RMSNorm(K)
    start = random(K).to(dtype).float()
    norm.weight.data.copy_(start)
    gain = LearnedGain(norm, adds_one, dtype)
    gain.begin()
    assert torch.equal(norm.weight, start)
    with torch.no_grad():
        gain.vector.change.fill_(0.25)
    gain.begin()
    expected = (start + 0.25 * (start + adds_one).abs()).to(dtype).float()
    assert torch.equal(norm.weight, expected)
    norm(random(3, K)).sum().backward()
    x = random(3, K)
    of_weight = (x * x.square().mean(-1, keepdim=True).rsqrt()).sum(0)
    assert gain.vector.change.grad is not None
    assert torch.allclose(gain.vector.change.grad, of_weight * (start + adds_one).abs(), atol=1e-4)
    gain.settle()
    assert not norm.weight.requires_grad
    gain.finish()
    assert isinstance(norm.weight, nn.Parameter) and torch.equal(norm.weight, expected)


def test_the_norms_of_a_block_are_found_by_their_full_names() -> None:
    asked: list[str] = []
    block = nn.ModuleDict({"input_layernorm": nn.RMSNorm(4), "attn": nn.ModuleDict({"q_norm": nn.RMSNorm(2)})})
    block["proj"] = nn.Linear(4, 4)
    found = learned_gains(block, "model.layers.1", False, lambda name: (asked.append(name), torch.float32)[1])
    assert len(found) == 2
    assert asked == ["model.layers.1.input_layernorm.weight", "model.layers.1.attn.q_norm.weight"]
    assert len(learned_gains(nn.RMSNorm(4), "model.norm", False, lambda _: torch.float32)) == 1


@pytest.mark.parametrize("groups", [1, 2])
def test_what_a_moved_transform_applies_is_what_is_stored(groups: int) -> None:
    transform = some_transform(groups)
    moving = MovingTransform(transform, K)
    assert torch.equal(moving.matrices(), transform.matrices().float())
    assert (moving.scales is None) == (groups == 1)
    with torch.no_grad():
        moving.correction.add_(0.1 * random(groups, 32, 32, seed=1))
        expected = moving.start.double() @ moving.correction.double()
        if moving.scales is not None:
            moving.scales.add_(0.1 * random(groups, 32, 1, seed=2))
            expected = moving.scales.double() * expected
    found = moving.matrices().detach()
    assert not torch.equal(found, moving.start)
    assert torch.allclose(found.double(), expected, rtol=2**-7, atol=1e-6)
    moving.finish()
    assert torch.equal(transform.matrices().float(), found)


def test_gradients_are_those_of_a_product_without_rounding() -> None:
    """For the input, and for both factors of the transform; weights have none."""
    own = TensorQuantizer.of("mxfp4", "even")
    linear = QuantLinear(K, ROWS, own, own)
    linear.set_weight(quantize(random(ROWS, K, seed=3), own.format, own.rule))
    transform = some_transform(2)
    moving = MovingTransform(transform, K)
    frozen = FrozenLinear(linear, StraightInputs(transform, own, 1, moving), None)
    x, direction = random(5, K, seed=4).requires_grad_(), random(5, ROWS, seed=5)
    assert moving.scales is not None
    leaves = x, moving.correction, moving.scales
    found = frozen(x)
    got = torch.autograd.grad(found, leaves, direction)
    linear.share_transform(transform)
    assert torch.allclose(found, linear(x.detach()), atol=1e-5)
    turned = (x.view(5, 2, 1, 32) @ (moving.scales * (moving.start @ moving.correction))).flatten(1)
    wanted = torch.autograd.grad(turned @ linear.dequantized_weight().T, leaves, direction)
    for one, other in zip(got, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)
    assert not frozen.weight.requires_grad and frozen.finished() is linear


def test_biases_count_in_what_they_are_and_their_mean() -> None:
    own = TensorQuantizer.of("mxfp4", "even")
    linear = QuantLinear(K, ROWS, own, own, bias=random(ROWS).to(torch.float16).float())
    linear.set_weight(quantize(random(ROWS, K, seed=3), own.format, own.rule))
    assert linear.bias is not None
    start = linear.bias.detach().clone()
    frozen = FrozenLinear(linear, StraightInputs(None, own, 1), torch.float16)
    assert frozen.learned is not None
    x = random(4, K, seed=6)
    assert torch.allclose(frozen(x), linear(x), atol=1e-5)
    with torch.no_grad():
        frozen.learned.change.fill_(-0.5)
    expected = (start - 0.5 * (start.abs() + start.abs().mean())).to(torch.float16).float()
    assert torch.allclose(frozen(x), linear(x) + (expected - start), atol=1e-5)
    assert torch.equal(frozen.finished().bias, expected)


def test_a_vector_passes_its_gradient_through_rounding() -> None:
    vector = LearnedVector(random(K), torch.full((K,), 3.0), torch.bfloat16)
    (got,) = torch.autograd.grad(vector.value(), vector.change, random(K, seed=1))
    assert torch.equal(got, 3 * random(K, seed=1))


@pytest.mark.parametrize("scope", ["network", "block"])
def test_codes_stay_and_what_is_stored_is_closer(source: Path, tmp_path: Path, scope: str) -> None:
    """And a second run gives the same bits, and a loaded model those of the one in memory."""
    chosen = light(tuning__scope=scope)
    plain = write(source, tmp_path / "plain", chosen.changed({"tuning": "none"}), windows=WINDOWS)
    record = write(source, tmp_path / "one", chosen, windows=WINDOWS)
    before, after = all_tensors(tmp_path / "plain"), all_tensors(tmp_path / "one")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and plain["tuning"] is None
    if scope == "network":
        assert all(name.endswith(("norm.weight", "_input.weight")) for name in changed)
        assert "model.norm.weight" in changed and sum("_input" in name for name in changed) == 8
        assert sum("layernorm" in name for name in changed) == 4
        losses = record["tuning"]
    else:
        # Later blocks are rounded behind other inputs.
        assert not any("layers.0" in name and name.endswith(("packed", "scale")) for name in changed)
        assert "model.norm.weight" not in changed and sum("layernorm" in name for name in changed) == 4
        losses = record["blocks"][0]["tuning"]
    assert min(look["held_out"] for look in losses) < 0.95 * losses[0]["held_out"]
    write(source, tmp_path / "two", chosen, windows=WINDOWS)
    assert without_run(digests(tmp_path / "one")) == without_run(digests(tmp_path / "two"))
    model = pipeline.quantize(source, chosen, windows=WINDOWS).model
    assert model is not None and torch.equal(logits(load(tmp_path / "one")), logits(model))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_loss_that_is_reported_is_that_of_the_checkpoint(source: Path, tmp_path: Path) -> None:
    """Rounded to what is stored in every pass: nothing is lost at the end."""
    record = write(source, tmp_path / "one", light(), windows=WINDOWS)
    _, test = split_windows(len(WINDOWS), 0.2)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    # Tuning counts the last position of a window, too, which predicts nothing that is there.
    windows = torch.cat([WINDOWS[test], torch.zeros(len(test), 1, dtype=torch.int64)], dim=1)
    found = divergence(load(tmp_path / "one"), original, windows).kl
    assert found == pytest.approx(min(look["held_out"] for look in record["tuning"]), rel=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "qwen3"])
def test_norms_and_biases_of_other_families(tmp_path: Path, family: str) -> None:
    torch.manual_seed(0)
    config = config_of(FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    model.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    write_tokenizer(tmp_path / "source")
    before = all_tensors(tmp_path / "source")
    record = write(tmp_path / "source", tmp_path / "out", light(), windows=WINDOWS % config.vocab_size)
    after = all_tensors(tmp_path / "out")
    learned = [name for name in before if name.endswith(("norm.weight", "bias"))]
    assert learned and {name.endswith("bias") for name in learned} >= {family == "qwen2"}
    assert [name for name in learned if torch.equal(before[name], after[name])] == []
    assert min(look["held_out"] for look in record["tuning"]) < record["tuning"][0]["held_out"]


@pytest.mark.parametrize(
    "changes", [{}, LIGHT_FIRST | {"tuning__rollouts": 0.2}, POLISHED], ids=["light", "light first", "polished"]
)
@pytest.mark.parametrize("at", [3, 9, 14])
def test_a_killed_run_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], at: int
) -> None:
    monkeypatch.setattr(loop, "KEEP_SECONDS", 0.0)
    chosen = light(**changes)
    write(source, tmp_path / "whole", chosen, windows=WINDOWS)
    steps, count = torch.optim.Adam.step, 0

    def interrupted(self: Any, *arguments: Any, **keywords: Any) -> Any:
        nonlocal count
        count += 1
        if count == min(at, 10 if not changes else at):
            raise KeyboardInterrupt
        return steps(self, *arguments, **keywords)

    monkeypatch.setattr(torch.optim.Adam, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(source, tmp_path / "one", chosen, windows=WINDOWS)
    write(source, tmp_path / "one", chosen, windows=WINDOWS, resume=True)
    assert without_run(digests(tmp_path / "one")) == without_run(digests(tmp_path / "whole"))


def test_light_steps_come_before_the_others(source: Path) -> None:
    more = {"tuning__steps": 36, "tuning__batch_windows": 8, "tuning__offset_rate": 0.01}
    checks = pipeline.quantize(source, light(**LIGHT_FIRST | more), windows=random_windows(40, 32)).record.tuning
    assert checks is not None
    assert [check.step for check in checks] == [0, 2, 4, 6, 6, 18, 30, 42]
    best = min(check.held_out for check in checks[:4])
    assert checks[4].held_out == pytest.approx(best, rel=1e-5) and best < checks[0].held_out
    assert min(check.held_out for check in checks[4:]) < best


def test_a_polish_comes_last_and_leaves_codes(source: Path) -> None:
    """It starts at the best of what came before it, moves gains and transforms, and ends no worse."""
    more = {"tuning__steps": 36, "tuning__batch_windows": 8, "tuning__offset_rate": 0.01}
    with_it, without = (
        pipeline.quantize(source, light(**POLISHED | more | changes), windows=random_windows(40, 32))
        for changes in ({}, dict.fromkeys((f"tuning__{key}" for key in ROUNDING_HAS_NONE), 0))
    )
    checks, before = with_it.record.tuning, without.record.tuning
    assert checks is not None and before is not None
    assert [check.step for check in checks] == [0, 12, 24, 36, 36, 38, 40, 42]
    assert checks[:4] == before
    best = min(check.held_out for check in before)
    assert checks[4].held_out == pytest.approx(best, rel=1e-5)
    assert min(check.held_out for check in checks[4:]) < best
    codes = [
        {name: tensor for name, tensor in result.model.named_parameters() if name.endswith("weight_packed")}
        | {name: tensor for name, tensor in result.model.named_buffers() if name.endswith("weight_packed")}
        for result in (with_it, without)
        if result.model is not None
    ]
    assert codes[0] and codes[0].keys() == codes[1].keys()
    assert all(torch.equal(tensor, codes[1][name]) for name, tensor in codes[0].items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("changes", [{}, {"tuning__scope": "block"}, LIGHT_FIRST], ids=["network", "block", "first"])
def test_on_a_gpu_it_gets_better_and_a_seed_gives_the_same_bits(source: Path, changes: dict[str, Any]) -> None:
    def run() -> tuple[list[Tensor], list[float]]:
        chosen = light(**{"tuning__steps": 60, "tuning__light_steps": 0} | changes)
        result = pipeline.quantize(source, chosen, windows=random_windows(80, 32), device="cuda")
        assert result.model is not None
        looks = result.record.tuning or result.record.blocks[0].tuning
        assert looks is not None
        return [value.data for value in result.model.parameters()], [look.held_out for look in looks]

    one, two = run(), run()
    assert min(one[1]) < 0.95 * one[1][0] and one[1] == two[1]
    assert all(torch.equal(first, second) for first, second in zip(one[0], two[0], strict=True))


def test_what_was_learned_writes_text(source: Path, tmp_path: Path) -> None:
    """The checkpoint continues a prompt as the model in memory does, here and under transformers."""
    write(source, tmp_path / "out", light(), windows=WINDOWS)
    in_memory = pipeline.quantize(source, light(), windows=WINDOWS).model
    assert in_memory is not None
    tokenizer = api.load_tokenizer(tmp_path / "out")
    prompt = "Once upon a time"
    expected = api.generate_text(in_memory, tokenizer, prompt, max_tokens=12)
    assert expected and api.generate_text(load(tmp_path / "out", "cpu"), tokenizer, prompt, max_tokens=12) == expected
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    written = theirs.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert tokenizer.decode(written, skip_special_tokens=True) == expected


def test_gains_move_beside_rounding(source: Path, tmp_path: Path) -> None:
    closed = {"transform__brake": 1.0, "calibration__held_out": 0.0}
    chosen = light(tuning__moves="rounding", tuning__scale_rate=0.0, tuning__bias_rate=0.0, **closed)
    record = write(source, tmp_path / "out", chosen, windows=WINDOWS)
    before, after = all_tensors(source), all_tensors(tmp_path / "out")
    assert all(not torch.equal(before[name], after[name]) for name in before if name.endswith("norm.weight"))
    assert min(look["held_out"] for look in record["tuning"]) < record["tuning"][0]["held_out"]


def test_the_quantized_model_writes_rollouts(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrote: list[tuple[str, bool, int]] = []
    seen: list[Tensor] = []
    after, tune = Writing.after, distilling.tune_network

    def noted(self: Writing, writer: Any, windows: Tensor, *more: Any) -> Tensor:
        is_quantized = any(isinstance(module, QuantLinear) for module in writer.modules())
        wrote.append((self.purpose, is_quantized, len(windows)))
        return after(self, writer, windows, *more)

    monkeypatch.setattr(Writing, "after", noted)
    monkeypatch.setattr(distilling, "tune_network", lambda *a: (seen.append(a[3]), tune(*a))[1])
    pipeline.quantize(source, light(tuning__generated=0.1, tuning__rollouts=0.2, tuning__steps=1), windows=WINDOWS)
    assert wrote == [("tuning", False, 20), ("rollouts", True, 22)]
    assert seen[0].shape == (26, 32) and torch.equal(seen[0][:20], WINDOWS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tuning.light_steps": 5}, 'light_steps 5 must not be negative, and 0 unless scope = "network" and moves'),
        ({"tuning.polish_steps": 5}, 'polish_steps 5 must not be negative, and 0 unless scope = "network" and moves'),
        ({"tuning.light_norm_rate": 0.1}, "light_norm_rate 0.1 needs light_steps or polish_steps"),
        ({"tuning.scope": "block", "tuning.generated": 0.0, "tuning.rollouts": 1.0}, "rollouts 1.0 must be finite"),
        ({"tuning.scope": "block"}, "generated 8.0 must be finite"),
        ({"tuning.bias_rate": -1.0}, "bias_rate -1.0 is negative or not finite"),
        ({"tuning.moves": "rounding"}, 'scale_rate 0.001 needs moves = "gains", light_steps or'),
        (
            {f"tuning.{name}_rate": 0.0 for name in ("norm", "scale", "bias", "transform")},
            'moves = "gains" learns nothing',
        ),
        ({"activations": "none"}, "tuning needs quantized activations"),
    ],
    ids=str,
)
def test_what_cannot_be_learned(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        recipe("mxrot-light").changed(changes)
    assert message in str(raised.value)
