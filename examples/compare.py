"""Compare recipes on one text: perplexity, and the distance from the original.

python examples/compare.py demo rtn hadamard

`mxrot compare` does more: several texts and seeds, tasks, times, memory, and it goes on after a kill.
"""

from __future__ import annotations

import argparse

import mxrot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face id, folder, or demo")
    parser.add_argument("recipes", nargs="+", help="names or TOML files")
    parser.add_argument("--text", default="demo", help="evaluation text (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=2, help="windows of it at most (default: %(default)s)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens a window (default: %(default)s)")
    chosen = parser.parse_args()

    print(f"{'recipe':16}{'perplexity':>12}{'original':>10}{'KL':>8}{'same top token':>16}")
    for recipe in chosen.recipes:
        with mxrot.progress.bar(recipe) as told:
            model = mxrot.quantize(chosen.model, recipe, progress=told)
            ((_, found),) = mxrot.diverge(
                model, chosen.model, chosen.text, windows=chosen.windows, seq_len=chosen.seq_len, progress=told
            ).items()
        print(f"{recipe:16}{found.ppl:12.2f}{found.original_ppl:10.2f}{found.kl:8.3f}{found.agreement:16.1%}")


if __name__ == "__main__":
    main()
