"""What mkdocs does before it builds docs/: the pages at the top of the repository join the site, and links that leave
the site lead to the repository."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Pages of the site that stand at the top of the repository."""
LINK = re.compile(r"(\]\(|(?:src|href)=\")(?![a-z]+:|#)([^)\s\"#]*)")


def on_config(config: Any) -> Any:
    """The address of the repository is that of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    config.repo_url = project["urls"]["Repository"]
    config.edit_uri = "edit/main/docs/"
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages of the top."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=led(text, "", config.repo_url)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Leads the links of a page of docs/."""
    return markdown if page.file.src_uri in PAGES.values() else led(markdown, "docs", config.repo_url)


def led(markdown: str, folder: str, repository: str) -> str:
    """The text of a page in `folder` of the repository, with links that are right where the site has it."""

    def one(match: re.Match[str]) -> str:
        return match[1] + target(posixpath.normpath(posixpath.join(folder, match[2])), match[2], repository)

    return LINK.sub(one, markdown)


def target(path: str, written: str, repository: str) -> str:
    """Where the site, or else the repository, has that path of the repository."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    kind = "tree" if written.endswith("/") else "blob"
    return f"{repository}/{kind}/main/{path}"
