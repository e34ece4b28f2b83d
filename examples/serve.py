"""Answer prompts over HTTP with a checkpoint, one after the other.

python examples/serve.py smollm2-hadamard --port 8000
curl -d '{"prompt": "The three primary colors are", "max_tokens": 8}' localhost:8000

It shows how little a server needs. Use vLLM to serve many (docs/vllm.md).
"""

from __future__ import annotations

import argparse
import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

from transformers import AutoTokenizer

import mxrot


def server_of(checkpoint: str, port: int) -> HTTPServer:
    """A server on this machine that answers {"prompt", "max_tokens"} with {"text"}; port 0 is any free one."""
    model = mxrot.load(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    def answer(asked: dict[str, Any]) -> dict[str, str]:
        inputs = tokenizer(asked["prompt"], return_tensors="pt").to(model.device)
        output = model.generate(**inputs, max_new_tokens=asked.get("max_tokens", 60), do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        return {"text": tokenizer.decode(new, skip_special_tokens=True)}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                told, status = answer(json.loads(self.rfile.read(int(self.headers["Content-Length"])))), 200
            except (KeyError, TypeError, ValueError) as error:
                told, status = {"error": f"expected JSON with a prompt: {error}"}, 400
            body = json.dumps(told).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return HTTPServer(("127.0.0.1", port), Handler)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder that mxrot quantize has written")
    parser.add_argument("--port", type=int, default=8000)
    chosen = parser.parse_args()
    server = server_of(chosen.checkpoint, chosen.port)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
