"""`python -m mxrot` is the command `mxrot`."""

from mxrot.cli import main

if __name__ == "__main__":
    main()
