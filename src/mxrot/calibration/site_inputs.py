"""What rounding needs of the inputs of a site: their Hessian, and the shift towards the target."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mxrot.calibration import CrossMoment, Executor, Hessian
from mxrot.calibration.site_weights import SiteWeights
from mxrot.formats import TensorQuantizer
from mxrot.kernels import outputs, rotate_quantize
from mxrot.models import Site
from mxrot.rounding.base import Requirements
from mxrot.transforms import SiteTransform
from mxrot.transforms.stages import STORED_DTYPE


def watched_modules(site: Site, requirements: Requirements) -> list[str]:
    """The modules whose inputs rounding needs. The last one's input is the site's."""
    modules = [site.reader]
    if site.residual is not None and (requirements.relative or requirements.target == "residual"):
        modules.insert(0, site.residual)
    return modules


@dataclass(frozen=True)
class SiteInputs:
    """The inputs of a site as its linears will see them, transformed and, unless `quantizer` is None, quantized."""

    executor: Executor
    site: Site
    transform: SiteTransform | None
    """The transform as it is applied, after the rounding of a checkpoint."""
    quantizer: TensorQuantizer | None
    """None for inputs that are not quantized, or not yet."""
    batches: Sequence[int] | None = None
    """Batches of the executor; None for all that is fitted to."""

    def hessian(self, weights: SiteWeights, requirements: Requirements) -> Tensor:
        """The mean of x^T x, float64 [K, K]."""
        hessian = Hessian()
        modules = watched_modules(self.site, requirements)
        parts = weights.parts(self._dtype) if len(modules) > 1 and requirements.relative else None
        for *residual, x in self.executor.watch(modules, self._batches):
            size = None if parts is None else _inverse_size(_outputs(x, parts, weights) + residual[0])
            hessian.update(self._seen(x), size)
        return hessian.result(self.executor.world)

    def hessian_and_shift(
        self, original: Executor, weights: SiteWeights, requirements: Requirements
    ) -> tuple[Tensor, Tensor]:
        """The mean of x^T x [K, K], and that of d^T x [N, K]; float64, the products of a batch in float32.

        d is what the site's outputs lack of the target before its weights are rounded: the original's output minus its
        own and, with target "residual", plus what the residual stream lacks before it. Its own output is linear in x,
        so its part of d^T x is the folded weights times the mean of x^T x.
        """
        modules = watched_modules(self.site, requirements)
        if len(modules) == 1:
            return self._shift_by_moments(original, weights)
        hessian, missing = Hessian(), CrossMoment()
        parts = weights.parts(self._dtype)
        for (here, x), (there, x_original) in self._beside(original, modules):
            seen = self._seen(x)
            wanted = _outputs(x_original, parts, weights)
            stream = wanted + there
            size = _inverse_size(stream) if requirements.relative else None
            goal = stream - here if requirements.target == "residual" else wanted
            hessian.update(seen, size)
            missing.update(goal, seen, size)
        mean = hessian.result(self.executor.world)
        del hessian  # frees its sum
        shift = missing.result(self.executor.world)
        del missing
        for rows in weights.groups:
            shift[rows.place] -= weights.folded(rows) @ mean
        return mean, shift

    def _shift_by_moments(self, original: Executor, weights: SiteWeights) -> tuple[Tensor, Tensor]:
        """The same if d is linear in the two inputs alone: from their second moments, without any output."""
        hessian, cross = Hessian(), CrossMoment()
        for (x,), (x_original,) in self._beside(original, self.site.linears[:1]):
            seen = self._seen(x)
            hessian.update(seen)
            cross.update(x_original, seen)
        mean = hessian.result(self.executor.world)
        del hessian  # frees its sum
        across = cross.result(self.executor.world)
        del cross
        shift = torch.empty(weights.shape, dtype=torch.float64, device=mean.device)
        for rows in weights.groups:
            torch.mm(weights.as_read(rows), across, out=shift[rows.place])
            shift[rows.place] -= weights.folded(rows) @ mean
        return mean, shift

    def _beside(self, original: Executor, modules: Sequence[str]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Batch by batch, the inputs of `modules` here and in the original block; neither runs further."""
        batches = self._batches
        return zip(self.executor.watch(modules, batches), original.watch(modules, batches), strict=True)

    @property
    def _batches(self) -> Sequence[int]:
        return self.executor.fitted if self.batches is None else self.batches

    @property
    def _dtype(self) -> torch.dtype:
        """The type in which the block computes."""
        return self.executor.dtype

    @cached_property
    def _matrices(self) -> Tensor | None:
        found = None if self.transform is None else self.transform.matrices
        return None if found is None else found.to(STORED_DTYPE)

    def _seen(self, x: Tensor) -> Tensor:
        """The inputs as seen, in the shape of `x`; bfloat16 on a GPU if that is exact, else float32."""
        if self.quantizer is None:
            return x.float() if self.transform is None else self.transform.apply(x)
        led = x if self.transform is None else self.transform.lead(x)
        seen = rotate_quantize(led, self._matrices, self.quantizer.format, self.quantizer.rule)
        return seen.to(torch.bfloat16) if seen.is_cuda and self.quantizer.is_exact_in_bfloat16 else seen


def _outputs(x: Tensor, parts: Tensor, weights: SiteWeights) -> Tensor:
    """The outputs of linears with these weights, float32 [windows, tokens, N]; `parts` are `weights.parts`."""
    return outputs(x.flatten(0, -2), parts, weights.shape[0]).unflatten(0, x.shape[:-1])


def _inverse_size(stream: Tensor) -> Tensor:
    """1 / rms of each token [..., 1]. Errors count relative to the rms, as the norm that reads the stream sees them."""
    rms = torch.linalg.vector_norm(stream, dim=-1, keepdim=True) / math.sqrt(stream.shape[-1])
    return 1 / rms.clamp(min=math.sqrt(torch.finfo(stream.dtype).tiny))
