"""Lets transformers load checkpoints of mxrot, without importing transformers.

`import mxrot` calls `install`. Where mxrot is installed, `import torch` calls it too, through the entry point
`mxrot_autoload` in pyproject.toml. It therefore also runs in programs that do not use mxrot. Every failure here is only
a warning, and transformers is imported as if mxrot were not installed. transformers then refuses checkpoints with
transforms.

transformers finds the code for a quantized checkpoint by the `quant_method` in its config. Here it is
"compressed-tensors", and that code would leave the transforms out. When the transformers module with the two entries of
that method is imported, they are replaced by entries that look for mxrot's marker first.
"""

from __future__ import annotations

import sys

from mxrot.marker import METHOD, ON_LOAD, is_ours

TYPE_CHECKING = False  # typing and importlib.abc would take most of the time of `import mxrot`
if TYPE_CHECKING:
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

MODULE = "transformers.quantizers.auto"


def install() -> None:
    """Replace the entries now if their module is imported, otherwise when it is."""
    if MODULE in sys.modules:
        _try_to_replace(sys.modules[MODULE])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _try_to_replace(module: ModuleType) -> None:
    try:
        replace_entries(module)
    except Exception as error:
        _warn(error)


def _warn(error: Exception) -> None:
    try:
        import warnings

        warnings.warn(
            f"mxrot cannot reach transformers ({type(error).__name__}: {error}), which will not load its checkpoints; "
            "use mxrot.load, or the versions of transformers that mxrot is made for",
            RuntimeWarning,
            stacklevel=2,
        )
    except Exception:
        return  # here warnings are errors, and the program may not use mxrot


def replace_entries(module: ModuleType) -> None:
    """Put mxrot's entries before those of compressed-tensors. mxrot itself is imported only when one is used."""
    configs, quantizers = module.AUTO_QUANTIZATION_CONFIG_MAPPING, module.AUTO_QUANTIZER_MAPPING
    if isinstance(configs.get(METHOD), _Configs):
        return
    own_config, own_quantizer = configs.get(METHOD), quantizers.get(METHOD)

    def quantizer(config: Any, **options: Any) -> Any:
        if not is_ours(config.to_dict()):
            return own_quantizer(config, **options)
        from mxrot.checkpoint.huggingface import MxrotQuantizer

        return MxrotQuantizer(config, **options)

    configs[METHOD], quantizers[METHOD] = _Configs(own_config), quantizer
    quantizers[ON_LOAD] = on_load


def on_load(config: Any, **options: Any) -> Any:
    """The quantizer for `mxrot.MxrotConfig`."""
    from mxrot.checkpoint.huggingface import OnLoadQuantizer

    return OnLoadQuantizer(config, **options)


class _Configs:
    """Stands in for the class of a quantization config. It makes a config from a dictionary."""

    def __init__(self, others: Any) -> None:
        self._others = others

    def from_dict(self, table: dict[str, Any], **options: Any) -> Any:
        if not is_ours(table):
            return self._others.from_dict(table, **options)
        from mxrot.checkpoint.huggingface import CheckpointConfig

        return CheckpointConfig.from_dict(table, **options)


class _Finder:
    """Finds only the module with the entries, through the other finders. The entries are replaced after it has run."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != MODULE:
            return None
        try:
            sys.meta_path.remove(self)
            from importlib.util import find_spec

            spec = find_spec(name)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader)  # type: ignore[assignment] # other methods of Loader are not used
            return spec
        except Exception as error:
            _warn(error)
            return None


class _Loader:
    """Wraps another loader until the module has run. Errors of the module pass through."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _try_to_replace(module)
