"""What surrounds the code: metadata, workflows, templates. A parser reads each; what they share is the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import mxrot
from mxrot.recipe import tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
TEMPLATES = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_the_version_stands_in_one_place() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "mxrot.version.__version__"}
    citation = read(ROOT / "CITATION.cff")
    assert "version" not in citation and re.fullmatch(r"\d+\.\d+\.\d+", mxrot.__version__)
    assert citation["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= citation.keys()
    releases = re.findall(r"^## \[(.+?)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert releases[0][0] == mxrot.__version__ and releases[-1][0] == "0.1.0"
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for _, date in releases[1:])


def test_the_addresses_are_those_of_one_repository() -> None:
    home = read(ROOT / "CITATION.cff")["repository-code"]
    urls = PROJECT["project"]["urls"]
    assert urls["Repository"] == home and all(url.startswith(home) for url in urls.values())
    for url in urls.values():
        inside = re.search(r"/(?:tree|blob)/main/(.+)", url)
        assert inside is None or (ROOT / inside[1]).exists()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_are_whole_and_call_what_there_is(path: Path) -> None:
    workflow = read(path)
    assert {"name", "permissions", "jobs"} <= workflow.keys() and True in workflow  # YAML reads `on` as true
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for job in workflow["jobs"].values():
        assert job["runs-on"] and job["steps"]
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            for target in re.findall(r"^make ([a-z-]+)", step.get("run", ""), re.M):
                assert target in targets


def test_ci_runs_the_tests_and_the_linters_on_two_versions() -> None:
    jobs = read(ROOT / ".github/workflows/ci.yml")["jobs"]
    assert jobs["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12"]
    runs = [step.get("run", "") for job in jobs.values() for step in job["steps"]]
    assert any(run.startswith("make test") for run in runs) and "make lint" in runs


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_templates_are_forms(path: Path) -> None:
    form = read(path)
    if path.name == "config.yml":
        assert form == {"blank_issues_enabled": True}
        return
    assert {"name", "description", "body"} <= form.keys()
    assert all({"type", "id", "attributes"} <= field.keys() for field in form["body"])


def test_lazy_packages_list_what_they_have() -> None:
    import mxrot.checkpoint

    for package in (mxrot, mxrot.checkpoint):
        assert set(package.__all__) <= set(dir(package))
    assert "__version__" in dir(mxrot)
