"""Results of benchmarks/accuracy.py, of benchmarks/everywhere.py and of `mxrot compare --json` as Markdown tables, as
docs/results.md has them.

    python benchmarks/markdown.py benchmarks/results/demo_ablation_*.json

Rows of several files are put together; of rows with the same label the last file's counts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import everywhere_tables

Row = dict[str, Any]


def main() -> None:
    print(table([json.loads(Path(name).read_text(encoding="utf-8")) for name in sys.argv[1:]]))


def table(results: list[dict[str, Any]]) -> str:
    """One line for each label: perplexity and its ratio to FP16 on each text, seeds, seconds, GPU memory."""
    if any(result.get("kind") == "everywhere" for result in results):
        return everywhere_tables.markdown(results)
    if not any("label" in row for result in results for row in result["rows"]):
        return compared([row for result in results for row in result["rows"]])
    rows = {row["label"]: row for result in results for row in result["rows"]}
    texts = next((list(row["means"]) for row in rows.values() if "means" in row), [])
    heads = ["", *(head for text in texts for head in (text, "x")), "seeds", "seconds", "GB"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    lines += ["| " + " | ".join(cells(row, texts)) + " |" for row in rows.values()]
    return "\n".join(lines)


def compared(rows: list[Row]) -> str:
    """One line for each row of `mxrot compare`: perplexity and ratio on each text, KL, bits, seconds, memory.

    Where a cache is quantized also bits of a key or a value, and the bytes of a cache over those in 16 bits.
    """
    texts = list(rows[0]["perplexity"])
    has_cache = any(row.get("cache") for row in rows)
    kept = ["bits of KV", "cache x"] if has_cache else []
    heads = ["", *(head for text in texts for head in (text, "x")), "KL", "bits", *kept, "seconds", "GB"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        if row["reason"] is not None:
            lines.append(f"| {row['recipe']} | {row['reason'].replace('|', chr(92) + '|')} |" + " |" * (len(heads) - 2))
            continue
        found = [row["recipe"]]
        for text in texts:
            perplexity = f"{row['perplexity'][text]:.2f}{error(row['perplexity_error'][text])}"
            found += [perplexity, f"{row['ratio_of_text'][text]:.3f}"]
        transforms = f" + {row['transform_bits_per_weight']:.2f}" if row["transform_bits_per_weight"] else ""
        found.append("" if row["kl"] is None else f"{row['kl']:.3f}{error(row['kl_error'], 3)}")
        found.append(f"{row['bits_per_weight']:.2f}{transforms}")
        if has_cache:
            found += [f"{row['bits_per_kv_element']:.2f}", f"{row['cache']['ratio']:.3f}" if row.get("cache") else ""]
        found.append("" if row["seconds"] is None else f"{row['seconds']:.1f}")
        found.append("" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.1f}")
        lines.append("| " + " | ".join(found) + " |")
    return "\n".join(lines)


def error(value: float | None, places: int = 2) -> str:
    """A standard error over seeds, if there is one."""
    return "" if value is None else f" ± {value:.{places}f}"


def cells(row: Row, texts: list[str]) -> list[str]:
    """What a line says; an error instead of figures."""
    if "means" not in row:
        return [row["label"], row.get("error", "not measured"), *[""] * (2 * len(texts) + 2)]
    found = [row["label"]]
    for text in texts:
        values = [entry["perplexity"][text]["ppl"] for entry in row["seeds"]]
        found.append(f"{row['means'][text]:.2f}{spread(values)}")
        found.append(f"{row['relative'][text]:.3f}" if "relative" in row else "")
    seconds = [entry["quantize_seconds"] for entry in row["seeds"] if "quantize_seconds" in entry]
    peaks = [entry["peak_gpu_bytes"] or 0 for entry in row["seeds"] if "peak_gpu_bytes" in entry]
    found.append(str(len(row["seeds"])))
    found.append(f"{sum(seconds) / len(seconds):.1f}" if seconds else "")
    return [*found, f"{max(peaks) / 1e9:.1f}" if peaks and max(peaks) else ""]


def spread(values: list[float]) -> str:
    """The least and the largest, if there are several."""
    return f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""


if __name__ == "__main__":
    main()
