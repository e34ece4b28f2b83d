"""The command line: its commands are in `mxrot.commands`, thin: they read options, call mxrot.api, and print.

Exit codes: 0 done, 2 bad usage or bad input (one line, no traceback), 1 anything else.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from mxrot.commands.bench import benchmarks
from mxrot.commands.compare import compare, demo
from mxrot.commands.evaluate import evaluate
from mxrot.commands.export import export
from mxrot.commands.generate import generate
from mxrot.commands.inspect import inspect
from mxrot.commands.options import KEPT
from mxrot.commands.plan import plan
from mxrot.commands.quantize import quantize
from mxrot.commands.recipes import recipes
from mxrot.commands.report import report
from mxrot.errors import MxrotError


class _Commands(TyperGroup):
    """Turns what mxrot raises on purpose, a full disk and an interrupt into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MxrotError as error:
            _fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            kept = "finished blocks" if ctx.invoked_subcommand == "quantize" else ctx.meta.get(KEPT)
            _fail("interrupted" + (f"; {kept} are kept, and --resume goes on from them" if kept else ""), 1)
        except BrokenPipeError:  # the reader of standard output went away, as in `mxrot recipes | head`
            raise
        except OSError as error:
            _fail(f"{error.filename or ''}: {error.strerror or error}".lstrip(": "), 1)


app = typer.Typer(
    cls=_Commands,
    rich_markup_mode=None,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="LLMs in MXFP4, with the block rotations that make it accurate.",
)
app.command()(quantize)
app.command("eval")(evaluate)
for command in (compare, inspect, plan, report, generate, export, recipes, demo):
    app.command()(command)
app.add_typer(benchmarks, name="bench")


def main() -> None:
    """Entry point of the command `mxrot`."""
    # Threads that spin while they wait for one another stand still where cores are shared: 25 times as slow beside
    # one other process. Read when torch is loaded, so no module that this one imports may load it.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Other packages speak to developers: torchao, where it is installed, warns of extensions it does not need.
    logging.disable(logging.WARNING)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    app()


def _fail(message: str, code: int) -> NoReturn:
    print(f"mxrot: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
