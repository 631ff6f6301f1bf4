"""The examples in the README and in public docstrings run, on a CPU."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import fastlstm

README = Path(__file__).parent.parent / "README.md"
MODULES = ("fastlstm", *(f"fastlstm.{m.name}" for m in pkgutil.iter_modules(fastlstm.__path__) if m.name != "__main__"))


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert not failed


@pytest.mark.parametrize("name", [n for n in fastlstm.__all__ if callable(getattr(fastlstm, n)) and n.islower()])
def test_public_functions_have_an_example(name):
    assert ">>>" in getattr(fastlstm, name).__doc__


@pytest.mark.parametrize("cls", [fastlstm.LSTM, fastlstm.LSTMCell])
def test_modules_have_an_example(cls):
    assert ">>>" in cls.__doc__


@pytest.mark.skipif(not README.exists(), reason="the README is not installed beside the tests")
def test_readme():
    failed, run = doctest.testfile(str(README), module_relative=False)
    assert run
    assert not failed
