"""Quantize a model into a folder, by a recipe that is changed in Python.

python examples/quantize.py demo smollm2-hadamard
"""

from __future__ import annotations

import argparse

import mxrot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face id, folder, or demo")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--recipe", default="hadamard", help="name or TOML file (default: %(default)s)")
    chosen = parser.parse_args()

    # The last decoder block keeps its weights and inputs in eight bits.
    recipe = mxrot.Recipe.load(chosen.recipe).changed({"override": [{"blocks": [-1, -1], "format": "mxfp8_e4m3"}]})
    run = mxrot.quantize(chosen.model, recipe, output=chosen.output, progress=True)
    print(f"{chosen.output}: {run['size']['bits_per_weight']:.3f} bits a weight, {run['seconds']:.1f} s")


if __name__ == "__main__":
    main()
