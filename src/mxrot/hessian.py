"""What rounding must know of the inputs of a site: their Hessian, and the shift towards what it shall reproduce."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from mxrot.calibration import BlockInputs, Hessian, paired_inputs, watched_together
from mxrot.kernels import rotate_quantize
from mxrot.layers import TensorQuantizer
from mxrot.models import Site
from mxrot.rounding.base import Wishes
from mxrot.transforms import BlockTransform
from mxrot.transforms.base import STORED_DTYPE


@dataclass(frozen=True)
class OriginalBlock:
    """A decoder block before quantization, and what it is called with in the original model."""

    block: nn.Module
    inputs: BlockInputs


@dataclass(frozen=True)
class SiteInputs:
    """The inputs of a site as its linears will see them: transformed and quantized."""

    block: nn.Module
    site: Site
    inputs: BlockInputs
    transform: BlockTransform | None
    """As it is applied: bfloat16 numbers."""
    quantizer: TensorQuantizer | None

    def hessian(self, weight: Tensor, wishes: Wishes) -> Tensor:
        """The mean of x^T x, float64 [K, K]; `weight` [N, K] are the weights that read the untransformed inputs."""
        collector = self._collector(wishes)
        single = weight.to(torch.float32)
        for *residual, x in watched_together(self.block, self.inputs, self._modules(wishes)):
            seen = self._seen(x)
            if residual and wishes.relative:
                seen = seen * _inverse_size(x.float() @ single.t() + residual[0].float())
            collector.update(seen)
        return collector.result()

    def hessian_and_shift(
        self, original: OriginalBlock, weight: Tensor, folded: Tensor, wishes: Wishes
    ) -> tuple[Tensor, Tensor]:
        """The mean of x^T x [K, K], and that of d^T x [N, K]; float64, the products of a batch in float32.

        d is what the site's outputs lack of the target while its weights are not rounded: the original's output
        less its own, plus, with target "residual", what the residual stream lacks before it. `weight` [N, K] are
        the weights that read the original inputs, `folded` those that read the transformed ones.
        """
        if self._modules(wishes) == [self.site.linears[0]]:
            return self._shift_by_moments(original, weight, folded, wishes)
        hessian = self._collector(wishes)
        total = torch.zeros(folded.shape, dtype=torch.float64, device=folded.device)
        single, single_folded = weight.to(torch.float32), folded.to(torch.float32)
        modules = self._modules(wishes)
        for streams, (x, x_original) in paired_inputs(
            self.block, self.inputs, original.block, original.inputs, modules
        ):
            here, there = (stream.flatten(0, -2).float() for stream in streams)
            seen = self._seen(x).flatten(0, -2)
            wanted = x_original.flatten(0, -2).float() @ single.t()
            missing = wanted.addmm(seen.float(), single_folded.t(), alpha=-1)
            if wishes.target == "residual":
                missing += there - here
            if wishes.relative:
                size = _inverse_size(wanted + there)
                seen, missing = seen * size, missing * size
            hessian.update(seen)
            total += missing.t() @ seen.float()
        return hessian.result(), total / hessian.tokens

    def _shift_by_moments(
        self, original: OriginalBlock, weight: Tensor, folded: Tensor, wishes: Wishes
    ) -> tuple[Tensor, Tensor]:
        """The same where d is linear in the two inputs alone: from their second moments, without any output."""
        hessian = self._collector(wishes)
        width = weight.shape[1]
        cross = torch.zeros(width, width, dtype=torch.float64, device=weight.device)
        for pairs in paired_inputs(self.block, self.inputs, original.block, original.inputs, self._modules(wishes)):
            x, x_original = pairs[-1]
            seen = self._seen(x).flatten(0, -2)
            hessian.update(seen)
            cross += _product(x_original.flatten(0, -2), seen)
        mean = hessian.result()
        return mean, weight.double() @ (cross / hessian.tokens) - folded.double() @ mean

    def _modules(self, wishes: Wishes) -> list[str]:
        """The modules whose inputs are looked at; the site's first linear is the last of them."""
        modules = [self.site.linears[0]]
        if self.site.residual is not None and (wishes.relative or wishes.target == "residual"):
            modules.insert(0, self.site.residual)
        return modules

    def _collector(self, wishes: Wishes) -> Hessian:
        is_weighted = wishes.relative and self.site.residual is not None
        is_exact = self.quantizer is not None and self.quantizer.is_exact_in_bfloat16
        return Hessian(exact_in_bfloat16=is_exact and not is_weighted)

    @cached_property
    def _matrices(self) -> Tensor | None:
        return None if self.transform is None else self.transform.matrices.to(STORED_DTYPE)

    def _seen(self, x: Tensor) -> Tensor:
        if self.quantizer is None:
            return x.float() if self.transform is None else self.transform.apply(x)
        return rotate_quantize(x, self._matrices, self.quantizer.format, self.quantizer.rule)


def _inverse_size(stream: Tensor) -> Tensor:
    """1 / rms of each token [..., 1]: an error counts relative to it, as the norm that reads the stream sees it."""
    return stream.square().mean(dim=-1, keepdim=True).clamp(min=torch.finfo(stream.dtype).tiny).rsqrt()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a^T b with float32 sums, [rows, n] and [rows, m]; on bfloat16 matrix hardware where both are bfloat16."""
    if a.is_cuda and a.dtype == b.dtype == torch.bfloat16:
        return torch.mm(a.t(), b, out_dtype=torch.float32)
    return a.float().t() @ b.float()
