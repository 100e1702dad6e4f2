"""The pages build as a site; their links lead somewhere, and the tests, files and targets of make
that they name are there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.environments import ROOT

FOLDERS = ("docs", "launch", "docker")
PAGES = [
    *ROOT.glob("*.md"),
    *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md")),
]
NAMES = [page.relative_to(ROOT).as_posix() for page in sorted(PAGES)]
LINK = re.compile(r"\[[^\]]*\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)")


def prose(name: str) -> str:
    """A page without its blocks of code."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(name: str) -> set[str]:
    """Where a link may point to: the headings, as GitHub and mkdocs name them."""
    headings = re.findall(r"^#+ +(.+)$", prose(name), flags=re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r" ", "-", re.sub(r"[^\w\- ]", "", heading)) for heading in plain}


@pytest.mark.parametrize("name", NAMES)
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(name: str) -> None:
    broken = []
    for target, anchor in LINK.findall(prose(name)):
        path = (ROOT / name).parent / target if target else ROOT / name
        there = os.path.relpath(path, ROOT)
        if not path.exists() or (anchor and anchor not in anchors(there)):
            broken.append(f"{target}#{anchor}")
    assert broken == []


@pytest.mark.parametrize("name", NAMES)
def test_every_test_that_a_page_names_is_there(name: str) -> None:
    written = {path.name: path for path in (ROOT / "tests").rglob("test_*.py")}
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        folders = re.findall(r"`(?:tests/)?((?:[a-z]+/)+)test_\w+\.py`", line)
        files = re.findall(r"\b(test_\w+\.py)\b", line)
        assert [file for file in files if file not in written] == []
        assert [folder for folder in folders if not (ROOT / "tests" / folder).is_dir()] == []
        sources = "".join(written[file].read_text() for file in files)
        functions = re.findall(r"`(test_[a-z0-9_]+)`", line)
        assert [each for each in functions if f"def {each}(" not in sources] == []


@pytest.mark.parametrize("name", NAMES)
def test_every_target_of_make_that_a_page_names_is_there(name: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    text = (ROOT / name).read_text(encoding="utf-8")
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", text, flags=re.MULTILINE)) <= set(targets)


def test_the_site_builds_strictly_and_has_every_page(tmp_path: Path) -> None:
    mkdocs = str(Path(sys.executable).with_name("mkdocs"))
    command = [mkdocs, "build", "--strict", "--site-dir", str(tmp_path)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for name in NAMES:
        if name != "README.md":
            page = tmp_path / name.removeprefix("docs/").replace("README.md", "index.md")
            assert page.with_suffix(".html").exists()
    fetched = r"<(?:script|link|img)[^>]+(?:src|href)=\"?https?://"
    assert not re.search(fetched, (tmp_path / "index.html").read_text())
