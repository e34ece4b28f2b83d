"""Start a server with `mxrot serve`, ask it one question over HTTP, and end it.

python examples/serve.py smollm2-hadamard "Name the three primary colors."

`mxrot serve` starts vLLM if it is installed, otherwise the server of transformers, which needs
`pip install 'transformers[serving]'`. Both speak OpenAI's HTTP interface, so any client of it can ask.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def served(checkpoint: str, seconds: float) -> Iterator[str]:
    """The address of a server of the checkpoint, once it is healthy; the server ends with the `with` block."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mxrot", "serve", checkpoint, "--", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, stdout=sys.stderr)
    try:
        wait_until_healthy(process, address, seconds)
        yield address
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def wait_until_healthy(process: subprocess.Popen[bytes], address: str, seconds: float) -> None:
    """Return when the server answers; exit if it has ended, or after that many seconds."""
    last = time.monotonic() + seconds
    while time.monotonic() < last:
        if process.poll() is not None:
            sys.exit(f"the server ended with exit code {process.returncode}")
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    sys.exit(f"the server was not ready within {seconds:.0f} s")


def ask(address: str, question: str, max_tokens: int) -> str:
    """The answer to one question."""
    asked = {"messages": [{"role": "user", "content": question}], "max_tokens": max_tokens, "temperature": 0}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(asked).encode(), headers)
    with urllib.request.urlopen(request, timeout=600) as reply:
        answer: str = json.load(reply)["choices"][0]["message"]["content"]
        return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder that mxrot quantize has written")
    parser.add_argument("question", help="what to ask")
    parser.add_argument("--max-tokens", type=int, default=60, help="most tokens of the answer (default: %(default)s)")
    parser.add_argument("--wait", type=float, default=600, help="seconds to wait for the server (default: %(default)s)")
    chosen = parser.parse_args()
    with served(chosen.checkpoint, chosen.wait) as address:
        print(ask(address, chosen.question, chosen.max_tokens))


if __name__ == "__main__":
    main()
