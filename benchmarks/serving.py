"""What vLLM makes of a checkpoint, beside bfloat16 and W4A16: accuracy, decoding, first tokens, mixed batches.

    python benchmarks/serving.py --original DIR --checkpoint DIR --stock DIR --text wiki.test.raw --out FOLDER
    python benchmarks/serving.py --original DIR --checkpoint DIR --head-checkpoint DIR --out FOLDER
    python benchmarks/serving.py --random FOLDER --together --kv-gib 8 --out FOLDER

Run where vLLM is installed, with mxrot beside it. `--original` is the model that was quantized, `--checkpoint` what
the plugin serves, `--stock` what vLLM serves as it comes (written by `mxrot export --to vllm`), by Marlin as W4A16.
`--head-checkpoint` is one more for the plugin, with a quantized head (written by `mxrot quantize --head mxint8`). With
`--random`, a folder that serving_random.py has written, speeds are those of its models, and perplexities those of
the others, if they are given. Each engine is a process of its own; what fails in one leaves the others as they are.
Prints one table and writes one JSON file with the command, versions and device, which grows with what is measured;
paths in it are names. docs/serving.md says what each figure is.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from serving_figures import late_kernels, merged, table, text_of
from serving_jobs import Crew, Job, Limits
from serving_ways import STOCK, Way, random_ways_of, ways_of
from serving_worker import MIXED_NEW

from mxrot.api import load_tokenizer
from mxrot.environment import device_name, versions
from mxrot.errors import MxrotError
from mxrot.models import read_config
from mxrot.models.positions import position_count
from mxrot.text import load_text, token_windows

PATHS = ("--original", "--checkpoint", "--head-checkpoint", "--stock", "--random", "--text", "--out")
"""Options whose values are paths."""
SMALL_SHARE = 0.05
"""Of a GPU's memory: what vLLM is told to find free where the size of the cache is given."""


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--original", type=Path, help="the model as it was, served in bfloat16")
    parser.add_argument("--checkpoint", type=Path, help="for the plugin")
    parser.add_argument(
        "--head-checkpoint",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="for the plugin, with a quantized head; repeatable",
    )
    parser.add_argument("--stock", type=Path, help="for vLLM as it comes, W4A16 by Marlin")
    parser.add_argument("--random", type=Path, help="folder of serving_random.py: speeds are of its models")
    parser.add_argument("--text", default="demo", help="a text as for mxrot eval")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--requests", type=numbers, default=[1, 8, 32, 64, 128, 256], help="at once, while decoding")
    parser.add_argument("--prompts", type=numbers, default=[2048, 8064], help="tokens before the first new one")
    parser.add_argument("--batched-tokens", type=int, default=8192, help="a step's; longer prompts come in pieces")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--memory", type=float, default=0.85, help="share of each GPU's memory")
    parser.add_argument("--kv-gib", type=float, help="of keys and values on each GPU, in place of --memory")
    parser.add_argument("--together", action="store_true", help="start all engines at once; needs --kv-gib, one GPU")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--attention", help="vLLM's backend, such as TRITON_ATTN; its own choice unless told")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=3600, help="seconds for one engine; with --together, for a turn")
    parser.add_argument("--limit-all", type=float, default=36000, help="seconds after which what is there is printed")
    parser.add_argument("--without-eval", action="store_true", help="do not run mxrot eval on the same windows")
    parser.add_argument("--out", type=Path, default=Path("."))
    options = parser.parse_args(arguments)
    if options.original is None and options.random is None:
        parser.error("give --original, --random or both")
    served = [options.checkpoint, options.stock, *options.head_checkpoint]
    if options.original is not None and not any(served):
        parser.error("give --checkpoint, --stock, --head-checkpoint or several of them beside --original")
    if options.original is None and any(served):
        parser.error("--checkpoint, --stock and --head-checkpoint need --original, which they are compared with")
    if options.together and (options.kv_gib is None or options.tensor_parallel > 1):
        parser.error("--together needs --kv-gib, and one GPU for each engine")
    try:
        timed, missing = random_ways_of(options), [way for way, one in ways_of(options).items() if one.head is not None]
    except MxrotError as error:
        parser.error(str(error))
    missing = [way for way in missing if options.random is not None and way not in timed]
    if missing:
        parser.error(
            f"{missing[0]}: {options.random} has no such model; give its format to serving_random.py as --head"
        )
    return options


def numbers(text: str) -> list[int]:
    """Positive numbers between commas."""
    found = [int(word) for word in text.split(",") if word]
    if any(number < 1 for number in found):
        raise argparse.ArgumentTypeError(f"{text}: expected positive numbers between commas")
    return found


def fitting_prompts(lengths: list[int], positions: int | None) -> list[int]:
    """Those after which MIXED_NEW tokens have positions, too."""
    return [length for length in lengths if positions is None or length + MIXED_NEW <= positions]


def graph_sizes(requests: list[int]) -> list[int]:
    """Rows for which CUDA graphs are captured: powers of two up to the most requests, and each number of requests."""
    most = max([32, *requests])
    return sorted({1 << power for power in range(most.bit_length()) if 1 << power <= most} | set(requests))


def task_of(options: argparse.Namespace, way: Way, windows: list[list[int]], is_timed: bool = True) -> dict[str, Any]:
    """What a process is to do; its result file is named by who starts it."""
    positions = position_count(read_config(way.folder))
    prompts = fitting_prompts(options.prompts, positions) if is_timed else []
    requests = options.requests if is_timed else []
    wanted = max([options.seq_len + 1, 512, *(length + MIXED_NEW for length in prompts)])
    engine: dict[str, Any] = {
        "model": str(way.folder.resolve()),
        "dtype": "bfloat16",
        "tensor_parallel_size": options.tensor_parallel,
        "max_model_len": wanted if positions is None else min(wanted, positions),
        "max_num_seqs": max([32, *requests]),
        "max_num_batched_tokens": options.batched_tokens,
        "enable_chunked_prefill": True,
        "enable_prefix_caching": False,
        "enforce_eager": options.eager,
        "gpu_memory_utilization": options.memory if options.kv_gib is None else SMALL_SHARE,
        "trust_remote_code": False,
        "seed": 0,
    }
    if options.kv_gib is not None:
        engine["kv_cache_memory_bytes"] = int(options.kv_gib * 2**30)
    if options.attention is not None:
        engine["attention_config"] = {"backend": options.attention}
    if not options.eager:
        engine["compilation_config"] = {"cudagraph_capture_sizes": graph_sizes(requests)}
    return {
        "options": engine | way.own,
        "requests": requests,
        "prompts": prompts,
        "repeats": options.repeats,
        "windows": windows,
    }


def jobs_of(options: argparse.Namespace, windows: list[list[int]]) -> list[Job]:
    """All processes. Speeds are of the random models, if there are any."""
    worker, found = "serving_worker.py", []
    for way, one in random_ways_of(options).items():
        found.append(Job(way, "speed", worker, task_of(options, one, []), one.plugins))
    is_timed = options.random is None
    for way, one in ways_of(options).items():
        task = task_of(options, one, windows, is_timed)
        found.append(Job(way, "speed" if is_timed else "text", worker, task, one.plugins))
        if not options.without_eval and one.own is not STOCK:  # mxrot eval quantizes inputs, Marlin does not
            found.append(Job(way, "eval", "serving_eval.py", task))
    return found


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
    served, timed = ways_of(options), random_ways_of(options)
    return {
        "command": without_paths(words),
        "device": device_name(where),
        "tensor_parallel": options.tensor_parallel,
        "versions": versions() | {"vllm": vllm},
        "models": {name: way.folder.resolve().name for name, way in served.items()},
        "random": {name: read_config(way.folder).to_diff_dict() for name, way in timed.items()},
        "heads": {name: way.head.spelled for name, way in (timed | served).items() if way.head is not None},
        "windows": [options.windows, options.seq_len],
        "text": Path(options.text).name,
        "batched_tokens": options.batched_tokens,
        "cuda_graphs": not options.eager,
        "attention": options.attention,
        "together": options.together,
    }


def windows_of(options: argparse.Namespace) -> list[list[int]]:
    """Of the text, by the tokenizer of the original; none without one."""
    if options.original is None:
        return []
    tokenizer = load_tokenizer(options.original)
    text = load_text(options.text, "evaluation")
    found: list[list[int]] = token_windows(text, tokenizer, options.seq_len, options.windows).tolist()
    return found


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    table_of = described(options, sys.argv[1:] if arguments is None else arguments)
    stem = f"serving_{table_of['device'].lower().replace(' ', '-')}_{time.strftime('%Y-%m-%d')}"
    jobs = jobs_of(options, windows_of(options))

    def log_of(job: Job) -> Path:
        return options.out / f"{stem}_{job.name}.log"

    def found_by(job: Job) -> dict[str, Any]:
        log = log_of(job)
        said = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        late = late_kernels(said)
        return job.found() | ({"late_kernels": late} if late else {})

    def keep(job: Job | None = None) -> dict[str, dict[str, Any]]:
        """Write all that is there, and tell what became of a job."""
        ways = merged([(one.way, one.kind, found_by(one)) for one in jobs])
        written = json.dumps(table_of | {"ways": ways}, indent=1) + "\n"
        (options.out / f"{stem}.json").write_text(written, encoding="utf-8")
        if job is not None:
            found = job.found()
            faults = {"": found["error"]} if "error" in found else found.get("errors", {})
            said = "".join(f"; {name}{name and ': '}{fault}" for name, fault in faults.items())
            print(f"{job.way} ({job.kind}): {'done' if not said else said[2:]}", file=sys.stderr, flush=True)
        return ways

    with tempfile.TemporaryDirectory() as folder:
        limits = Limits(options.limit, options.limit_all)
        crew = Crew(jobs, limits, Path(folder), log_of)
        crew.told = keep
        crew.run(options.together)
        ways = keep()
    print(text_of(table(ways)))
    return 1 if any("error" in found or found.get("errors") for found in ways.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
