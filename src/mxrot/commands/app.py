"""The commands put together, with their common parts: errors, the version, shell completion."""

from __future__ import annotations

import io
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mxrot.commands.bench import benchmarks
from mxrot.commands.compare import compare, demo
from mxrot.commands.evaluate import evaluate
from mxrot.commands.export import export
from mxrot.commands.failures import failure_of, tell
from mxrot.commands.generate import generate
from mxrot.commands.inspect import inspect
from mxrot.commands.options import KEPT
from mxrot.commands.plan import plan
from mxrot.commands.push import push
from mxrot.commands.quantize import quantize
from mxrot.commands.recipes import recipes
from mxrot.commands.report import report
from mxrot.commands.search import search
from mxrot.commands.serve import serve
from mxrot.errors import is_left_to_another


class _Commands(TyperGroup):
    """Turns every error of a command into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader of standard output has gone, as in `mxrot recipes | head`
            raise
        except (Exception, KeyboardInterrupt) as error:
            if _is_typers(error):
                raise
            failure = failure_of(error, ctx.meta.get(KEPT))
            if not is_left_to_another(error):
                tell(failure)
            sys.exit(failure.exit_code)


def _is_typers(error: BaseException) -> bool:
    """True for bad usage, or a regular exit. Typer reports these itself."""
    return type(error).__module__.partition(".")[0] in ("typer", "click")


def _show_version(asked: bool) -> None:
    if not asked:
        return
    from importlib.metadata import PackageNotFoundError, version

    from mxrot.version import __version__

    print(f"mxrot {__version__}")
    for package in ("torch", "transformers"):
        try:
            print(f"{package} {version(package)}")
        except PackageNotFoundError:
            print(f"{package} is not installed")
    print(f"python {sys.version.split()[0]}")
    raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the versions and exit")
]

app = typer.Typer(
    cls=_Commands,
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def every(version: Version = False) -> None:
    """Quantize language models to MXFP4, with block rotations for accuracy."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a path that is not UTF-8 is printed as it is


app.command()(quantize)
app.command("eval")(evaluate)
for command in (compare, search, inspect, plan, report, generate, serve, export, push, recipes, demo):
    app.command()(command)
app.add_typer(benchmarks, name="bench")
