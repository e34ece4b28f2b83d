import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.surgery.tiny_llama import VOCABULARY, first_block, tiny_llama
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import mxrot
from mxrot.calibration import Executor, first_executor, placement
from mxrot.calibration.executor import See
from mxrot.calibration.hooks import watched_inputs
from mxrot.errors import NumericsError
from mxrot.models.families.llama import FAMILY as LLAMA

LINEARS = [site.linears[0] for site in LLAMA.sites]
READERS = {"input_layernorm": frozenset({"self_attn"}), "post_attention_layernorm": frozenset({"mlp"})}
WINDOWS = torch.randint(0, VOCABULARY, (5, 6), generator=torch.Generator().manual_seed(0))


def executor_of(model: LlamaForCausalLM) -> Executor:
    """Three batches: of 2, 2 and 1 windows; before the first block."""
    return first_executor(model, LLAMA, WINDOWS, batch_windows=2)


def begun(model: LlamaForCausalLM) -> tuple[nn.Module, Executor]:
    """The first block, and what runs it."""
    block, executor = first_block(model), executor_of(model)
    executor.begin(block)
    return block, executor


def hidden_of(executor: Executor) -> list[Tensor]:
    return list(executor.stacked(range(executor.windows)).split(2))


def hooks_of(model: nn.Module) -> int:
    return sum(len(hooks) for module in model.modules() for hooks in (module._forward_pre_hooks, module._forward_hooks))


def plainly_seen(executor: Executor, linear: str) -> list[Tensor]:
    """Inputs of `linear`, recorded by wrapping its forward, in a full run of the block."""
    seen: list[Tensor] = []
    module = executor.block.get_submodule(linear)
    original = module.forward
    module.forward = lambda x: (seen.append(x.clone()), original(x))[1]  # type: ignore[method-assign]
    try:
        for hidden in hidden_of(executor):
            executor.block(hidden, **executor.keywords)
    finally:
        module.forward = original  # type: ignore[method-assign]
    return seen


def all_equal(one: list[Tensor], two: list[Tensor]) -> bool:
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_the_first_block_sees_the_embeddings() -> None:
    model = tiny_llama()
    executor = executor_of(model)
    assert executor.windows == 5 and list(executor.batches) == [0, 1, 2] and executor.tokens == 30
    embedded = model.get_submodule("model.embed_tokens")(WINDOWS)
    assert torch.equal(executor.stacked(range(5)), embedded)
    assert torch.equal(executor.stacked([4, 1]), embedded[[4, 1]])
    assert hooks_of(model) == 0


def test_only_the_embedding_has_to_hold_weights() -> None:
    model = tiny_llama(torch.float32)
    expected = executor_of(model)
    model.get_submodule("model.layers").to("meta")
    model.get_submodule("model.norm").to("meta")
    assert all_equal(hidden_of(executor_of(model)), hidden_of(expected))


def test_block_after_block_equals_the_model() -> None:
    model = tiny_llama()
    expected = model(WINDOWS, output_hidden_states=True).hidden_states
    executor = executor_of(model)
    for index, block in enumerate(model.get_submodule("model.layers").children()):
        executor.begin(block)
        executor.advance(f"model.layers.{index}")
        got = executor.stacked(range(5))
        if index == 1:  # transformers gives the last one behind the final norm
            got = model.get_submodule("model.norm")(got)
        torch.testing.assert_close(got, expected[index + 1], rtol=1e-12, atol=1e-12)
    assert not torch.equal(expected[1], expected[0])


def test_nan_in_an_output_names_the_block() -> None:
    model = tiny_llama()
    _, executor = begun(model)
    model.get_submodule("model.embed_tokens").weight[WINDOWS[4, 1]] = torch.nan  # type: ignore[index, operator]
    _, broken = begun(model)
    executor.advance("model.layers.0")
    with pytest.raises(NumericsError, match=r"^model\.layers\.0: its output holds NaN or Inf"):
        broken.advance("model.layers.0")


@pytest.mark.parametrize("linear", LINEARS)
def test_observing_one_linear(linear: str) -> None:
    model = tiny_llama()
    _, executor = begun(model)
    expected = plainly_seen(executor, linear)
    seen: list[Tensor] = []
    executor.observe([(linear, seen.append)])
    assert all_equal(seen, expected) and len(seen) == 3
    seen.clear()
    executor.observe([(linear, seen.append)], batches=[0])
    assert all_equal(seen, expected[:1])
    assert hooks_of(model) == 0


def test_the_pass_ends_at_the_linear() -> None:
    model = tiny_llama()
    (block, executor), ran = begun(model), []
    with watched_inputs(block.get_submodule("mlp"), ran.append):
        executor.observe([("self_attn.o_proj", lambda x: None)])
    assert not ran


def test_observing_all_sites_in_one_pass() -> None:
    """The same inputs as in plain passes; nothing behind the last linear runs."""
    model = tiny_llama()
    block, executor = begun(model)
    expected = {linear: plainly_seen(executor, linear) for linear in LINEARS}
    seen: dict[str, list[Tensor]] = {linear: [] for linear in LINEARS}
    runs: list[Tensor] = []
    with watched_inputs(block.get_submodule("input_layernorm"), runs.append):
        executor.observe([(linear, seen[linear].append) for linear in LINEARS])
    assert len(runs) == 3, "one pass a batch"
    assert all(all_equal(seen[linear], expected[linear]) for linear in LINEARS)
    assert hooks_of(model) == 0


def test_observing_nothing_runs_nothing() -> None:
    model = tiny_llama()
    runs: list[Tensor] = []
    block, executor = begun(model)
    with watched_inputs(block.get_submodule("input_layernorm"), runs.append):
        executor.observe([])
    assert not runs


def fail(_: Tensor) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    "watchers",
    [
        [("mlp.down_proj", fail)],
        [(linear, fail) for linear in LINEARS],
        [(LINEARS[0], lambda x: None), (LINEARS[1], fail), (LINEARS[2], fail)],
    ],
    ids=["one", "all", "the second"],
)
def test_hooks_are_gone_after_an_exception(watchers: list[tuple[str, See]]) -> None:
    model = tiny_llama()
    _, executor = begun(model)
    with pytest.raises(ZeroDivisionError):
        executor.observe(watchers)
    assert hooks_of(model) == 0
    assert len(list(executor.outputs())) == 3


def test_hooks_are_gone_when_the_embedding_fails() -> None:
    model = tiny_llama()
    with pytest.raises(IndexError):
        first_executor(model, LLAMA, torch.full((1, 3), VOCABULARY), batch_windows=1)
    assert hooks_of(model) == 0


def test_a_watcher_inside_a_with_block_is_gone_behind_it() -> None:
    linear = nn.Linear(2, 2)
    seen: list[Tensor] = []
    with pytest.raises(ZeroDivisionError), watched_inputs(linear, seen.append):
        linear(torch.ones(1, 2))
        raise ZeroDivisionError
    linear(torch.ones(1, 2))
    assert len(seen) == 1


class Runs:
    """How often each of these submodules of a block computes something."""

    def __init__(self, block: nn.Module, *names: str) -> None:
        self.counts = dict.fromkeys(names, 0)
        for name in names:
            module = block.get_submodule(name)
            module.forward = self._counted(name, module.forward)  # type: ignore[method-assign]

    def _counted(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **keywords: Any) -> Any:
            self.counts[name] += 1
            return forward(*arguments, **keywords)

        return counted


@pytest.mark.parametrize(("limit", "runs"), [(1 << 31, 3), (0, 6), (1, 6)])
def test_inputs_are_kept_for_the_next_pass(limit: int, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or computed again where there is no memory; the same either way, and taken only once."""
    monkeypatch.setattr(placement, "MOST_REMEMBERED", {"cpu": limit})
    block, executor = begun(tiny_llama())
    modules = ["input_layernorm", "self_attn.o_proj"]
    expected = [plainly_seen(executor, name) for name in modules]
    ran = Runs(block, "self_attn.q_proj")
    for keeps in (True, False):
        seen = list(executor.watch(modules, keeps=keeps))
        assert all(all_equal([batch[i] for batch in seen], expected[i]) for i in (0, 1))
    assert ran.counts["self_attn.q_proj"] == runs
    list(executor.watch(modules))
    assert ran.counts["self_attn.q_proj"] == runs + 3, "nothing is kept any more"
    assert hooks_of(block) == 0


def test_memory_for_some_of_the_inputs() -> None:
    block, executor = begun(tiny_llama())
    ran = Runs(block, "self_attn.q_proj")
    list(executor.watch(["self_attn.o_proj"], batches=[1], keeps=True))
    list(executor.watch(["self_attn.o_proj"]))
    assert ran.counts["self_attn.q_proj"] == 3


def test_a_norm_runs_once_and_not_for_what_is_known() -> None:
    """Its readers get the same bits as in a plain pass."""
    block, executor = begun(tiny_llama())
    expected = {name: plainly_seen(executor, name) for name in LINEARS}
    expected["block"] = list(executor.outputs())
    ran = Runs(block, "input_layernorm", "post_attention_layernorm", "self_attn.q_proj")
    executor.begin(block, READERS)
    for name in ("self_attn.q_proj", "self_attn.o_proj"):
        assert all_equal([seen[0] for seen in executor.watch([name])], expected[name])
    assert list(ran.counts.values()) == [3, 0, 3]
    executor.children_done(["self_attn"])
    for name in ("mlp.gate_proj", "mlp.down_proj"):
        assert all_equal([seen[0] for seen in executor.watch([name])], expected[name])
    assert list(ran.counts.values()) == [3, 3, 6]
    assert not executor._known.batches("input_layernorm"), "nobody reads it any more"
    executor.advance("model.layers.0")
    assert list(ran.counts.values()) == [3, 3, 6]
    assert all_equal(hidden_of(executor), expected["block"])
    assert hooks_of(block) == 0


def test_a_child_whose_output_is_wanted_runs_to_its_end() -> None:
    block, executor = begun(tiny_llama())
    expected = plainly_seen(executor, "self_attn.o_proj")
    ran = Runs(block, "self_attn.q_proj", "post_attention_layernorm")
    executor.children_done(["self_attn"])
    assert all_equal([seen[0] for seen in executor.watch(["self_attn.o_proj"])], expected)
    assert executor._known.batches("self_attn") == [0, 1, 2]
    assert list(ran.counts.values()) == [3, 0]
    list(executor.watch(["mlp.gate_proj"]))
    assert list(ran.counts.values()) == [3, 3]
    assert all_equal([seen[0] for seen in executor.watch(["self_attn.o_proj"])], expected)
    assert hooks_of(block) == 0


@pytest.mark.parametrize(
    ("child", "linear", "next_input"),
    [
        ("self_attn", "self_attn.o_proj", "mlp.gate_proj"),
        ("mlp", "mlp.down_proj", None),
    ],
)
def test_a_child_goes_on_from_its_last_linear(child: str, linear: str, next_input: str | None) -> None:
    """With new weights there: what comes behind is as in a plain pass, and nothing before that linear runs again."""
    block, executor = begun(tiny_llama())
    ran = Runs(block, child)
    executor.expect_last(linear)
    list(executor.watch([linear]))
    block.get_submodule(linear).weight *= 2  # type: ignore[operator]
    executor.children_done([child])
    assert ran.counts[child] == 3
    plain = executor.another()
    plain.begin(block)
    if next_input is None:
        found = list(executor.outputs())
        expected = list(plain.outputs())
    else:
        found = [seen[0] for seen in executor.watch([next_input])]
        expected = plainly_seen(plain, next_input)
    assert ran.counts[child] == 6, "three of them in the plain pass"
    assert all_equal(found, expected) and hooks_of(block) == 0


def changed(output: Any) -> Any:
    return (output[0] * 2, output[1])


def longer(output: Any) -> Any:
    return (*output, output[0])


@pytest.mark.parametrize("change", [changed, longer])
def test_a_child_that_does_more_than_pass_on_runs_again(change: Callable[[Any], Any]) -> None:
    block, executor = begun(tiny_llama())
    attention = block.get_submodule("self_attn")
    plain = attention.forward
    attention.forward = lambda *arguments, **keywords: change(plain(*arguments, **keywords))
    executor.expect_last("self_attn.o_proj")
    seen = [seen[0] for seen in executor.watch(["self_attn.o_proj"])]
    executor.children_done(["self_attn"])
    assert len(seen) == 3 and not executor._known.batches("self_attn")


def test_scores_of_attention_are_not_kept() -> None:
    """They are as large as all else together, and no block reads them."""
    model = tiny_llama()
    model.config._attn_implementation = "eager"
    block, executor = begun(model)
    ran = Runs(block, "self_attn")
    expected = list(executor.outputs())
    executor.expect_last("self_attn.o_proj")
    list(executor.watch(["self_attn.o_proj"]))
    executor.children_done(["self_attn"])
    assert all_equal(list(executor.outputs()), expected) and ran.counts["self_attn"] == 6
    seen: list[Any] = []
    handle = block.get_submodule("self_attn").register_forward_hook(lambda *of_a_call: seen.append(of_a_call[-1]))
    list(executor.outputs())
    handle.remove()
    assert len(seen) == 3 and all(isinstance(output, tuple) and output[1] is None for output in seen)


def test_nobody_outside_of_calibration_writes_what_an_executor_keeps() -> None:
    """Others use its verbs. The names are those by which it is known there."""
    package = Path(mxrot.__file__).parent
    written = re.compile(r"\b(executor|original)\.(_\w+|\w+(\[[^]]*\])? *[|+]?= )")
    assert all(written.search(line) for line in ("executor.known |= {}", "part.executor._kept", "original.x[1] = 2"))
    others = [path for path in package.rglob("*.py") if package / "calibration" not in path.parents]
    assert len(others) > 100
    assert not [path.name for path in others if written.search(path.read_text())]
