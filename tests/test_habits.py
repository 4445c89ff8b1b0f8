"""What contributors' tools are told stands in one place, or agrees with it."""

import re
import tomllib
from pathlib import Path

import yaml

import forwax as fx

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def read(name):
    return yaml.safe_load((ROOT / name).read_text())


def test_the_version_stands_once_and_has_a_section_in_the_changelog():
    assert PROJECT["dynamic"] == ["version"]
    sections = re.findall(
        r"^## \[(\d.*)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    assert sections[0] == fx.__version__


def test_the_workflow_runs_every_python_with_the_oldest_and_the_newest_jax():
    matrix = read(".github/workflows/ci.yml")["jobs"]["run"]["strategy"]["matrix"]
    prefix = "Programming Language :: Python :: 3."
    supported = [
        line.split(" :: ")[2]
        for line in PROJECT["classifiers"]
        if line.startswith(prefix)
    ]
    (floor,) = (line for line in PROJECT["dependencies"] if line.startswith("jax>="))
    assert matrix["python"] == supported
    assert matrix["jax"] == [floor.replace(">=", "=="), "jax"]


def test_commits_run_the_commands_of_the_ci():
    (local,) = read(".pre-commit-config.yaml")["repos"]
    commands = {hook["entry"] for hook in local["hooks"]}
    ci = (ROOT / ".ci" / "run").read_text().replace("--check .", ".").splitlines()
    assert (
        {"ruff check .", "ruff format .", "pyright", "lint-imports"}
        < commands
        <= set(ci)
    )


def test_ruff_and_pyright_are_pinned():
    pinned = {
        line.split("==")[0]
        for line in PROJECT["optional-dependencies"]["dev"]
        if "==" in line
    }
    assert pinned == {"ruff", "pyright"}


def test_a_bug_report_asks_for_versions_the_smallest_loss_and_what_explain_says():
    body = read(".github/ISSUE_TEMPLATE/bug.yml")["body"]
    required = {part["id"] for part in body if part["validations"]["required"]}
    assert {"versions", "loss", "explain"} <= required


def test_the_citation_has_what_its_format_requires():
    citation = read("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == PROJECT["authors"]
