"""The tree in docs/architecture.md names every module, and no other."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "mxrot"
PAGE = ROOT / "docs" / "architecture.md"
LINE = re.compile(r"^(?P<room>[a-z_/]*/|-)  +(?P<names>.+)$")


def named() -> dict[str, list[str]]:
    """Names by folder, as the tree has them; those at the top of the package are under "-"."""
    tree = PAGE.read_text(encoding="utf-8").split("```")[1]
    found: dict[str, list[str]] = {}
    for line in tree.strip().splitlines():
        match = LINE.match(line)
        assert match is not None, f"{PAGE.name}: not a line of the tree: {line!r}"
        found.setdefault(match["room"], []).extend(match["names"].split())
    return found


def there() -> dict[str, list[str]]:
    """The same of the package."""
    found: dict[str, list[str]] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        folder = path.parent.relative_to(SOURCE)
        if path.stem != "__init__":
            found.setdefault("-" if folder == Path() else f"{folder.as_posix()}/", []).append(path.stem)
    return found


@pytest.mark.parametrize("room", sorted({*named(), *there()}))
def test_a_room_holds_what_the_tree_says(room: str) -> None:
    assert sorted(named().get(room, [])) == sorted(there().get(room, [])), room


def test_no_name_says_nothing() -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "misc", "base_utils", "tools"}
    assert not vague & {name for names in there().values() for name in names}
