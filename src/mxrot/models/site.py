"""Linears of a decoder block that read the same input."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """Linears of a decoder block that read the same input; names are relative to the block."""

    name: str
    """Lower-case letters, digits and underscores; part of tensor names in a checkpoint."""
    linears: tuple[str, ...]
    norm: str | None = None
    """The norm whose output this site reads directly, if there is one: a channel scale can go into its gain."""
    producer: str | None = None
    """The linear whose rows are the channels of this site, up to factors that do not mix channels."""
    rows_before: str | None = None
    """Where there is no producer, because no scale passes what lies between: the linear whose rows become the channels
    of this site one by one, together with those of the others of its site in its module."""
    residual: str | None = None
    """The module whose input is the residual stream that this site's output is added to, if it is."""
    producer_is_value: bool = False
    """The producer is v_proj: under grouped queries one of its rows feeds several channels."""
    keys_beside_values: bool = False
    """Of each head that producer has the rows of a key, and then those of its value."""
    norm_adds_one: bool = False
    """The norm multiplies by 1 + its weight."""
    norm_is_inner: bool = False
    """The norm reads what another site gives, and not the residual stream."""
    experts: str | None = None
    """The module of all experts, where the linears are in these: it reads what they read, each a part of the tokens."""
    routers: tuple[str, ...] = ()
    """Modules that read the same input and are not quantized: what smoothing takes from the norm goes into them."""
    expert: str | None = None
    """The expert that the site is in, where that is one."""
    only_in: str = ""
    """Of decoder blocks that have it, a word of their kind (`Family.kinds_of`); empty for all."""
    kind: str = ""
    """What such sites of all experts are called together; empty for the name."""

    @property
    def group(self) -> str:
        """The name without the number of an expert."""
        return self.kind or self.name

    @property
    def reads_residual(self) -> bool:
        """Does it read a norm of the residual stream?"""
        return self.norm is not None and not self.norm_is_inner

    @property
    def is_of_experts(self) -> bool:
        """Does it see only the tokens that are sent to experts?"""
        return self.experts is not None or self.expert is not None

    @property
    def reader(self) -> str:
        """The module whose input is the site's."""
        return self.experts or self.linears[0]
