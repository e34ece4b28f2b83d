"""What rounding must know of the inputs of a site: their Hessian, and the shift towards what it shall reproduce."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mxrot.calibration import BlockInputs, Hessian, observe_inputs, paired_inputs
from mxrot.kernels import rotate_quantize
from mxrot.layers import TensorQuantizer
from mxrot.models import Site
from mxrot.rounding.base import Target
from mxrot.transforms import BlockTransform


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
    quantizer: TensorQuantizer | None

    def hessian(self) -> Tensor:
        """The mean of x^T x, float64 [K, K]."""
        collector = self._collector()
        observe_inputs(self.block, self.site.linears[0], self.inputs, lambda x: collector.update(self._seen(x)))
        return collector.result()

    def hessian_and_shift(
        self, original: OriginalBlock, weight: Tensor, folded: Tensor, target: Target
    ) -> tuple[Tensor, Tensor]:
        """The mean of x^T x [K, K], and that of d^T x [N, K]; float64, the products of a batch in float32.

        d is what the site's outputs lack of the target while its weights are not rounded: the original's output
        less its own, plus, with target "residual", what the residual stream lacks before it. `weight` [N, K] are
        the weights that read the original inputs, `folded` those that read the transformed ones.
        """
        hessian = self._collector()
        total = torch.zeros(folded.shape, dtype=torch.float64, device=folded.device)
        single, single_folded = weight.to(torch.float32), folded.to(torch.float32)
        residual = self.site.residual if target == "residual" else None
        modules = [self.site.linears[0]] if residual is None else [residual, self.site.linears[0]]
        for pairs in paired_inputs(self.block, self.inputs, original.block, original.inputs, modules):
            x, x_original = pairs[-1]
            seen = self._seen(x)
            hessian.update(seen)
            seen = seen.flatten(0, -2).float()
            missing = x_original.flatten(0, -2).float() @ single.t()
            missing.addmm_(seen, single_folded.t(), alpha=-1)
            if residual is not None:
                here, there = pairs[0]
                missing += (there.float() - here.float()).flatten(0, -2)
            total += missing.t() @ seen
        return hessian.result(), total / hessian.tokens

    def _collector(self) -> Hessian:
        return Hessian(exact_in_bfloat16=self.quantizer is not None and self.quantizer.is_exact_in_bfloat16)

    def _seen(self, x: Tensor) -> Tensor:
        if self.quantizer is None:
            return x.float() if self.transform is None else self.transform.apply(x)
        matrices = None if self.transform is None else self.transform.matrices.to(torch.float32)
        return rotate_quantize(x, matrices, self.quantizer.format, self.quantizer.rule)
