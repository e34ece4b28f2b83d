"""Observe modules while they run. When a context ends, everything is restored, whatever happened inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class StopForwardError(Exception):
    """Raised by a hook when a forward pass has reached its purpose."""


@contextmanager
def watched_inputs(module: nn.Module, see: Callable[[Tensor], None], stop: bool = False) -> Iterator[None]:
    """While open, `see` gets the input of every call of `module`. With `stop` the forward pass ends there."""

    def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        see(arguments[0])
        if stop:
            raise StopForwardError

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def running(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While open, `module` runs `forward` instead of its own."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
