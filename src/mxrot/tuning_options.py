"""The tables of a recipe for the steps after rounding: a refit in closed form, and training."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from mxrot.errors import ConfigError
from mxrot.typed import check_fields


@dataclass(frozen=True)
class Refit:
    """A second fit of transforms in closed form, after the codes of their site are known."""

    damping: float = 0.01
    """How strongly a transform is kept where it is, relative to the mean diagonals of the matrices of the fit."""

    def __post_init__(self) -> None:
        check_fields(self, "refit")
        if not 0 < self.damping < math.inf:
            raise ConfigError(f"refit: damping must be positive and finite, got {self.damping}")


@dataclass(frozen=True)
class Tuning:
    """How to tune rounding and transforms after the closed-form steps."""

    scope: Literal["network", "block"] = "network"
    """"network": distill the whole network's logits; "block": reconstruct one decoder block after the other."""
    moves: Literal["rounding", "clipping", "levels", "gains"] = "rounding"
    """"rounding": codes, transforms and exponents. "clipping": the ends of each block of weights, which are then
    rounded to nearest again between these ends (only with scope "block"). "levels": for look-up formats, the weights,
    and the ends and partition of their blocks (only with scope "network"). "gains": 16-bit numbers beside fixed codes,
    which are gains of norms, biases and transforms."""
    loss: Literal["forward", "weighted"] = "forward"
    """The loss of the logits with scope "network". "forward": KL(original || quantized). "weighted": this and the
    reverse KL, weighted by the mean probability of the text."""
    steps: int = 400
    """Optimizer steps: in total with scope "network", for each block with scope "block"."""
    light_steps: int = 0
    """Optimizer steps before these, which train only what moves = "gains" trains, at the rates for these steps. Only
    with scope "network" and moves = "rounding"."""
    polish_steps: int = 0
    """The same after these steps, once the codes are fixed."""
    generated: float = 0.0
    """Windows that the original model writes only for tuning, for each window of the calibration text. Only with scope
    "network"."""
    rollouts: float = 0.0
    """Windows that the quantized model writes before it is tuned, for each window of the calibration text. Only with
    scope "network"."""
    prompted: float = 0.0
    """The share of written windows that continue a piece of the calibration text instead of a random token. Without
    `generated` and `rollouts`, this and `repeats` have no effect."""
    repeats: int = 1
    """How often a window of the calibration text is used for each use of a window that a model has written."""
    batch_windows: int = 4
    """Calibration windows in each step."""
    offset_rate: float = 4e-3
    """The peak learning rate of the rounding offsets, in steps between codes. With "levels", that of the weights, in
    thirds of the initial span of the levels of their block. With 0 they do not change."""
    transform_rate: float = 1e-4
    """The peak learning rate of the corrections of transforms. With 0 the transforms do not change."""
    exponent_rate: float = 0.0
    """The peak learning rate of the exponents of weight scales, in binades. With 0 they do not change."""
    clip_rate: float = 1e-2
    """The peak learning rate of the ends of blocks of weights, if they are learned."""
    level_rate: float = 1e-2
    """With "levels": the peak learning rate of the inner levels of blocks, before the sigmoid. With 0 they do not
    change."""
    boundary_rate: float = 1e-2
    """With "levels": the peak learning rate of the boundaries between the levels. With 0 they do not change."""
    norm_rate: float = 0.0
    """The peak learning rate of the gains of norms, relative to their values. With "levels", that of the gains in
    decoder blocks, in absolute terms. With 0 they do not change."""
    scale_rate: float = 0.0
    """With "gains": the peak learning rate of a factor for each input channel of a transform, if no norm before it has
    a gain that is learned. With 0 there are no factors."""
    bias_rate: float = 0.0
    """With "gains": the peak learning rate of biases, relative to their values and their mean magnitude. With 0 they do
    not change."""
    light_transform_rate: float = 1e-3
    """In the light steps and the polish: the peak learning rate of the corrections of transforms, which weights do not
    follow. With 0 the transforms do not change."""
    light_norm_rate: float = 0.0
    """In the light steps and the polish: the peak learning rate of the gains of norms. 0 takes `norm_rate`, which also
    moves them during rounding."""
    decay: float = 0.0
    """How strongly offsets are pulled back to their start: in each step by rate * decay of the distance."""
    held_out: float = 0.1
    """The share of calibration windows that are never trained on. Their loss decides when to stop."""
    margin: float = 0.01
    """The least distance of a weight from a change of its code at the start, in steps between codes. With a large
    value no code changes for many steps, and then many change at once (docs/log.md)."""
    reach: float = 1.0
    """How far a weight may move, in steps from its code to its neighbour on that side. With inf, weights are trained
    freely on the grid of their scales."""
    checks: int = 20
    """How often the held-out loss is measured, evenly spaced over the steps."""
    patience: int = 4
    """Tuning stops after this many measurements in a row without a better held-out loss."""

    def __post_init__(self) -> None:
        check_fields(self, "tuning")
        for key in ("steps", "repeats", "batch_windows", "checks", "patience"):
            if getattr(self, key) < 1:
                raise ConfigError(f"tuning: {key} must be at least 1, got {getattr(self, key)}")
        rates = self.offset_rate, self.transform_rate, self.exponent_rate
        moves = self.offset_rate > 0 or self.moves in ("levels", "gains")
        if not (moves and all(0 <= rate < math.inf for rate in rates)):
            raise ConfigError(
                "tuning: offset_rate must be positive, transform_rate and exponent_rate not negative, all finite"
            )
        self._check_gains()
        if self.moves == "clipping" and self.scope != "block":
            raise ConfigError(f'tuning: moves = "clipping" needs scope = "block", got {self.scope!r}')
        if self.moves == "levels" and self.scope != "network":
            raise ConfigError(f'tuning: moves = "levels" needs scope = "network", got {self.scope!r}')
        if self.loss != "forward" and self.scope != "network":
            raise ConfigError(f'tuning: loss = {self.loss!r} is of logits and needs scope = "network"')
        for key in ("level_rate", "boundary_rate"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ConfigError(f"tuning: {key} {getattr(self, key)} is negative or not finite")
        if not 0 < self.clip_rate < math.inf:
            raise ConfigError(f"tuning: clip_rate {self.clip_rate} is not positive and finite")
        for key in ("generated", "rollouts"):
            each = getattr(self, key)
            if not 0 <= each < math.inf or (each and self.scope == "block"):
                raise ConfigError(
                    f'tuning: {key} {each} must be finite and not negative, and 0 with scope "block", '
                    "which sees the windows of the calibration only (calibration.generated)"
                )
        if not 0 <= self.prompted <= 1:
            raise ConfigError(f"tuning: prompted {self.prompted} is not a share from 0 to 1")
        if not 0 <= self.decay < math.inf:
            raise ConfigError(f"tuning: decay {self.decay} is negative or not finite")
        if not 0 < self.margin <= 0.5:
            raise ConfigError(f"tuning: margin {self.margin} is not above 0 and at most 0.5")
        if not self.reach >= 1:
            raise ConfigError(f"tuning: reach {self.reach} is not at least 1, the way to a neighbouring code")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"tuning: held_out {self.held_out} is not between 0 and 1")

    def _check_gains(self) -> None:
        for key in ("norm_rate", "scale_rate", "bias_rate", "light_transform_rate", "light_norm_rate"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ConfigError(f"tuning: {key} {getattr(self, key)} is negative or not finite")
        if self.norm_rate and self.moves == "clipping":
            raise ConfigError(f'tuning: norm_rate {self.norm_rate} has nothing to learn with moves = "clipping"')
        has_stages = self.light_steps > 0 or self.polish_steps > 0
        lightly = self.moves == "gains" or has_stages
        for key in ("scale_rate", "bias_rate"):
            if getattr(self, key) and not lightly:
                raise ConfigError(
                    f'tuning: {key} {getattr(self, key)} needs moves = "gains", light_steps or polish_steps, got '
                    f"{self.moves!r}, 0 and 0"
                )
        if self.light_norm_rate and not has_stages:
            raise ConfigError(f"tuning: light_norm_rate {self.light_norm_rate} needs light_steps or polish_steps")
        for key in ("light_steps", "polish_steps"):
            steps = getattr(self, key)
            if steps < 0 or (steps and (self.scope, self.moves) != ("network", "rounding")):
                raise ConfigError(
                    f'tuning: {key} {steps} must not be negative, and 0 unless scope = "network" and '
                    f'moves = "rounding", got {self.scope!r} and {self.moves!r}'
                )
        if lightly and not any(group for group in self.light.rates_of_gains):
            raise ConfigError(
                'tuning: moves = "gains" learns nothing, since norm_rate, scale_rate, bias_rate and the rate of '
                "transforms are 0"
            )

    @property
    def rates_of_gains(self) -> tuple[float, ...]:
        """The learning rates of moves = "gains"."""
        return self.norm_rate, self.scale_rate, self.bias_rate, self.transform_rate

    @property
    def light(self) -> Tuning:
        """The settings for tuning with fixed codes: these if moves = "gains", otherwise those of light steps."""
        return self if self.moves == "gains" else self._gains_for(self.light_steps)

    @property
    def polish(self) -> Tuning:
        """The settings for the polish, after the codes have changed."""
        return self._gains_for(self.polish_steps)

    @property
    def all_steps(self) -> int:
        """The number of steps, with the light steps and the polish."""
        return self.light_steps + self.steps + self.polish_steps

    def _gains_for(self, steps: int) -> Tuning:
        return replace(
            self,
            moves="gains",
            steps=max(1, steps),
            light_steps=0,
            polish_steps=0,
            transform_rate=self.light_transform_rate,
            norm_rate=self.light_norm_rate or self.norm_rate,
            light_norm_rate=0.0,
        )
