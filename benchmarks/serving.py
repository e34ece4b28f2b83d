"""What vLLM makes of a checkpoint, beside bfloat16 and W4A16: accuracy, decoding, first tokens, mixed batches.

    python benchmarks/serving.py --original DIR --checkpoint DIR --stock DIR --text wiki.test.raw --out FOLDER

Run where vLLM is installed, with mxrot beside it. `--original` is the model that was quantized, `--checkpoint` what
the plugin serves, `--stock` what vLLM serves as it comes (written by `mxrot export --to vllm`), by Marlin as W4A16.
Each way is a process of its own, one after the other, so each has the GPUs alone. Prints one table and writes one JSON
file with the command, versions and device; paths in it are names. docs/serving.md says what each figure is.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from serving_figures import table, text_of
from serving_worker import MIXED_NEW

from mxrot.api import load_tokenizer
from mxrot.environment import device_name, versions
from mxrot.models import read_config
from mxrot.models.positions import position_count
from mxrot.text import load_text, token_windows

HERE = Path(__file__).parent
PATHS = ("--original", "--checkpoint", "--stock", "--text", "--out")
"""Options whose values are paths."""
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=Path, required=True, help="the model as it was, served in bfloat16")
    parser.add_argument("--checkpoint", type=Path, help="for the plugin")
    parser.add_argument("--stock", type=Path, help="for vLLM as it comes, W4A16 by Marlin")
    parser.add_argument("--text", default="demo", help="a text as for mxrot eval")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--requests", type=numbers, default=[1, 8, 32, 64, 128, 256], help="at once, while decoding")
    parser.add_argument("--prompts", type=numbers, default=[2048, 8064], help="tokens before the first new one")
    parser.add_argument("--batched-tokens", type=int, default=2048, help="a step's; longer prompts come in pieces")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--memory", type=float, default=0.85, help="share of each GPU's memory")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=3600, help="seconds for one way")
    parser.add_argument("--without-eval", action="store_true", help="do not run mxrot eval on the same windows")
    parser.add_argument("--out", type=Path, default=Path("."))
    options = parser.parse_args(arguments)
    if options.checkpoint is None and options.stock is None:
        parser.error("give --checkpoint, --stock or both")
    return options


def numbers(text: str) -> list[int]:
    """Positive numbers between commas."""
    found = [int(word) for word in text.split(",") if word]
    if any(number < 1 for number in found):
        raise argparse.ArgumentTypeError(f"{text}: expected positive numbers between commas")
    return found


def ways_of(options: argparse.Namespace) -> dict[str, tuple[Path, dict[str, Any], str]]:
    """By name: the folder, options of vLLM's LLM that belong to it, and VLLM_PLUGINS."""
    found: dict[str, tuple[Path, dict[str, Any], str]] = {"bf16": (options.original, {}, "")}
    if options.stock is not None:
        stock = {"quantization": "compressed-tensors", "linear_backend": "marlin"}
        found["stock W4A16"] = (options.stock, stock, "")
    if options.checkpoint is not None:
        found["plugin W4A4"] = (options.checkpoint, {}, "mxrot")
    return found


def fitting_prompts(lengths: list[int], positions: int | None) -> list[int]:
    """Those after which MIXED_NEW tokens have positions, too."""
    return [length for length in lengths if positions is None or length + MIXED_NEW <= positions]


def task_of(options: argparse.Namespace, folder: Path, own: dict[str, Any], windows: list[list[int]]) -> dict[str, Any]:
    """What a process is to do; its result file is named by who starts it."""
    positions = position_count(read_config(folder))
    prompts = fitting_prompts(options.prompts, positions)
    wanted = max([options.seq_len + 1, 512, *(length + MIXED_NEW for length in prompts)])
    engine = {
        "model": str(folder.resolve()),
        "dtype": "bfloat16",
        "tensor_parallel_size": options.tensor_parallel,
        "max_model_len": wanted if positions is None else min(wanted, positions),
        "max_num_seqs": max([32, *options.requests]),
        "max_num_batched_tokens": options.batched_tokens,
        "enable_chunked_prefill": True,
        "enable_prefix_caching": False,
        "enforce_eager": options.eager,
        "gpu_memory_utilization": options.memory,
        "trust_remote_code": False,
        "seed": 0,
    }
    rest = {"requests": options.requests, "prompts": prompts, "repeats": options.repeats, "windows": windows}
    return {"options": engine | own, **rest}


def run_way(task: dict[str, Any], plugins: str, log: Path, limit: float) -> dict[str, Any]:
    """What one process has measured; what it says goes to `log`."""
    with tempfile.TemporaryDirectory() as folder:
        result, asked = Path(folder) / "result.json", Path(folder) / "task.json"
        asked.write_text(json.dumps(task | {"result": str(result)}), encoding="utf-8")
        single = "1" if task["options"]["tensor_parallel_size"] > 1 else "0"
        environment = os.environ | ENVIRONMENT | {"VLLM_PLUGINS": plugins, "VLLM_ENABLE_V1_MULTIPROCESSING": single}
        ended = "without a result"
        with log.open("w", encoding="utf-8") as said:
            command = [sys.executable, str(HERE / "serving_worker.py"), str(asked)]
            try:
                subprocess.run(command, env=environment, stdout=said, stderr=said, timeout=limit, check=False)
            except subprocess.TimeoutExpired:
                ended = f"after {limit:.0f} s"
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
        is_whole = "mixed" in found or (not task["prompts"] and "greedy" in found)
        return found if is_whole or "error" in found else found | {"error": f"ended {ended}"}


def eval_ppl(options: argparse.Namespace, folder: Path) -> float | None:
    """By `mxrot eval` on the same windows; None where it fails, which it says itself."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "eval.json"
        size = ["--windows", str(options.windows), "--seq-len", str(options.seq_len)]
        command = [sys.executable, "-m", "mxrot", "eval", str(folder), "--text", options.text, *size]
        command += ["--json", str(path)]
        if subprocess.run(command, stdout=subprocess.DEVNULL, check=False, timeout=options.limit).returncode:
            return None
        (found,) = json.loads(path.read_text(encoding="utf-8"))["perplexity"].values()
        return float(found["ppl"])


def without_paths(words: list[str]) -> str:
    """A command in which folders and files stand by their names."""
    named = []
    for place, word in enumerate(words):
        option, is_joined, value = word.partition("=")
        if is_joined and option in PATHS:
            named.append(f"{option}={Path(value).name}")
        else:
            named.append(Path(word).name if place and words[place - 1] in PATHS else word)
    return shlex.join(["python", "benchmarks/serving.py", *named])


def described(options: argparse.Namespace, words: list[str]) -> dict[str, Any]:
    """What the figures belong to."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        vllm = version("vllm")
    except PackageNotFoundError:
        vllm = "not installed"
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "command": without_paths(words),
        "device": device_name(where),
        "tensor_parallel": options.tensor_parallel,
        "versions": versions() | {"vllm": vllm},
        "models": {name: folder.resolve().name for name, (folder, *_) in ways_of(options).items()},
        "windows": [options.windows, options.seq_len],
        "text": Path(options.text).name,
        "batched_tokens": options.batched_tokens,
        "cuda_graphs": not options.eager,
    }


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    table_of = described(options, sys.argv[1:] if arguments is None else arguments)
    tokenizer = load_tokenizer(options.original)
    windows = token_windows(load_text(options.text, "evaluation"), tokenizer, options.seq_len, options.windows).tolist()
    ways: dict[str, dict[str, Any]] = {}
    stem = f"serving_{table_of['device'].lower().replace(' ', '-')}_{time.strftime('%Y-%m-%d')}"
    for name, (folder, own, plugins) in ways_of(options).items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        log = options.out / f"{stem}_{name.replace(' ', '-')}.log"
        ways[name] = run_way(task_of(options, folder, own, windows), plugins, log, options.limit)
        if not options.without_eval and "quantization" not in own:  # mxrot eval quantizes inputs, Marlin does not
            ways[name]["eval_ppl"] = eval_ppl(options, folder)
        written = json.dumps(table_of | {"ways": ways}, indent=1) + "\n"
        (options.out / f"{stem}.json").write_text(written, encoding="utf-8")
        if "error" in ways[name]:
            print(f"{name}: {ways[name]['error']}; its log is {log.name}", file=sys.stderr, flush=True)
    print(text_of(table(ways)))
    return 1 if any("error" in found for found in ways.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
