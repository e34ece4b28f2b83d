"""A transform that moves while its weights stay: T = diag(s) T_0 R, in the bfloat16 of a checkpoint.

R acts on the quantized channels, which have similar sizes, so one learning rate fits all of it. s acts on the input
channels, if no norm has a gain for each. Neither costs anything at run time, where T is multiplied anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mxrot.layers import InputTransform
from mxrot.transforms import BlockDiagonal
from mxrot.tuning.straight_through import RoundToStored


class MovingTransform(nn.Module):
    """The matrices of a site's last block-diagonal stage, starting from their current values."""

    def __init__(self, transform: InputTransform, width: int) -> None:
        """`width` is that of the inputs. One matrix for all blocks cannot take scales."""
        super().__init__()
        self._transform = (transform,)  # in a tuple, so that it is not registered here
        self.start: Tensor
        self.register_buffer("start", transform.matrices().float(), persistent=False)
        groups, size, _ = self.start.shape
        identity = torch.eye(size, device=self.start.device).expand_as(self.start).contiguous()
        self.correction = nn.Parameter(identity)
        """R, float32 [1 | G, B, B]."""
        takes_scales = groups * size == width
        self.scales = nn.Parameter(torch.ones(groups, size, 1, device=self.start.device)) if takes_scales else None
        """s, float32 [G, B, 1]."""

    @property
    def moves(self) -> bool:
        return self.correction.requires_grad or (self.scales is not None and self.scales.requires_grad)

    def matrices(self) -> Tensor:
        """The matrices T as a checkpoint will hold them, float32 [1 | G, B, B]."""
        if not self.moves:
            return self.start
        with torch.autocast(self.start.device.type, enabled=False):
            turned = self.start @ self.correction if self.correction.requires_grad else self.start
            rounded: Tensor = RoundToStored.apply(turned if self.scales is None else self.scales * turned)
        return rounded

    @torch.no_grad()
    def finish(self) -> None:
        """Set the learned matrices in the transform."""
        found = self.matrices()
        if not torch.equal(found, self.start):
            self._transform[0].weight.data = BlockDiagonal(found.double()).to_stored()
