"""Every family block by block, and with windows that are shorter than the text where it has such.

A block alone must compute the bits that it computes in its model. A mask, a rotary embedding or a bound of the logits
that got lost on the way would be seen in the logits.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.contracts.test_families import spread_gains
from tests.contracts.tiny_configs import auto_class, config_of
from tests.tiny_model import write_tokenizer
from tests.unit.checkpoint.folders import digests, recipe, without_run, write
from torch import Tensor
from transformers import PreTrainedModel

import mxrot
from mxrot.api import open_model
from mxrot.calibration import Executor, Manner, block_arguments, first_executor, generated_windows
from mxrot.errors import FamilyError
from mxrot.evaluation import divergence, perplexity
from mxrot.layers import logits_of, shared_heads
from mxrot.models import FAMILIES, Family, find_family
from mxrot.quantizing import block as blockwise
from mxrot.quantizing import run as pipeline

LENGTH = 24
WINDOWS = torch.randint(0, 48, (5, LENGTH), generator=torch.Generator().manual_seed(0))
"""Without the last two tokens: they stand for images where a model sees these, and some classes replace them."""
WINDOW = 4
WITH_WINDOW = {"use_sliding_window": True, "sliding_window": WINDOW}
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
THETAS = {"sliding_attention": 10.0, "full_attention": 1000.0}
LATER = {"sliding_window": WINDOW, "layer_types": ["full_attention", "sliding_attention"]}
OWN_ROTARY = {"olmo3": {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in THETAS.items()}}
"""Of families whose kinds of blocks have rotary embeddings of their own, alike unless a config says otherwise."""


def windowed(family: Family) -> dict[str, Any]:
    """Changes of a config by which some blocks, or all, see four tokens."""
    if family.windows == "all":
        return {"sliding_window": WINDOW}
    order = LATER if len(family.name) % 2 else MIXED  # either kind first
    changes = WITH_WINDOW | order if hasattr(config_of(family).get_text_config(), "use_sliding_window") else order
    return changes | ({"rope_parameters": OWN_ROTARY[family.name]} if family.name in OWN_ROTARY else {})


WINDOWED = {name: (name, windowed(family)) for name, family in FAMILIES.items() if family.windows != "none"}
"""Configs with blocks that see four tokens."""
ALL = {name: (name, {}) for name in FAMILIES} | {f"{name}, windows": chosen for name, chosen in WINDOWED.items()}
ALL["llama, windows that it does not have"] = ("llama", {"sliding_window": WINDOW})
ALL["gemma2, windows everywhere"] = ("gemma2", {"layer_types": MIXED["layer_types"][:1] * 2})
ALL["qwen3, windows nowhere"] = ("qwen3", {"layer_types": LATER["layer_types"][:1] * 2, **WITH_WINDOW})
ALL["granitemoehybrid, without positions"] = ("granitemoehybrid", {"position_embedding_type": None})

each = pytest.mark.parametrize("name", ALL)
each_tuned = pytest.mark.parametrize(
    "name", [f"{name}, windows" for name in WINDOWED if FAMILIES[name].experts is None]
)
"""Experts are not tuned."""
each_windowed = pytest.mark.parametrize("name", [f"{name}, windows" for name in WINDOWED])
each_mixed = pytest.mark.parametrize("name", [name for name in ALL if len({*ALL[name][1].get("layer_types", ())}) == 2])


def family_of(name: str) -> Family:
    return FAMILIES[ALL[name][0]]


def model_of(name: str) -> PreTrainedModel:
    """Random weights that are large enough for attention to have a say."""
    torch.manual_seed(0)
    model = auto_class(family_of(name)).from_config(config_of(family_of(name), **ALL[name][1]))
    for parameter in model.parameters():
        parameter.data *= 10
    spread_gains(model, family_of(name))
    return model.eval().requires_grad_(False)


def executor_of(model: PreTrainedModel, name: str) -> Executor:
    """Three batches: of 2, 2 and 1 windows; before the first block."""
    return first_executor(model, family_of(name), WINDOWS, 2)


def block_by_block(model: PreTrainedModel, name: str, executor: Executor) -> Tensor:
    """Logits of all windows, from decoder blocks that run one after the other."""
    family = family_of(name)
    for block in model.get_submodule(family.blocks).children():
        executor.begin(block)
        executor.advance("a block")
    norm = model.get_submodule(family.final_norm)
    return torch.cat([logits_of(model, norm(hidden)) for hidden in executor.stacked(range(executor.windows)).split(2)])


def whole(model: PreTrainedModel) -> Tensor:
    """The same from the model itself, in the same batches."""
    return torch.cat([model(batch).logits for batch in WINDOWS.split(2)])


@each
def test_block_after_block_is_the_model_bit_for_bit(name: str) -> None:
    model = model_of(name)
    assert torch.equal(block_by_block(model, name, executor_of(model, name)), whole(model))


@each_windowed
def test_without_its_windows_a_model_is_another(name: str) -> None:
    """Else the test above would see nothing."""
    model, wide = model_of(name), model_of(name)
    for module in wide.modules():
        if getattr(module, "sliding_window", None) is not None:
            module.sliding_window = 64
    wide.config.get_text_config().sliding_window = 64
    own, other = whole(model), whole(wide)
    # Experts sum over the tokens that they get, in an order that depends on who else gets there.
    has_experts = FAMILIES[ALL[name][0]].experts is not None
    apart = ((own - other).abs() > has_experts * 1e-6 * own.abs().max()).any(dim=(0, 2))
    assert not apart[:WINDOW].any() and apart[WINDOW:].all()


@each_mixed
@pytest.mark.parametrize("key", ["attention_mask", "position_embeddings"])
def test_every_kind_of_block_has_arguments_of_its_own(name: str, key: str) -> None:
    """With those of the other kind the logits are others."""
    model = model_of(name)
    first, second = executor_of(model, name).arguments
    if key == "position_embeddings" and not hasattr(model.get_submodule(family_of(name).rotary), "layer_types"):
        assert first[key] is second[key]
        return
    for block in (0, 1):
        executor = executor_of(model, name)
        executor.arguments[block][key] = executor.arguments[1 - block][key]
        with suppress(RuntimeError):  # of heads of another width
            assert not torch.equal(block_by_block(model, name, executor), whole(model))


@each_mixed
def test_blocks_of_one_kind_share_their_tensors(name: str) -> None:
    """However many there are."""
    family, changes = family_of(name), ALL[name][1]
    config = config_of(family, **changes | {"num_hidden_layers": 6, "layer_types": changes["layer_types"] * 3})
    torch.manual_seed(0)
    model = auto_class(family).from_config(config)
    arguments = block_arguments(model, family, WINDOWS[:1])
    assert len(arguments) == 6
    for position, keywords in enumerate(arguments):
        for key, value in keywords.items():
            assert value is arguments[position % 2][key]
    for mask in (keywords["attention_mask"] for keywords in arguments[:2]):
        assert mask is None or mask.shape == (1, 1, LENGTH, LENGTH)


@each
def test_no_block_runs_for_the_arguments_of_the_others(name: str) -> None:
    model = model_of(name)
    expected = executor_of(model, name).stacked(range(len(WINDOWS)))
    model.get_submodule(family_of(name).blocks).to("meta")
    assert torch.equal(executor_of(model, name).stacked(range(len(WINDOWS))), expected)
    assert all("forward" not in module.__dict__ for module in model.modules())


@each
def test_logits_of_hidden_states_are_the_models_own(name: str) -> None:
    model = model_of(name)
    hidden = model.get_submodule(family_of(name).body)(WINDOWS).last_hidden_state
    assert torch.equal(logits_of(model, hidden), model(WINDOWS).logits)


def test_the_bounds_of_gemma_2_are_reached() -> None:
    """Else no test would see them."""
    model = model_of("gemma2")
    bounded = model(WINDOWS).logits
    assert 0.45 < bounded.abs().max() <= 0.5
    model.config.final_logit_softcapping = None
    assert model(WINDOWS).logits.abs().max() > 2
    for module in model.modules():
        if hasattr(module, "attn_logit_softcapping"):
            module.attn_logit_softcapping = None
    model.config.final_logit_softcapping = 0.5
    assert not torch.allclose(model(WINDOWS).logits, bounded, atol=1e-3)


@each
def test_measures_are_of_the_models_own_logits(name: str) -> None:
    model, other = model_of(name), model_of(name)
    other.get_output_embeddings().weight.data *= 0.9
    logs, others = (m(WINDOWS).logits[:, :-1].double().log_softmax(dim=-1) for m in (model, other))
    nll = -logs.gather(2, WINDOWS[:, 1:, None]).mean()
    assert perplexity(model, WINDOWS, batch_windows=5).nll == pytest.approx(float(nll), rel=1e-5)
    kl = (others.exp() * (others - logs)).sum(dim=-1).mean()
    assert divergence(model, other, WINDOWS, batch_windows=5).kl == pytest.approx(float(kl), rel=1e-4)


@each
def test_what_a_model_writes_follows_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probabilities that each token was drawn from, beside those of a plain pass over what was written."""
    model = model_of(name)
    seen: list[Tensor] = []
    own = Tensor.softmax
    monkeypatch.setattr(Tensor, "softmax", lambda *a, **k: (seen.append(own(*a, **k)), seen[-1])[1])
    written = generated_windows(model, 3, LENGTH, torch.Generator().manual_seed(0))
    monkeypatch.undo()
    drawn = torch.stack([probabilities for probabilities in seen if probabilities.shape == (3, 50)], dim=1)
    expected = model(written).logits[:, :-1].softmax(dim=-1)
    expected[..., 1] = 0.0  # the end of the text
    torch.testing.assert_close(drawn, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("prompted", [0.0, 1.0])
def test_what_gemma_writes_starts_as_its_texts_do(prompted: float) -> None:
    model = model_of("gemma3, windows")
    begin = model.config.bos_token_id
    text = torch.nn.functional.pad(WINDOWS[:, 1:], (1, 0), value=begin)
    text[:, 1:][text[:, 1:] == begin] = begin + 1
    written = generated_windows(model, 3, LENGTH, torch.Generator().manual_seed(0), text, Manner(prompted=prompted))
    assert (written[:, 0] == begin).all()
    pieces = {tuple(row.tolist()) for window in text for row in window[1:].unfold(0, 4, 1)}
    assert all((tuple(row[1:5].tolist()) in pieces) == (prompted == 1) for row in written)


@each_windowed
def test_shared_heads_attend_alike(name: str) -> None:
    model = model_of(name)
    expected = whole(model)
    with shared_heads(model):
        torch.testing.assert_close(whole(model), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def folder(name: str, tmp_path: Path) -> Path:
    model_of(name).bfloat16().save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    return tmp_path / "model"


@each_windowed
def test_what_is_loaded_is_what_was_quantized(name: str, folder: Path, tmp_path: Path) -> None:
    chosen = recipe("mxrot", calibration__generated=0.5)
    quantized = pipeline.quantize(folder, chosen, windows=WINDOWS).model
    assert quantized is not None
    write(folder, tmp_path / "out", chosen, windows=WINDOWS)
    assert torch.equal(whole(mxrot.load(tmp_path / "out", device="cpu")), whole(quantized))


@pytest.mark.parametrize("name", ["qwen2, windows", "gemma3, windows"])
def test_a_run_that_goes_on_sees_the_same(name: str, folder: Path, tmp_path: Path) -> None:
    """Killed behind the first block: what the second is called with follows from one that is not quantized again."""
    chosen = recipe("mxrot", calibration__generated=0.0)
    write(folder, tmp_path / "whole", chosen, windows=WINDOWS)

    def kill(done: int, total: int, what: str) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(folder, tmp_path / "killed", chosen, windows=WINDOWS, resume=True, progress=kill)
    write(folder, tmp_path / "killed", chosen, windows=WINDOWS, resume=True)
    assert without_run(digests(tmp_path / "killed")) == without_run(digests(tmp_path / "whole"))


def test_a_model_with_soft_caps_is_opened_with_attention_that_has_them(tmp_path: Path) -> None:
    """Gemma 3 would run by PyTorch's own: before quantization, after it, and saved again by transformers."""
    config = config_of(FAMILIES["gemma3"], attn_logit_softcapping=0.5)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    write(tmp_path / "model", tmp_path / "out", recipe("rtn"), windows=None)
    loaded = mxrot.load(tmp_path / "out", device="cpu")
    loaded.save_pretrained(tmp_path / "saved")
    opened = [loaded, mxrot.load(tmp_path / "saved", device="cpu"), open_model(tmp_path / "model", "cpu")[0]]
    assert [model.config._attn_implementation for model in opened] == ["eager"] * 3


TUNING = {"tuning__steps": 2, "tuning__batch_windows": 3, "tuning__held_out": 0.4, "calibration__generated": 0.0}
"""Two of five windows are held out."""


def is_mean_of_two(found: float, losses: Tensor) -> bool:
    """Starting offsets differ a little from what was rounded away."""
    pairs = [float(losses[[i, j]].mean()) for i in range(len(losses)) for j in range(i)]
    return min(abs(found / pair - 1) for pair in pairs) < 0.02


@each_tuned
def test_distillation_starts_from_the_divergence_of_the_models(name: str, folder: Path) -> None:
    before = pipeline.quantize(folder, recipe("mxrot", calibration__generated=0.0), windows=WINDOWS).model
    assert before is not None
    original = auto_class(family_of(name)).from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logs, wanted = (m(WINDOWS).logits.log_softmax(dim=-1) for m in (before, original))
    losses = (wanted.exp() * (wanted - logs)).sum(dim=-1).mean(dim=1)
    checks = pipeline.quantize(
        folder, recipe("mxrot", tuning__scope="network", **TUNING), windows=WINDOWS
    ).record.tuning
    assert checks is not None and is_mean_of_two(checks[0].held_out, losses)


@each_tuned
def test_reconstruction_starts_from_the_error_of_the_block(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[Tensor] = []
    own = blockwise.tune_block

    def noting(executor: Executor, original: Executor, *more: Any) -> Any:
        found, expected = (torch.cat(list(one.outputs())) for one in (executor, original))
        errors.append(((found - expected).square().sum(-1) / expected.square().sum(-1)).mean(dim=1))
        return own(executor, original, *more)

    monkeypatch.setattr(blockwise, "tune_block", noting)
    chosen = recipe("mxrot", tuning__scope="block", **TUNING)
    reports = pipeline.quantize(folder, chosen, windows=WINDOWS).record.blocks
    for report, losses in zip(reports, errors, strict=True):
        assert report.tuning is not None and is_mean_of_two(report.tuning[0].held_out, losses)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "llama",
            {"layer_types": LATER["layer_types"], "sliding_window": 4},
            "llama all .* not supported$",
        ),
        (
            "gemma2",
            {"layer_types": ["full_attention", "chunked_attention"]},
            "1 is of type .chunked_att",
        ),
        ("qwen3", {"layer_types": LATER["layer_types"], "use_sliding_window": False}, "without sliding_window$"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention: not a causal language model$"),
    ],
)
def test_blocks_of_other_kinds_are_refused(name: str, changes: dict[str, Any], message: str) -> None:
    config = config_of(FAMILIES[name])
    for key, value in changes.items():
        setattr(config, key, value)
    with pytest.raises(FamilyError, match=rf"^here: .*{message}"):
        find_family(config, "here")


@pytest.mark.parametrize(
    ("kind", "architecture"), [("gemma3", "Gemma3ForCausalLM"), ("llava", "LlavaForConditionalGeneration")]
)
def test_a_model_of_more_than_text_that_no_family_describes_is_refused(kind: str, architecture: str) -> None:
    """Whatever it says that it is."""
    config = transformers.AutoConfig.for_model(kind, architectures=[architecture])
    with pytest.raises(FamilyError, match=rf"^here: architecture {architecture}: a model of more than text"):
        find_family(config, "here")
