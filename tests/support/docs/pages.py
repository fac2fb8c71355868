"""Reads code blocks and names of files out of the Markdown pages of the repository."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from support.paths import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = ("python", "sh", "yaml", "json", "toml", "text")
MARKER = re.compile(r"<!-- (not run|parsed only): *(.*?) *-->$")
NAMED = re.compile(r"# (\S+\.\w+)\n")


@dataclass(frozen=True)
class Block:
    """One fenced block. ``marker`` is "", "not run" or "parsed only"; then ``reason`` says why."""

    page: Path
    line: int  # of the first line of code
    language: str
    code: str
    marker: str = ""
    reason: str = ""

    @property
    def where(self) -> str:
        return f"{name_of(self.page)}:{self.line}"


def name_of(page: Path) -> str:
    """The page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    blocks = []
    start = None
    for i, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start = i
            continue
        match = MARKER.match(lines[start - 1]) if start else None
        marker, reason = match.groups() if match else ("", "")
        code = "\n".join(lines[start + 1 : i]) + "\n"
        blocks.append(Block(page, start + 2, lines[start][3:].strip(), code, marker, reason))
        start = None
    assert start is None, f"{name_of(page)}:{start}: an open fence"
    return blocks


def commands_of(code: str) -> list[list[str]]:
    """The commands of a shell block as lists of words, without variables set in front."""
    commands = []
    for line in code.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word == "&&":
                commands.append(words)
                words = []
            elif words or not re.match(r"[A-Z_]+=", word):
                words.append(word)
    return [words for words in commands if words]


def inline_code(page: Path) -> list[str]:
    """Every `...` of a page's prose and tables."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    return re.findall(r"`([^`]+)`", prose)


def links_of(page: Path) -> list[str]:
    """Targets of the page's links to files and headings, without URLs."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in link]


def anchors_of(page: Path) -> set[str]:
    """Anchors of the page's headings, as GitHub and MkDocs name them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
    slugs = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {re.sub(r"[ -]+", "-", slug).strip("-") for slug in slugs}
