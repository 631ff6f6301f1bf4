"""Pytest set-up: Triton's interpreter where there is no GPU, NaN in uninitialised memory, and no TF32."""

from __future__ import annotations

import os
from pathlib import Path

import torch

# read by triton when it is first imported, so it is set before any test module is
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.pop("FASTLSTM_BACKEND", None)
# what cuBLAS asks for in deterministic mode, before it starts
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
from chunked import CUTS

from fastlstm import cpu_rules, cutting, dispatch, tuning
from fastlstm.dispatch import has_triton, interpreting
from fastlstm.timings import timings

# the same sums in the same order on every machine; pytest-xdist is what fills the cores
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Deterministic mode: torch fills what torch.empty and its kin return with NaN, so a hole left by us is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _full_float32(monkeypatch: pytest.MonkeyPatch):
    """Hold float32 on a GPU to its own tolerance: TF32, which cuDNN takes by default, has a tenth of its digits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def multiplies(monkeypatch: pytest.MonkeyPatch):
    """Return a function that sets what 16 bit this processor's oneDNN multiplies: bfloat16, until it is called."""

    def set_dtypes(*dtypes):
        monkeypatch.setattr(cpu_rules, "_onednn_is_on", lambda: True)
        monkeypatch.setattr(cpu_rules, "_MULTIPLIED", dtypes)

    set_dtypes(torch.bfloat16)
    return set_dtypes


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch):
    """Return a function that makes every layer cut as a line of CUTS says."""

    def set_cuts(name):
        rows, size = CUTS[name]
        monkeypatch.setattr(cutting, "_ROWS_PER_CUT", rows)
        monkeypatch.setattr(cutting, "_FLOPS_PER_CUT", 0)
        monkeypatch.setattr(cutting, "_FLOPS_PER_CUT_FORWARD", rows * 1e4)
        monkeypatch.setattr(cutting, "_CHUNK_BYTES", size)

    return set_cuts


@pytest.fixture
def may_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Let "auto" time its candidates: outside deterministic mode, with an empty folder and an unspent budget."""
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    for name in ("FASTLSTM_AUTOTUNE", "FASTLSTM_AUTOTUNE_MS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FASTLSTM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "_spent", 0.0)
    timings.cache_clear()
    yield
    timings.cache_clear()


@pytest.fixture(autouse=True, scope="session")
def _interpreter():
    """Prepare Triton's interpreter, where it is on."""
    if not (interpreting() and has_triton()):
        yield
        return
    from interpreter import prepared

    with prepared():
        yield
