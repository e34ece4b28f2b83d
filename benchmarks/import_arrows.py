"""Count the arrows of the import graph, as import-linter sees it, and look for circles.

python benchmarks/import_arrows.py [--rooms] [--check]

A room is a folder or a module at the top of the package. An arrow is one module that imports another of mxrot,
anywhere in its file. Imports for type checkers count, too: who reads the file follows them. A circle is a set of
modules that reach each other.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping

import grimp


def read_imports() -> dict[str, set[str]]:
    """Each module of mxrot, and what it imports of mxrot."""
    graph = grimp.build_graph("mxrot", cache_dir=None)
    return {module: set(graph.find_modules_directly_imported_by(module)) for module in sorted(graph.modules)}


def room(module: str) -> str:
    """mxrot.formats of mxrot.formats.scale."""
    return ".".join(module.split(".")[:2])


def between_rooms(imports: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    """The arrows that leave a room."""
    return [(one, other) for one, others in imports.items() for other in sorted(others) if room(one) != room(other)]


def circles(imports: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Modules that reach each other, those of a circle together."""
    reached: dict[str, set[str]] = {}
    for start in imports:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for found in imports[waiting.pop()]:
                if found not in seen:
                    seen.add(found)
                    waiting.append(found)
        reached[start] = seen
    found = {frozenset({one, *(other for other in reached[one] if one in reached[other])}) for one in imports}
    return sorted(sorted(members) for members in found if len(members) > 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rooms", action="store_true", help="list the rooms, and from where each is imported")
    parser.add_argument("--check", action="store_true", help="fail where there is a circle, and say nothing else")
    options = parser.parse_args()
    imports = read_imports()
    if options.check:
        sys.exit("\n".join(f"circle: {', '.join(members)}" for members in circles(imports)) or 0)
    leaving = between_rooms(imports)
    pairs = {(room(one), room(other)) for one, other in leaving}
    print(f"modules {len(imports)}, rooms {len({room(module) for module in imports})}")
    print(f"arrows {sum(map(len, imports.values()))}, between rooms {len(leaving)}, pairs of rooms {len(pairs)}")
    print(f"circles {len(circles(imports))}")
    for members in circles(imports):
        print("  " + ", ".join(members))
    if options.rooms:
        for name in sorted({room(module) for module in imports}):
            print(f"{name}: {', '.join(sorted(one.removeprefix('mxrot.') for one, other in pairs if other == name))}")


if __name__ == "__main__":
    main()
