"""The version of mxrot. pyproject.toml takes it from here, and so does run.json."""

__version__ = "0.2.0"
