"""What `import torch` runs where mxrot is installed (an entry point in pyproject.toml), which must not fail for it.

torch raises whatever an entry point raises. This stands outside of the package, because a package that is damaged, or
half removed, cannot answer for itself.
"""

from __future__ import annotations


def install() -> None:
    """Let transformers load checkpoints of mxrot; a warning, and never an exception, where mxrot cannot be imported."""
    try:
        from mxrot import autoload

        autoload.install()
    except Exception as error:
        _warn(error)


def _warn(error: Exception) -> None:
    try:
        import warnings

        warnings.warn(
            f"mxrot is installed and does not work ({type(error).__name__}: {error}), so transformers will refuse its "
            "checkpoints; install it again, or remove it with `pip uninstall mxrot`",
            RuntimeWarning,
            stacklevel=3,
        )
    except Exception:
        return  # warnings are errors here, and torch is to be imported all the same
