"""What SECURITY.md promises of the package's own code, read from its syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "fastft"
FILES = sorted(file.relative_to(PACKAGE).as_posix() for file in PACKAGE.rglob("*.py"))
CODE_FROM_DATA = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy", "code"}
CONNECTIONS = {
    "socket",
    "ssl",
    "http",
    "urllib",
    "requests",
    "httpx",
    "aiohttp",
    "ftplib",
    "smtplib",
}
PROCESSES = {"subprocess", "pty", "pexpect"}
FORBIDDEN = CODE_FROM_DATA | CONNECTIONS | PROCESSES
CALLS = {"eval", "exec", "torch.load", "os.system", "os.popen", "os.fork"}
STARTERS = ("os.exec", "os.spawn", "os.posix_spawn")
# whoever is added here is explained in SECURITY.md
ALLOWED = {
    "commands/children.py": {"subprocess"},
    "commands/script.py": {"exec"},
    "optim/offload/choice.py": {"subprocess"},
}


def dangers(source: str) -> Iterator[str]:
    """The modules and functions of the lists above that a source uses."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            roots = [alias.name.partition(".")[0] for alias in node.names]
            yield from FORBIDDEN.intersection(roots)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            module = node.module or ""
            yield from FORBIDDEN.intersection([module.partition(".")[0]])
            yield from CALLS.intersection(f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, (ast.Name, ast.Attribute)):
            name = ast.unparse(node)
            if name in CALLS or name.startswith(STARTERS):
                yield name
        elif isinstance(node, ast.keyword) and node.arg in ("shell", "trust_remote_code"):
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                yield node.arg


@pytest.mark.parametrize("file", FILES)
def test_no_module_loads_code_from_data_connects_or_starts_processes(file: str) -> None:
    assert set(dangers((PACKAGE / file).read_text())) == ALLOWED.get(file, set())


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", {"pickle"}),
        ("import urllib.request as r", {"urllib"}),
        ("def f():\n    from subprocess import run", {"subprocess"}),
        ("eval('1')", {"eval"}),
        ("import torch\ntorch.load(f)", {"torch.load"}),
        ("from torch import load", {"torch.load"}),
        ("import os\nos.execv(a, b)", {"os.execv"}),
        ("run(a, shell=True)", {"shell"}),
        ("AutoConfig.from_pretrained(a, trust_remote_code=b)", {"trust_remote_code"}),
        ("model.eval()\nretrieval = 1\nself.load(x)\nrun(a, shell=False)", set()),
    ],
)
def test_a_danger_is_found(source: str, found: set[str]) -> None:
    assert set(dangers(source)) == found


def test_what_is_allowed_is_explained() -> None:
    page = (PACKAGE.parent / "SECURITY.md").read_text()
    for word in ("`compare` execute the script", "no shell", "`python -m fastft estimate`"):
        assert word in page
