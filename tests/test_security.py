"""What SECURITY.md promises of the package's own code, read from its syntax trees.

This finds what a change brings in unawares; a name that is put together while the program runs is
not seen.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "fastft"
FILES = sorted(file.relative_to(PACKAGE).as_posix() for file in PACKAGE.rglob("*.py"))
# all that rooms may use: modules with what is in them, or names in a module
REVIEWED = set(
    """
    __future__ argparse array bisect collections contextlib copy dataclasses enum functools gc
    hashlib heapq inspect io itertools json logging math mmap numbers operator pathlib random re
    resource shlex shutil signal statistics struct sys sysconfig tempfile textwrap threading time
    traceback types typing warnings weakref zipfile
    __main__ _signal fastft accelerate bitsandbytes datasets flash_attn matplotlib numpy peft
    pyarrow rich safetensors torch transformers triton
    importlib.abc importlib.machinery.ModuleSpec importlib.metadata importlib.util.find_spec
    platform.machine platform.python_version
    os.PathLike os.access os.close os.cpu_count os.environ os.fsync os.getcwd os.getpid os.open
    os.path os.register_at_fork os.replace os.sched_getaffinity os.sysconf os.sysconf_names
    os.O_RDONLY os.W_OK os.X_OK
    ctypes.CFUNCTYPE ctypes.PYFUNCTYPE ctypes.c_char_p ctypes.c_int64 ctypes.c_size_t
    ctypes.c_void_p ctypes.cast ctypes.py_object ctypes.pythonapi
    huggingface_hub.split_torch_state_dict_into_shards
    """.split()
)
# and what of it they may not
REFUSED = set(
    """
    builtins.__import__ builtins.breakpoint builtins.compile builtins.eval builtins.exec
    builtins.input
    datasets.load_dataset datasets.load_from_disk
    numpy.fromregex numpy.load numpy.lib
    torch.classes torch.hub torch.jit.load torch.load torch.multiprocessing torch.package
    torch.serialization torch.export.load torch.ops.load_library torch.utils.cpp_extension
    torch.utils.model_zoo
    torch.distributed.all_gather_object torch.distributed.broadcast_object_list
    torch.distributed.checkpoint torch.distributed.gather_object torch.distributed.launch
    torch.distributed.recv_object_list torch.distributed.rpc torch.distributed.run
    torch.distributed.scatter_object_list torch.distributed.send_object_list
    transformers.dynamic_module_utils transformers.pipeline transformers.utils.cached_file
    transformers.utils.hub
    """.split()
)
# whoever is added here is explained in SECURITY.md
ALLOWED = {
    "__init__.py": {"importlib.import_module"},  # a room, by the public name
    "__main__.py": {"importlib.import_module"},  # a command
    "_native.py": {"ctypes.CDLL"},
    "commands/children.py": {"subprocess", "os.killpg"},
    "commands/doctor.py": {"os._exit"},
    "commands/engines.py": {"platform.platform"},
    "commands/recorded_script.py": {
        "importlib.import_module",  # itself
        "multiprocessing",  # workers of the script's own are ended
        "os._exit",
        "platform.platform",
        "platform.processor",
    },
    "commands/script.py": {
        "builtins",  # the script's
        "builtins.compile",
        "builtins.exec",
        "importlib.machinery.SourceFileLoader",
    },
    "integrations/doctor/model.py": {"importlib.import_module"},  # is a package of KERNELS whole?
    "ops.py": {"importlib.import_module"},  # triton, and the rooms of its kernels
    "optim/adamw_update.py": {"ctypes.CDLL"},  # a class to compare with
    "optim/offload/choice.py": {
        "subprocess",
        "torch.distributed.all_gather_object",
        "torch.distributed.broadcast_object_list",
    },
}
MUST_BE_FALSE = {"allow_pickle", "shell", "trust_remote_code"}
MAY_BRING_CODE = {"from_config", "from_pretrained"}


class Source:
    """A module's code, with names as they are called outside of it."""

    def __init__(self, text: str) -> None:
        self.nodes = [*ast.walk(ast.parse(text))]
        self.names: dict[str, str] = {}  # of the module -> outside
        self.imported: list[str] = []
        self.own = {node.arg for node in self.nodes if isinstance(node, ast.arg)} | {
            node.id
            for node in self.nodes
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        for node in self.nodes:
            if isinstance(node, ast.Import | ast.ImportFrom):
                self._import(node)
        for node in self.nodes:
            if isinstance(node, ast.Assign) and (outside := self.outside(node.value)):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
                self.names |= dict.fromkeys(names, outside)

    def _import(self, node: ast.Import | ast.ImportFrom) -> None:
        module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        if isinstance(node, ast.ImportFrom) and node.level:
            module = f"fastft.{module}"
        for alias in node.names:
            name = module + alias.name
            self.imported.append(name)
            root = name if module or alias.asname else name.partition(".")[0]
            self.names[alias.asname or (alias.name if module else root)] = root

    def outside(self, node: ast.AST) -> str | None:
        """`os.path` for what is this, under whatever name; None for what is of the module."""
        match node:
            case ast.Name(name) if name in self.names:
                return self.names[name]
            case ast.Name(name) if hasattr(builtins, name) and name not in self.own:
                return f"builtins.{name}"
            case ast.Attribute(base, name) | ast.Call(
                ast.Name("getattr"), [base, ast.Constant(str(name)), *_]
            ):
                outside = self.outside(base)
                return outside and f"{outside}.{name}"
            case ast.Subscript(modules, ast.Constant(str(name))) | ast.Call(
                ast.Attribute(modules, "get"), [ast.Constant(str(name)), *_]
            ):
                return name if self.outside(modules) == "sys.modules" else None
        return None

    def used(self) -> Iterator[str]:
        """All that is imported, or named by its place in a module."""
        yield from self.imported
        yield from filter(None, map(self.outside, self.nodes))


def places(name: str) -> set[str]:
    """`os.path.join` is in `os`, in `os.path`, and itself."""
    parts = name.split(".")
    return {".".join(parts[: i + 1]) for i in range(len(parts))}


ON_THE_WAY = set().union(*map(places, REVIEWED)) - REVIEWED  # os, to os.path


def dangers(text: str) -> set[str]:
    """What nobody has reviewed, and what is refused, of that which a source uses."""
    source = Source(text)
    found = set(code_of_others(source.nodes))
    for name in source.used():
        if refused := places(name) & REFUSED:
            found |= refused
        elif name.endswith(".*"):
            found.add(name)
        elif not places(name) & REVIEWED and not name.startswith("builtins."):
            found |= {min(places(name) - ON_THE_WAY, key=len, default="")} - {""}
    return found


def code_of_others(nodes: list[ast.AST]) -> Iterator[str]:
    """Options that let code in, wherever they are not False, and calls that lack such an option."""
    called = {id(node.func): node for node in nodes if isinstance(node, ast.Call)}
    for node in nodes:
        match node:
            case ast.keyword(str(name), value) if name in MUST_BE_FALSE:
                if not (isinstance(value, ast.Constant) and value.value is False):
                    yield name
            case ast.Constant(str(name)) if name in MUST_BE_FALSE | MAY_BRING_CODE:
                yield name  # an option in a dict, or getattr
            case ast.Attribute(_, name) if name in MAY_BRING_CODE:
                keywords = called[id(node)].keywords if id(node) in called else []
                if "trust_remote_code" not in [keyword.arg for keyword in keywords]:
                    yield name


@pytest.mark.parametrize("file", FILES)
def test_a_room_uses_what_is_reviewed_and_what_it_is_allowed(file: str) -> None:
    assert dangers((PACKAGE / file).read_text()) == ALLOWED.get(file, set())


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", "pickle"),
        ("import _pickle", "_pickle"),
        ("import urllib.request as r", "urllib"),
        ("import socketserver", "socketserver"),
        ("import xmlrpc.client", "xmlrpc"),
        ("import telnetlib", "telnetlib"),
        ("import websockets", "websockets"),
        ("import multiprocessing", "multiprocessing"),
        ("import concurrent.futures", "concurrent"),
        ("import asyncio\nasyncio.create_subprocess_exec(x)", "asyncio"),
        ("def f():\n    from subprocess import run", "subprocess"),
        ("from os import execv\nexecv(a, b)", "os.execv"),
        ("from os import posix_spawn", "os.posix_spawn"),
        ("from os import *", "os.*"),
        ("import os\nos.execv(a, b)", "os.execv"),
        ("import os as o\no.system(x)", "os.system"),
        ("import os\no = os\no.system(x)", "os.system"),
        ("import os.path\nos.fork()", "os.fork"),
        ("import os\ngetattr(os, 'system')(x)", "os.system"),
        ("import sys\nsys.modules['os'].system(x)", "os.system"),
        ("import sys\no = sys.modules.get('os')\no.system(x)", "os.system"),
        ("eval('1')", "builtins.eval"),
        ("compile(text, 'f', 'exec')", "builtins.compile"),
        ("import builtins\nbuiltins.exec(x)", "builtins builtins.exec"),
        ("__import__('pickle')", "builtins.__import__"),
        ("import importlib\nimportlib.import_module(x)", "importlib.import_module"),
        ("from importlib import util\nutil.module_from_spec(s)", "importlib.util.module_from_spec"),
        ("import ctypes\nctypes.CDLL(path)", "ctypes.CDLL"),
        ("import torch\ntorch.load(f)", "torch.load"),
        ("from torch import load", "torch.load"),
        ("import torch as t\nt.load(f)", "torch.load"),
        ("import torch\ntorch.jit.load(f)", "torch.jit.load"),
        ("import torch\ntorch.hub.load(r, m)", "torch.hub"),
        ("import torch\ntorch.serialization.load(f)", "torch.serialization"),
        ("import torch\ntorch.ops.load_library(f)", "torch.ops.load_library"),
        (
            "import torch.distributed as dist\ndist.broadcast_object_list(x)",
            "torch.distributed.broadcast_object_list",
        ),
        ("import numpy\nnumpy.load(f, allow_pickle=True)", "numpy.load allow_pickle"),
        ("import pandas\npandas.read_pickle(f)", "pandas"),
        ("from huggingface_hub import hf_hub_download", "huggingface_hub.hf_hub_download"),
        ("import transformers\ntransformers.pipeline(x)", "transformers.pipeline"),
        ("run(a, shell=True)", "shell"),
        ("AutoConfig.from_pretrained(a)", "from_pretrained"),
        ("AutoModel.from_config(a, **options)", "from_config"),
        ("make = AutoModel.from_config", "from_config"),
        ("getattr(AutoModel, 'from_config')(a)", "from_config"),
        ("AutoConfig.from_pretrained(a, trust_remote_code=b)", "trust_remote_code"),
        (
            "AutoConfig.from_pretrained(a, **{'trust_remote_code': True})",
            "from_pretrained trust_remote_code",
        ),
        ("model.eval()\nretrieval = 1\nself.load(x)\nrun(a, shell=False)", ""),
        ("import os\nos.path.join(a)\nfrom fastft.loss import eval", ""),
        ("AutoConfig.from_pretrained(a, trust_remote_code=False)", ""),
    ],
)
def test_a_danger_is_found(source: str, found: str) -> None:
    assert dangers(source) == set(found.split())


def test_what_is_allowed_is_explained() -> None:
    page = (PACKAGE.parent / "SECURITY.md").read_text()
    for word in (
        "`compare` execute the script",
        "no shell",
        "`python -m fastft estimate`",
        "`uname -p`",
        "`all_gather_object`",
        "`broadcast_object_list`",
        "`importlib.import_module`",
        "`libfastft_cpu.so`",
    ):
        assert word in page
