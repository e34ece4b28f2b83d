"""What a quantized head costs and what it saves: perplexity and KL of a model with several heads, and the time of its
product alone, beside the head as it was.

    python benchmarks/head.py --json head.json
    python benchmarks/head.py --text wikitext=wiki.test.raw --windows 8 --seq-len 512 --device cpu --no-speed

Accuracy: the last hidden states of the original and of the model that each recipe makes are computed once, and every
head, `--heads`, makes logits of them. That is what `mxrot quantize --head` gives: how the head is rounded changes
nothing in the blocks. A head is written as for `--head`; a scale rule and a transform may follow behind colons.

Speed: x W^T for a weight [128256, 4096] (that of an 8B model), recorded as CUDA graphs, bfloat16 beside each head, in
turns. Ends with 1, and prints no speed, where an error is more than 1.1 times that of the bfloat16 product of the same
numbers, each relative to float64.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mxrot import api
from mxrot.bench.timing import ceilings, seconds_of_each
from mxrot.environment import device_name, versions
from mxrot.evaluation.divergence import divergence_of_means, means_of_states
from mxrot.evaluation.perplexity import states_of
from mxrot.layers import HeadLinear, InputTransform
from mxrot.layers.prepare import prepare_site
from mxrot.models import fill
from mxrot.opening import open_model
from mxrot.quantizing.head import rounded_head
from mxrot.recipe import load_recipe
from mxrot.scheme import SiteScheme, head_scheme
from mxrot.sections import HeadChoice
from mxrot.text import Windows
from mxrot.tokenizing import read_texts

AS_IT_WAS = "as it was"
HEADS = "mxint8,mxfp8,mxfp8::hadamard,mxfp4,mxfp4::none,mxfp4/mxfp4"
MOST_ERROR = 1.1
"""Relative to that of a bfloat16 product."""
CHECKED_ROWS = 2048
"""Rows of the weight whose products are compared with float64."""


def main() -> None:
    options = parse_options()
    device = torch.device(options.device or api.default_device())
    record: dict[str, Any] = {"command": shlex.join(sys.argv), "device": device_name(device), "versions": versions()}
    record["commit"] = options.commit
    is_right = True
    if options.accuracy:
        texts = read_texts(options.model, options.text, windows=options.windows, seq_len=options.seq_len)
        record |= {"model": options.model, "texts": {part.text.name: part.text.digest for part in texts}}
        record |= {"windows": options.windows, "seq_len": options.seq_len, "samples": options.samples}
        record |= {"calib_seq_len": options.calib_seq_len, "accuracy": accuracy(options, texts, str(device))}
    if options.speed:
        record |= {"shape": options.shape, "ceilings": ceilings(device), "speed": speed(options, device)}
        is_right = all(row["is_right"] for row in record["speed"])
    if options.json is not None:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
    if not is_right:
        sys.exit(1)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--recipes", default="rtn,duquant++", help="separated by commas")
    parser.add_argument("--heads", default=HEADS, help="separated by commas")
    parser.add_argument("--text", action="append", default=[], help="as for mxrot eval; demo unless told")
    parser.add_argument("--calib", default="demo")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--calib-seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--shape", type=int, nargs=2, default=(128256, 4096), metavar=("N", "K"))
    parser.add_argument("--rows", type=int, nargs="+", default=(1, 8, 32, 128))
    parser.add_argument("--no-accuracy", dest="accuracy", action="store_false")
    parser.add_argument("--no-speed", dest="speed", action="store_false")
    parser.add_argument("--commit", help="what is measured")
    parser.add_argument("--device")
    parser.add_argument("--json")
    found = parser.parse_args()
    found.text = found.text or ["demo"]
    return found


def scheme_of(named: str) -> SiteScheme:
    """What `--head NAME` installs, of NAME[:RULE[:TRANSFORM]]."""
    name, rule, transform = [*named.split(":"), "", ""][:3]
    table = vars(HeadChoice.named(name)) | {"rule": rule} | ({"transform": transform} if transform else {})
    found = head_scheme(load_recipe("rtn").changed({f"head.{key}": value for key, value in table.items()}))
    assert found is not None
    return found


def quantized(scheme: SiteScheme, weight: Tensor, bias: Tensor | None, device: torch.device | str) -> HeadLinear:
    """The head of this weight as a checkpoint has it."""
    outer = {"head.weight": weight} | ({} if bias is None else {"head.bias": bias})
    linear = HeadLinear(weight.shape[1], weight.shape[0], scheme.weights, scheme.activations, bias, device)
    if scheme.stages:
        linear.own_transform("head", InputTransform.empty(scheme.stages, weight.shape[1], device))
    tensors = rounded_head(scheme, "head", outer, device).tensors
    fill(linear, {name: tensor.to(device) for name, tensor in tensors.items()}, "head")
    if torch.device(device).type == "cuda":
        prepare_site((linear,))
    return linear


@torch.no_grad()
def accuracy(options: argparse.Namespace, texts: Sequence[Windows], device: str) -> list[dict[str, Any]]:
    """KL and perplexity of each recipe with each head, on each text."""
    original, _ = open_model(options.model, device)
    expected = {part.text.name: states(original, part.ids, device) for part in texts}
    rows = []
    for recipe in [AS_IT_WAS, *filter(None, options.recipes.split(","))]:
        model = original if recipe == AS_IT_WAS else quantized_model(options, recipe, device)
        own = model.get_output_embeddings()
        for head in [AS_IT_WAS, *options.heads.split(",")]:
            made = own if head == AS_IT_WAS else quantized(scheme_of(head), own.weight.detach(), own.bias, device)
            for part in texts:
                name = part.text.name
                hidden = expected[name] if model is original else states(model, part.ids, device)
                means = []
                for ids, inputs, wanted in zip(part.ids.split(1), hidden, expected[name], strict=True):
                    moved = (made, inputs.to(device), own, wanted.to(device), ids.to(device))
                    means.append(means_with(model, original, *moved).double().cpu())
                found = divergence_of_means(torch.cat(means, dim=1), part.ids)
                rows.append({"recipe": recipe, "head": head, "text": name} | vars(found))
                print(
                    f"{recipe}, head {head}, {name}: KL {found.kl:.5f} +- {found.kl_error:.5f}, perplexity "
                    f"{found.ppl:.3f} (original {found.original_ppl:.3f}), agreement {found.agreement:.4f}",
                    flush=True,
                )
    return rows


def means_with(
    model: Any, original: Any, head: nn.Module, hidden: Tensor, own: nn.Module, wanted: Tensor, ids: Tensor
) -> Tensor:
    """As `means_of_states`, with another head in the model, which the original does not have."""
    changed = Headed(model.config, type(model), head)
    kept = Headed(original.config, type(original), original.get_output_embeddings() if model is not original else own)
    return means_of_states(changed, hidden, kept, wanted, ids)  # type: ignore[arg-type]


class Headed:
    """A model as far as `logits_of` looks at it."""

    def __new__(cls, config: Any, kind: type, head: nn.Module) -> Any:
        """Of the same name, by which its family is known."""
        found = object.__new__(type(kind.__name__, (cls,), {}))
        found.config, found.head = config, head
        return found

    def get_output_embeddings(self) -> nn.Module:
        return self.head  # type: ignore[attr-defined,no-any-return]


def quantized_model(options: argparse.Namespace, recipe: str, device: str) -> Any:
    """By a recipe that leaves the head as it is."""
    calibration = {"calib": options.calib, "samples": options.samples, "seq_len": options.calib_seq_len}
    return api.quantize(options.model, load_recipe(recipe).changed({"head": "none"}), device=device, **calibration)


def states(model: Any, windows: Tensor, device: str) -> list[Tensor]:
    """The last hidden states of each window, on the CPU."""
    return [states_of(model, ids.to(device)).cpu() for ids in windows.split(1)]


@torch.no_grad()
def speed(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Seconds of the product of each head for each number of rows, beside bfloat16."""
    generator = torch.Generator(device).manual_seed(0)
    count, width = options.shape
    weight = torch.randn(count, width, generator=generator, device=device).mul_(width**-0.5).to(torch.bfloat16)
    heads = {name: quantized(scheme_of(name), weight, None, device) for name in options.heads.split(",")}
    rows = []
    for number in options.rows:
        x = torch.randn(number, width, generator=generator, device=device).to(torch.bfloat16)
        calls: dict[str, Callable[[], Tensor]] = {"bf16": partial(F.linear, x, weight)}
        calls |= {name: partial(head, x) for name, head in heads.items()}
        errors = {name: errors_of(head, x) for name, head in heads.items()}
        seconds = seconds_of_each([[call] for call in calls.values()], device)
        for (name, _), taken in zip(calls.items(), seconds, strict=True):
            own, plain = errors.get(name, (0.0, 0.0))
            is_right = own <= MOST_ERROR * plain
            stored = weight.nbytes if name == "bf16" else sum(one.nbytes for one in heads[name].parameters())
            path = "torch" if name == "bf16" else str(heads[name].choose_path(number).path)
            row = {"head": name, "rows": number, "bytes": stored, "path": path, "error": own, "bf16_error": plain}
            row |= {"is_right": is_right, "seconds": vars(taken) if is_right else None}
            row["ratio"] = seconds[0].median / taken.median if is_right else None
            rows.append(row)
            print(described(row, seconds[0].median), flush=True)
    return rows


def errors_of(head: HeadLinear, x: Tensor) -> tuple[float, float]:
    """Of the head, and of a bfloat16 product of the numbers that it multiplies: relative to float64, Frobenius."""
    pieces = torch.linspace(0, head.out_features - 1, min(CHECKED_ROWS, head.out_features), device=x.device).long()
    inputs = head.quantized_input(x)
    values = chosen_weights(head, pieces)
    exact = inputs.double() @ values.double().t()
    plain = inputs.to(torch.bfloat16) @ values.to(torch.bfloat16).t()
    return tuple(float((one.double() - exact).norm() / exact.norm()) for one in (head(x)[:, pieces], plain))


def chosen_weights(head: HeadLinear, rows: Tensor) -> Tensor:
    """Some rows of the weight, float32."""
    some = HeadLinear(head.in_features, len(rows), head.weights, None, device=rows.device)
    some.weight_packed.data = head.weight_packed.data[rows]
    some.weight_scale.data = head.weight_scale.data[rows]
    return some.dequantized_weight()


def described(row: dict[str, Any], plain: float) -> str:
    start = f"head {row['head']} ({row['path']}), {row['rows']} rows: "
    if row["seconds"] is None:
        return f"{start}RED, error {row['error']:.3g}, bfloat16 {row['bf16_error']:.3g}"
    median = row["seconds"]["median"]
    return (
        f"{start}{1e6 * median:.1f} us, {plain / median:.2f} times bf16, {row['bytes'] / median / 1e9:.0f} GB/s of "
        f"weights, error {row['error']:.3g} (bfloat16 {row['bf16_error']:.3g})"
    )


if __name__ == "__main__":
    main()
