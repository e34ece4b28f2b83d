"""The commands of `mxrot`: options in, one call, and tables out."""
