"""What GitHub and those who cite read: each file is valid by its reader's schema, and names targets
of `make` that there are."""

import re
import tomllib

import pytest
import yaml

from helpers.environments import ROOT
from helpers.launchfiles import by_schema, keys_of, misspelt

WORKFLOWS = [f".github/workflows/{name}.yml" for name in ("check", "test", "release")]
SCHEMAS = {
    **dict.fromkeys(WORKFLOWS, "github-workflows"),
    ".github/ISSUE_TEMPLATE/bug.yml": "github-issue-forms",
    ".github/ISSUE_TEMPLATE/proposal.yml": "github-issue-forms",
    ".github/ISSUE_TEMPLATE/config.yml": "github-issue-config",
    "CITATION.cff": "citation-file-format",
}
FREE = {
    "jobs",
    "with",
    "env",
    "permissions",
}  # mappings whose keys are the writer's, or an action's


def test_no_file_is_left_out() -> None:
    written = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / ".github").rglob("*")
        if path.is_file()
    }
    assert written - SCHEMAS.keys() == {".github/pull_request_template.md"}


@pytest.mark.parametrize("name", SCHEMAS)
def test_each_file_is_valid_and_no_misspelt_field_is(name: str) -> None:
    text, schema = (ROOT / name).read_text(), SCHEMAS[name]
    assert by_schema(schema, text) == []
    document = yaml.safe_load(text)
    paths = [path for path in keys_of(document) if len(path) == 1 or path[-2] not in FREE]
    assert [
        path for path in paths if not by_schema(schema, yaml.safe_dump(misspelt(document, path)))
    ] == []


@pytest.mark.parametrize("name", [*WORKFLOWS, ".pre-commit-config.yaml"])
def test_what_is_called_is_a_target_of_make(name: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    called = re.findall(r"\bmake ((?:[a-z-]+ ?)+)", (ROOT / name).read_text())
    assert called
    assert {word for line in called for word in line.split()} <= set(targets)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_actions_are_pinned_by_their_major_version_and_jobs_end(name: str) -> None:
    workflow = yaml.safe_load((ROOT / name).read_text())
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 90
        used = [step["uses"] for step in job["steps"] if "uses" in step]
        assert used
        assert all(re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", each) for each in used), used


def test_what_is_cited_is_the_version_and_licence_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])
    assert [each["name"] for each in cited["authors"]] == [e["name"] for e in project["authors"]]
