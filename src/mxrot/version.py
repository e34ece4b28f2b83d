"""The version of mxrot. pyproject.toml takes it from here, and so do CITATION.cff's test and run.json."""

__version__ = "0.1.0"
