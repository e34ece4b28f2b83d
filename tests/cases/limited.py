"""The command line under a limit of the system, as `ulimit` sets it: `python limited.py FILE`.

FILE is a JSON list of [words, limit, value] for `mxrot WORDS` with RLIMIT_<limit>; address space is what there may be
besides what there is. Each runs in a process of its own, forked from this one, which has loaded all that is slow.
Prints a JSON list of [exit code, what was written].
"""

from __future__ import annotations

import json
import os
import resource
import sys
import traceback
from pathlib import Path

import transformers  # noqa: F401

import mxrot.api
import mxrot.report  # noqa: F401
from mxrot.cli import app


def run(words: list[str], limit: str, value: int) -> tuple[int, str]:
    """Exit code and output of one command."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        os.closerange(3, 64)
        _impose(limit, value)
        os._exit(_code(words))
    os.close(writer)
    with os.fdopen(reader, "rb") as output:
        written = output.read().decode(errors="replace")
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), written


def _impose(limit: str, value: int) -> None:
    if limit == "AS":
        value += 4096 * int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(getattr(resource, f"RLIMIT_{limit}"), (value, value))


def _code(words: list[str]) -> int:
    """Run the command; 99 for a traceback."""
    try:
        app(words)
    except SystemExit as error:
        return int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        return 99
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    app_words = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    run(["recipes"], "NOFILE", 64)  # what the first command of a process loads
    print(json.dumps([run(*one) for one in app_words]))
