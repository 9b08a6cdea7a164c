"""What the pages for users contain: blocks of Python, commands, the bullets of their limits."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_COMMANDS = ("make ", "python ", "pytest ", "pip ")


def _blocks(page: Path) -> Iterator[tuple[int, str]]:
    """The line number and the text of each fenced or indented block."""
    lines, block, begin, fenced = page.read_text().splitlines(), [], 0, False
    for number, line in enumerate([*lines, ""], 1):
        if line.startswith("```"):
            fenced = not fenced
        inside = fenced or (line.startswith("    ") and (block or not lines[number - 2].strip()))
        if inside and not line.startswith("```"):
            begin = begin or number
            block.append(line)
        elif block and (
            line.strip() or not any(line.startswith("    ") for line in lines[number : number + 1])
        ):
            yield begin, textwrap.dedent("\n".join(block))
            block, begin = [], 0


def python_blocks() -> dict[str, str]:
    """Each block that is Python, under "page:line"."""
    found = {}
    for page in PAGES:
        for line, text in _blocks(page):
            try:
                ast.parse(text)
            except SyntaxError:
                continue
            found[f"{page.name}:{line}"] = text
    return found


def commands() -> set[str]:
    """Every command that a page tells to run: lines of blocks, and code in a sentence; without
    comments."""
    found: set[str] = set()
    for page in PAGES:
        lines = [line for _, text in _blocks(page) for line in text.splitlines()]
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
        for text in [*lines, *re.findall(r"`([^`\n]+)`", prose)]:
            command = text.split("#")[0].strip()
            if command.startswith(_COMMANDS):
                found.add(re.sub(r"\s+", " ", command))
    return found


def limits() -> dict[str, str]:
    """The bullets under each heading "Limits", as one line of words, under "page: beginning"."""
    found = {}
    for page in PAGES:
        for section in re.findall(
            r"^#+ Limits\n(.*?)(?=^#|\Z)", page.read_text(), flags=re.M | re.S
        ):
            for bullet in re.findall(r"^\* (.*?)(?=^\* |^\n|\Z)", section, flags=re.M | re.S):
                text = " ".join(bullet.split())
                found[f"{page.name}: {text[:60]}"] = text
    return found


def tests() -> set[str]:
    """The name of every test function as "file::function", those of the benchmarks as
    "benchmarks/file::function"."""
    return {
        f"{folder}{file.name}::{node.name}"
        for top, folder in (("tests", ""), ("benchmarks", "benchmarks/"))
        for file in (ROOT / top).rglob("test_*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
