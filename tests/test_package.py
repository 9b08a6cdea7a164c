"""The package as a whole: what importing it may need, and the promise of impl=."""

from __future__ import annotations

import ast
import graphlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fastft
from fastft.ops import OPERATORS, Operator

OPTIONAL = (
    "transformers",
    "accelerate",
    "datasets",
    "triton",
    "numpy",
    "tokenizers",
    "peft",
    "safetensors",
    "huggingface_hub",
)


def test_import_needs_only_torch() -> None:
    # None makes every import of them fail
    hide = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL!r}))"
    script = f"{hide}\nimport fastft, torch\n"
    script += "assert [getattr(fastft, name) for names in fastft._ROOMS.values() for name in names]"
    script += (
        "\nloss = fastft.linear_cross_entropy(torch.randn(3, 4), torch.randn(5, 4), "
        "torch.tensor([0, 1, 4]))"
    )
    script += "\nassert loss.isfinite()\nassert len(fastft.plan_packs([3, 4, 5], 8)) == 2"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_python_m_begins_without_torch_and_lacks_nothing(tmp_path: Path) -> None:
    """`python -m fastft run script.py` imports the package before a script that may import any room
    of it first. Any package behind -m that imports fastft is treated alike."""
    first = "import sys, fastft\nassert 'torch' not in sys.modules\n"
    room = "from fastft.optim.adamw import AdamW\n"
    main = "import fastft, mine\nfrom fastft import AdamW, pack\nassert AdamW is mine.AdamW\n"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text(first + room)
    (tmp_path / "mine" / "__main__.py").write_text(main + "print(*dir(fastft))")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "mine"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert set(fastft.__all__) <= set(done.stdout.split())


def test_import_waits_for_the_first_use() -> None:
    script = "import sys, fastft\n"
    script += "print(*{name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names)\n"
    script += "print(*(name for name in sys.modules if name.startswith('fastft')))"
    done = subprocess.run(
        # without site: an installed package may have itself imported at the start
        [sys.executable, "-S", "-c", script],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    packages, rooms = map(str.split, done.stdout.splitlines())
    assert set(packages) == {"__main__", "fastft"}
    assert set(rooms) == {
        "fastft",
        "fastft.attention",
        "fastft.attention.registration",
        "fastft.on_import",
    }


def test_type_checkers_and_imports_read_names_from_the_same_rooms() -> None:
    tree = ast.parse(Path(fastft.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    typed = {node.module: tuple(name.name for name in node.names) for node in block.body}
    rooms = fastft._ROOMS | fastft._ROOMS_OF_TRANSFORMERS
    assert rooms == typed
    assert sorted(name for names in rooms.values() for name in names) == sorted(fastft.__all__)


def test_names_take_no_longer_to_import_than_torch() -> None:
    """The compiler alone takes as long to import as torch."""
    heavy = (
        "torch._dynamo",
        "torch._inductor",
        "torch.distributed.tensor",
        "triton",
        "transformers",
        "datasets",
    )
    script = "import sys, torch\nbefore = set(sys.modules)\nimport fastft\n"
    script += "fastft._import_rooms()\n"
    script += f"print(*{set(heavy)} & (set(sys.modules) - before))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


PACKAGE = Path(fastft.__file__).parent
MODULES = {
    ".".join(("fastft", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): file
    for file in PACKAGE.rglob("*.py")
}


def run_time_imports(tree: ast.AST) -> Iterator[str]:
    """The modules of the package that this one imports, at its top or inside a function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else str(node.module)
        else:
            yield from run_time_imports(node)


ARROWS = {
    name: MODULES.keys() & {*run_time_imports(ast.parse(file.read_text()))}
    for name, file in MODULES.items()
}


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Nor does an import inside a function hide such a circle; those for types alone may."""
    order = [*graphlib.TopologicalSorter(ARROWS).static_order()]
    assert order.index("fastft.loss.options") < order.index("fastft.loss.cross_entropy")


def test_only_integrations_are_built_on_integrations() -> None:
    wings = tuple(f"fastft.{wing}" for wing in ("data", "loss", "optim", "attention", "flops"))
    assert not [
        (name, found)
        for name, arrows in ARROWS.items()
        for found in arrows
        if name.startswith(wings) and found.startswith("fastft.integrations")
    ]


def described(name: str) -> str:
    """The docstring of a public name, and of the public ones that it leaves its arguments to."""
    text = inspect.getdoc(getattr(fastft, name)) or ""
    others = set(re.findall(r"`(?:fastft\.)?(\w+)`", text)) & set(fastft.__all__) - {name}
    return text + "".join(inspect.getdoc(getattr(fastft, other)) or "" for other in others)


# what callers give arguments to: not an error, nor the tuple that a function returns
CALLED = [
    name
    for name in fastft.__all__
    if inspect.isfunction(thing := getattr(fastft, name))
    or not issubclass(thing, (Exception, tuple))
]


@pytest.mark.parametrize("name", CALLED)
def test_a_docstring_explains_every_argument(name: str) -> None:
    arguments = [
        parameter.name
        for parameter in inspect.signature(getattr(fastft, name)).parameters.values()
        if parameter.kind != parameter.VAR_KEYWORD and not parameter.name.startswith("_")
    ]
    text = described(name)
    assert [
        argument
        for argument in arguments
        if not re.search(rf"(?m)^ +\*?{argument}(, \w+)*:|`{argument}`|\({argument}\)", text)
    ] == []


@pytest.mark.parametrize("name", CALLED)
def test_a_docstring_lists_the_errors_of_wrong_arguments(name: str) -> None:
    assert re.search(r"Raises:\n +\w+Error: ", described(name))


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'adam'"):
        fastft.adam  # noqa: B018


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
class TestEngines:
    def test_unknown_impl(self, operator) -> None:
        names = ", ".join(map(repr, operator.impls))
        with pytest.raises(
            ValueError, match=r"impl must be one of 'auto', 'eager', .*got 'fast'"
        ) as raised:
            operator.resolve("fast", torch.device("cpu"))
        assert names in str(raised.value)

    def test_explicit_impl_never_falls_back(self, operator) -> None:
        for engine in operator.impls[2:]:
            if operator.unavailable(engine, torch.device("cpu")) is not None:
                with pytest.raises(
                    RuntimeError, match=f"impl='{engine}' is not available for {operator.name}"
                ):
                    operator.resolve(engine, torch.device("cpu"))

    def test_where_no_engine_computes_plain_torch_does(self, operator) -> None:
        """As on Apple's devices; attention's `blocks` are plain torch, too."""
        device = torch.device("mps")
        assert operator.resolve("eager", device) == "eager"
        assert operator.resolve("auto", device) == (
            "blocks" if operator.name == "packed attention" else "eager"
        )
        if isinstance(operator, Operator):
            assert operator.implementation("auto", device) is operator.reference
