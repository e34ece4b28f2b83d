"""How many bytes of tensors are alive, and the most at any time: counted at every operation."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While open, counts every storage from the operation that makes or first reads it until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, int] = {}

    def _see(self, value: Any) -> None:
        if not isinstance(value, Tensor) or value.is_meta:
            return
        storage = value.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known[key] = size
            self.live += size
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._known.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs or {})):
            self._see(value)
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            self._see(value)
        self.peak = max(self.peak, self.live)
        return result
