"""What the pages for users contain: blocks of Python, commands, the bullets of their limits."""

from __future__ import annotations

import ast
import functools
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


def configurations(page: Path) -> list[tuple[str, str]]:
    """The language and the text of each block of YAML or JSON."""
    return re.findall(r"^```(yaml|json)\n(.*?)^```", page.read_text(), flags=re.M | re.S)


def python_blocks() -> dict[str, str]:
    """Each block that is Python, under "page:line"."""
    found = {}
    for page in PAGES:
        others = {text.rstrip("\n") for _, text in configurations(page)}
        for line, text in _blocks(page):
            if text in others:  # much of it is Python too
                continue
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
            command = text.split("#")[0].strip().removeprefix(".venv/bin/")  # what make has made
            if command.startswith(_COMMANDS):
                found.add(re.sub(r"\s+", " ", command))
    return found


def limits() -> dict[str, str]:
    """The bullets under each heading "Limits" or "What is refused", as one line of words, under
    "page: beginning"."""
    found = {}
    for page in PAGES:
        for section in re.findall(
            r"^#+ (?:Limits|What is refused)\n(.*?)(?=^#|\Z)", page.read_text(), flags=re.M | re.S
        ):
            for bullet in re.findall(r"^[*-] (.*?)(?=^[*-] |^\n|\Z)", section, flags=re.M | re.S):
                text = " ".join(bullet.split())
                found[f"{page.name}: {text[:60]}"] = text
    return found


def spans(text: str) -> set[str]:
    """What stands between single backticks, outside of blocks."""
    return set(re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)))


def anchors(page: Path) -> set[str]:
    """The names by which a link reaches the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links() -> set[tuple[Path, str]]:
    """Every link of a page to a file of the repository: the page and the target."""
    return {
        (page, target)
        for page in PAGES
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text())
        if not target.startswith("http")
    }


def has_name(path: Path, name: str) -> bool:
    """Whether a source file has this function, class, method ("Class.method") or constant."""
    if path.suffix != ".py":
        return re.search(rf"\b{re.escape(name)}\b", path.read_text()) is not None
    body = ast.parse(path.read_text()).body
    for part in name.split("."):
        found = [node for node in body if part in _names(node)]
        body = getattr(found[0], "body", []) if found else []
        if not found:
            return False
    return True


def _names(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    if isinstance(node, ast.AnnAssign):
        return {node.target.id} if isinstance(node.target, ast.Name) else set()
    return {getattr(node, "name", "")}


def variables_read() -> set[str]:
    """The environment variables that the package, its build and its benchmarks read, and those of
    fastft that the tests set; the beginning of a name where code puts the rest together."""
    found: set[str] = set()
    for top in ("fastft", "csrc", "setup.py", "tests", "benchmarks"):
        for file in [ROOT / top] if top.endswith(".py") else (ROOT / top).rglob("*.*"):
            if file.suffix in (".py", ".cpp", ".cu", ".h", ".cuh"):
                text = file.read_text()
                found.update(re.findall(r"[\"'](FASTFT_[A-Z][A-Z_]*)", text))
                found.update(re.findall(r"getenv\(\"(\w+)\"", text))
                if top != "tests":
                    read = r"environ(?:\.get\(|\[)\s*[\"'](\w+)"
                    found.update(re.findall(read, text))
    return found - {"PYTHONPATH"}


@functools.cache
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
