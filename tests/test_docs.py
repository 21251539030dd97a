"""What the pages say of each other and of the tree is true, and their lines are short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import qdeploy
from qdeploy import cli

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("docs", "tests", "bench", "examples")
PAGES = sorted(
    page.relative_to(ROOT)
    for page in [*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))]
)
LONGEST = 120


def prose(page: Path) -> list[str]:
    """The lines of a page outside of fenced code."""
    lines, fenced = [], False
    for line in (ROOT / page).read_text().splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced:
            lines.append(line)
    return lines


def anchors(page: Path) -> set[str]:
    """The names under which GitHub links to the headings of a page."""
    headings = [line.lstrip("#").strip() for line in prose(page) if re.match("#+ ", line)]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", "\n".join(prose(page)))


def test_there_are_pages():
    assert {Path("README.md"), Path("docs/architecture.md"), Path("SECURITY.md")} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page):
    for link in links(page):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page.parent / path).resolve() if path else ROOT / page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target.relative_to(ROOT)), link


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_lines_are_short(page):
    """A row of a table is one line, however long."""
    lines = (ROOT / page).read_text().splitlines()
    long = [line for line in lines if len(line) > LONGEST and not line.startswith("|")]
    assert long == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_tables_have_no_blank_cells(page):
    """Of the rows: a header may leave its first cell blank."""
    for line in prose(page):
        if line.startswith("|"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
            assert all(cells[1:]), line


def test_commands_exist(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    commands = set(re.findall(r"^    (\w+) ", capsys.readouterr().out, re.MULTILINE))
    for page in PAGES:
        shown = re.findall(r"(?:^|`|&& )qdeploy (\w+)", (ROOT / page).read_text(), re.MULTILINE)
        assert set(shown) <= commands, page


def test_ci_finds_the_two_commands_of_the_readme():
    """.ci/run runs the lines that begin so."""
    assert len(re.findall(r"^pip install -e", (ROOT / "README.md").read_text(), re.MULTILINE)) == 2


def test_the_citation_is_of_this_version():
    assert f"\nversion: {qdeploy.__version__}\n" in (ROOT / "CITATION.cff").read_text()
