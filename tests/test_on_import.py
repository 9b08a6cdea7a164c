"""What waits for another library's import happens right behind it, and leaves no trace in it."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import SourceFileLoader

import pytest

from fastft.on_import import when_imported


@pytest.fixture
def awaited(tmp_path, monkeypatch):
    """A module that nobody has imported yet."""
    (tmp_path / "awaited_module.py").write_text('value = "its own"\n')
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    yield "awaited_module"
    sys.modules.pop("awaited_module", None)
    assert sys.meta_path == finders


def test_it_happens_behind_the_import_and_not_before(awaited):
    seen = []
    when_imported(awaited, lambda module: seen.append(module.value))
    importlib.import_module("json")
    assert not seen
    importlib.import_module(awaited)
    assert seen == ["its own"]


def test_at_once_where_the_module_is_there_already(awaited):
    module, seen = importlib.import_module(awaited), []
    when_imported(awaited, seen.append)
    assert seen == [module]


def test_several_wait_for_one_module(awaited):
    seen = []
    for name in "ab":
        when_imported(awaited, lambda module, name=name: seen.append(name))
    importlib.import_module(awaited)
    assert sorted(seen) == ["a", "b"]


def test_the_module_keeps_its_own_loader(awaited):
    when_imported(awaited, lambda module: None)
    module = importlib.import_module(awaited)
    assert type(module.__loader__) is type(module.__spec__.loader) is SourceFileLoader


def test_who_gives_up_waiting_is_not_called(awaited):
    seen = []
    stop = when_imported(awaited, seen.append)
    stop()
    stop()
    importlib.import_module(awaited)
    assert not seen


def test_to_ask_whether_there_is_such_a_module_ends_nothing(awaited):
    seen = []
    when_imported(awaited, seen.append)
    spec = importlib.util.find_spec(awaited)
    assert "its own" in spec.loader.get_source(awaited)
    assert not seen
    assert seen == [importlib.import_module(awaited)]


def test_a_module_that_does_not_exist_is_missing_as_ever():
    stop = when_imported("no_such_module_anywhere", lambda module: None)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
        importlib.import_module("no_such_module_anywhere")
    stop()
