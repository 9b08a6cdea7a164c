"""What tests share lies in tests/support (and benchmarks/): no test imports another one."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).resolve()
FILES = sorted(
    file.relative_to(ROOT)
    for folder in ("tests", "benchmarks")
    for file in (ROOT / folder).rglob("*.py")
    if file != HERE
)


def imported(source: str) -> Iterator[str]:
    """The modules that a source imports, also in programs that it holds as strings."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from re.findall(r"^\s*(?:from|import) ([\w.]+)", node.value, re.MULTILINE)


def found_in(source: str) -> list[str]:
    return [name for name in imported(source) if name.rpartition(".")[2].startswith("test_")]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_no_test_is_imported(file: Path) -> None:
    assert not found_in((ROOT / file).read_text())


def test_an_import_is_found_wherever_it_stands() -> None:
    sources = [
        "import test_a",
        "def f():\n    from loss.test_a import b",
        "S = '''\nimport test_a\n'''",
    ]
    assert all(found_in(source) for source in sources)
    assert not found_in("from support import oracle\nname = 'test_a'")
