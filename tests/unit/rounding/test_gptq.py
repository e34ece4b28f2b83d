import pytest
import torch
from tests.unit.rounding.textbook_obs import round_columns
from torch import Tensor

from mxrot.errors import ConfigError, NumericsError
from mxrot.formats import Format, get_format
from mxrot.rounding.gptq import GPTQ
from mxrot.rounding.rtn import RoundToNearest

ORDERS = {
    "reached": GPTQ(),
    "walked": GPTQ(scales="walked"),
    "fixed": GPTQ(scales="fixed"),
    "descending": GPTQ(scales="fixed", columns="descending"),
}
orders = pytest.mark.parametrize("method", ORDERS.values(), ids=ORDERS)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(tokens: int, channels: int, seed: int = 0) -> Tensor:
    """Correlated channels of several sizes, like those of a network."""
    mixing = random(channels, channels, seed=seed) + 2 * random(1, channels, seed=seed + 1)
    sizes = torch.logspace(-1, 1, channels, dtype=torch.float64)
    shuffled = sizes[torch.randperm(channels, generator=torch.Generator().manual_seed(seed))]
    return random(tokens, channels, seed=seed + 2) @ mixing * shuffled


def mean_square(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


@orders
@pytest.mark.parametrize("format", ["mxfp4", "mxfp6_e2m3", "int4_g32"])
def test_rtn_wins_on_weights_and_gptq_on_outputs(method: GPTQ, format: str) -> None:
    target = get_format(format)
    rule = target.rule()
    weight, x = random(24, 128, seed=3), inputs(400, 128)
    hessian = mean_square(x)
    by = {
        name: rounding.round(weight, target, rule, hessian, "w").weight.dequantize(torch.float64) - weight
        for name, rounding in (("rtn", RoundToNearest()), ("gptq", method))
    }
    weight_error = {name: float(error.norm()) for name, error in by.items()}
    output_error = {name: float((x @ error.T).norm()) for name, error in by.items()}
    assert weight_error["rtn"] < weight_error["gptq"]
    assert output_error["gptq"] < 0.8 * output_error["rtn"]


CASES = [
    ("mxfp4", "even", "reached"),
    ("mxfp4", "mse", "reached"),
    ("mxfp4", "x3", "reached"),
    ("int4_g32", "absmax", "reached"),
    ("int4_g32_asym", "minmax", "reached"),
    ("mxfp8_e4m3", "floor", "reached"),
    *[
        (format, rule, order)
        for order in ("fixed", "descending")
        for format, rule in (
            ("mxfp4", "even"),
            ("mxfp4", "log256"),
            ("nvfp4", "absmax"),
            ("int4_g32_asym", "minmax"),
            ("mxint8", "rceil"),
        )
    ],
]


@pytest.mark.parametrize(("format", "rule", "order"), CASES)
def test_it_equals_the_textbook_form(format: str, rule: str, order: str) -> None:
    """Code for code, over a Hessian of too few tokens too; the last block of weights is zero."""
    target, method = get_format(format), ORDERS[order]
    for seed, tokens in ((10, 40), (20, 200)):
        weight, x = random(6, 96, seed=seed), inputs(tokens, 96, seed)
        weight[:3, 64:] = 0
        hessian = mean_square(x)
        columns = torch.arange(96)
        if order == "descending":
            columns = hessian.diagonal().argsort(descending=True)
            assert not torch.equal(columns, columns.sort().values)
        expected = round_columns(
            weight, hessian, 0.01, columns.tolist(), target, target.rule(rule), reached=order == "reached"
        )
        got = method.round(weight, target, target.rule(rule), hessian, "w").weight
        # Equal codes under equal scales; decoding multiplies once.
        torch.testing.assert_close(got.dequantize(torch.float64), expected, rtol=1e-15, atol=0)
        assert (expected != target_rtn(weight, target, rule)).any()


def target_rtn(weight: Tensor, format: Format, rule: str) -> Tensor:
    return RoundToNearest().round(weight, format, format.rule(rule), None, "w").weight.dequantize(torch.float64)


def test_fixed_scales_are_those_of_rounding_to_nearest() -> None:
    format = get_format("mxfp4")
    weight, hessian = random(8, 128, seed=4), mean_square(inputs(300, 128))
    expected = RoundToNearest().round(weight, format, format.rule(), None, "w").weight.scales.stored
    for order in ("fixed", "descending"):
        got = ORDERS[order].round(weight, format, format.rule(), hessian, "w").weight
        assert torch.equal(got.scales.stored, expected)
    reached = ORDERS["reached"].round(weight, format, format.rule(), hessian, "w").weight.scales.stored
    assert torch.equal(reached[:, 0], expected[:, 0]) and not torch.equal(reached, expected)


def test_a_row_is_rounded_by_itself() -> None:
    """Rows share the Hessian and nothing else, so any batch of rows gives the same codes."""
    format = get_format("mxfp4")
    weight, hessian = random(8, 64, seed=5), mean_square(inputs(300, 64))
    for method in ORDERS.values():
        together = method.round(weight, format, format.rule(), hessian, "w").weight
        for i in (0, 7):
            alone = method.round(weight[i : i + 1], format, format.rule(), hessian, "w").weight
            assert torch.equal(alone.codes[0], together.codes[i])


def test_the_weights_are_left_as_they_were() -> None:
    weight, hessian = random(4, 64, seed=6), mean_square(inputs(100, 64))
    before = weight.clone(), hessian.clone()
    for method in ORDERS.values():
        method.round(weight, get_format("mxfp4"), get_format("mxfp4").rule(), hessian, "w")
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


@pytest.mark.parametrize("order", ["reached", "fixed", "descending"])  # walked scales may be other ones
def test_a_weight_of_minus_zero_may_lose_its_sign_only(order: str) -> None:
    """Adding a zero correction turns -0 into +0; rounding to nearest keeps it."""
    format = get_format("mxfp4")
    weight = random(4, 64, seed=9)
    weight[:, ::2] = -0.0
    identity = torch.eye(64, dtype=torch.float64)
    got = ORDERS[order].round(weight, format, format.rule(), identity, "w").weight
    expected = RoundToNearest().round(weight, format, format.rule(), None, "w").weight
    assert torch.equal(got.dequantize(), expected.dequantize())
    assert torch.equal(got.codes[:, 1::2], expected.codes[:, 1::2])


@orders
def test_the_damping_that_was_used_is_reported(method: GPTQ) -> None:
    format = get_format("mxfp4")
    weight, hessian = random(4, 64, seed=7), torch.eye(64, dtype=torch.float64)
    assert method.round(weight, format, format.rule(), hessian, "w").damping == 0.01
    # Eigenvalues 1.05 and 0.95 - 1 = -0.05 beside ones: 0.01 of the mean diagonal is too little, 0.1 is enough.
    hessian[2, 3] = hessian[3, 2] = 1.05
    assert method.round(weight, format, format.rule(), hessian, "w").damping == pytest.approx(0.1)


@orders
def test_a_hessian_that_cannot_be_used_names_the_layer(method: GPTQ) -> None:
    format = get_format("mxfp4")
    weight = random(4, 64, seed=8)
    for hessian in (torch.full((64, 64), torch.nan), torch.ones(64, 64) - 100 * torch.eye(64)):
        with pytest.raises(NumericsError, match=r"^model\.layers\.0\.mlp\.up_proj: the Hessian"):
            method.round(weight, format, format.rule(), hessian.double(), "model.layers.0.mlp.up_proj")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": "descending"}, r'columns = "descending" needs scales = "fixed"'),
        ({"damping": 0.0}, r"damping must be positive and finite, got 0\.0"),
        ({"damping": -0.1}, r"damping must be positive and finite, got -0\.1"),
        ({"damping": float("nan")}, r"damping must be positive and finite, got nan"),
        ({"damping": float("inf")}, r"damping must be positive and finite, got inf"),
    ],
    ids=str,
)
def test_options_that_cannot_work(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^rounding gptq: {message}"):
        GPTQ(**options)


@pytest.mark.parametrize(("format", "rule"), [("nvfp4", "absmax"), ("mxfp4", "log256"), ("mxint8", "log256")])
def test_a_rule_over_the_whole_tensor_needs_fixed_scales(format: str, rule: str) -> None:
    target = get_format(format)
    with pytest.raises(ConfigError, match=rf"'{rule}' of {format} looks at the whole tensor; set scales = "):
        GPTQ().check(target, target.rule(rule))
    GPTQ(scales="fixed").check(target, target.rule(rule))
    GPTQ().check(get_format("int4_g32"), get_format("int4_g32").rule("absmax"))


def test_a_walked_exponent_costs_no_more_on_outputs() -> None:
    """Block by block it is the exact objective, so over several problems the sum is lower."""
    format, errors = get_format("mxfp4"), {"reached": 0.0, "walked": 0.0}
    for seed in range(5):
        weight, x = random(48, 128, seed=seed), inputs(400, 128, seed)
        for scales in errors:
            got = ORDERS[scales].round(weight, format, format.rule(), mean_square(x), "w").weight
            errors[scales] += float((x @ (got.dequantize(torch.float64) - weight).T).square().sum())
    assert errors["walked"] < 0.97 * errors["reached"]


@orders
def test_a_shift_is_rounding_the_regression_on_the_inputs(method: GPTQ) -> None:
    """Target y = z V^T of other inputs z: the shift (V C - W H) with C = E[z^T x] leads GPTQ to V C (H + d)^-1 + ..."""
    format = get_format("mxfp4")
    weight, x = random(8, 64, seed=0), inputs(300, 64)
    target = (x + 0.3 * random(300, 64, seed=7)) @ (weight + 0.1 * random(8, 64, seed=8)).T
    hessian = mean_square(x)
    shift = (target - x @ weight.T).T @ x / len(x)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    expected = method.round(weight + shift @ torch.linalg.inv(damped), format, format.rule(), hessian, "w").weight
    got = method.round(weight, format, format.rule(), hessian, "w", shift).weight
    assert torch.equal(got.scales.stored, expected.scales.stored)
    assert (got.codes != expected.codes).double().mean() <= 0.002  # a tie may fall either way after an inverse
    own = method.round(weight, format, format.rule(), hessian, "w").weight
    errors = [float((x @ q.dequantize(torch.float64).T - target).norm()) for q in (got, own)]
    assert errors[0] < errors[1]
