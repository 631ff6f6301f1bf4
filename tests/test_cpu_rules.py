"""What "auto" does with CPU tensors: by the problem, by what oneDNN has, and by the processor."""

from __future__ import annotations

import pytest
import torch
from cpu_choices import BF16, FP16, PACKED, decide_with

from fastlstm import cpu_rules, functional
from fastlstm.dispatch import decide
from fastlstm.problem import Device, Problem


@pytest.mark.parametrize(
    ("backend", "changes"),
    [
        ("onednn", {}),
        ("onednn", {"training": False}),
        ("onednn", {"dtype": torch.bfloat16}),
        ("onednn", {"P": 64}),
        ("onednn", {"P": 64, "runs": 0}),
        ("torch", {"runs": 0}),
        ("torch", {"runs": 1}),
        ("torch", {"B": 0}),
        ("torch", {"T": 11}),
        ("onednn", {"T": 12}),
        ("reference", {"T": 17, "P": 64}),
        ("onednn", {"T": 18, "P": 64}),
        ("torch", {"T": 23, "training": False}),
        ("onednn", {"T": 24, "training": False}),
        ("torch", {"T": 15, "dtype": torch.bfloat16, "training": False}),
        ("onednn", {"T": 16, "dtype": torch.bfloat16, "training": False}),
        ("torch", {"P": 16, "dtype": torch.bfloat16}),
        ("reference", {"T": 71, "I": 192, "H": 192}),
        ("onednn", {"T": 71, "I": 192, "H": 192, "training": False}),
        ("reference", {"T": 71, "I": 192, "H": 192, "dtype": torch.bfloat16}),
        ("reference", {"P": 16}),
        ("torch", {"P": 16, "training": False}),
        ("reference", {"I": 4096}),
        ("reference", {"I": 1024, "dtype": torch.bfloat16}),
        ("reference", {"I": 1024, "H": 1024}),
        ("reference", {"dtype": torch.float64}),
        ("reference", {"dtype": torch.float64, "runs": 0}),
        ("torch", {"dtype": torch.float64, "T": 5}),
        ("torch", {"dtype": torch.float64, "training": False}),
        ("torch", {"dtype": torch.complex64}),
    ],
    ids=str,
)
@pytest.mark.usefixtures("multiplies")
def test_auto_on_a_cpu(backend, changes):
    assert decide_with("cpu", changes) == backend


@pytest.mark.parametrize(
    ("backend", "target", "changes"),
    [
        ("onednn", "cpu", {}),
        ("onednn", "cpu", {"runs": 0}),
        ("reference", "cpu", {"P": 64}),
        ("onednn", "cpu", {"H": 64, "P": 32}),
        ("reference", "cpu", {"T": 11}),
        ("torch", "cpu", {"T": 2, "B": 1}),
        ("reference", "intel", {}),
        ("reference", "intel", {"T": 383}),
        ("onednn", "intel", {"T": 384}),
        ("onednn", "intel", {"T": 384, "runs": 0, "training": False}),
        ("reference", "intel", {"T": 959, "B": 2, "H": 256, "training": False}),
        ("onednn", "intel", {"T": 960, "B": 2, "H": 256, "training": False}),
        ("onednn", "amx", {"T": 384}),
    ],
    ids=str,
)
@pytest.mark.usefixtures("multiplies")
def test_auto_in_float16_with_avx512(backend, target, changes):
    assert decide_with(target, {**FP16, **changes}) == backend


@pytest.mark.parametrize(
    ("backend", "target", "changes"),
    [
        ("onednn", "cpu", {}),
        ("torch", "cpu", {"runs": 0}),  # stock has oneDNN's layer for it
        ("torch", "intel", {"runs": 0, "T": 1, "B": 1}),
        ("onednn", "cpu", {"runs": 0, "training": True}),
        ("onednn", "cpu", {"H": 65, "P": 32}),  # a product in 16 bit is no burden
        ("torch", "cpu", {"T": 23, "B": 8}),
        ("reference", "cpu", {"T": 5, "B": 8, "training": True}),
        ("torch", "cpu", {"T": 5, "B": 7, "training": True}),
        ("reference", "intel", {"T": 383}),
        ("onednn", "intel", {"T": 384}),
        ("reference", "intel", {"T": 16, "B": 2}),
        ("torch", "intel", {"T": 1, "B": 31}),
        ("reference", "intel", {"T": 10, "H": 512}),
        ("torch", "intel", {"T": 128, "H": 513}),
        ("reference", "intel", {"T": 129, "H": 513, "I": 512}),
        ("onednn", "amx", {"T": 384}),
    ],
    ids=str,
)
def test_auto_where_float16_is_multiplied(backend, target, changes, multiplies):
    multiplies(torch.bfloat16, torch.float16)
    assert decide_with(target, {**FP16, "training": False, **changes}) == backend


def test_the_cell_for_one_step(multiplies):
    multiplies(torch.bfloat16, torch.float16)
    one_step = {**vars(PACKED), "T": 1, "B": 8, "runs": 0, "training": False}
    for dtype, regime in ((torch.float32, "step"), (torch.bfloat16, "step"), (torch.float16, "stock")):
        assert decide(Problem(**{**one_step, "dtype": dtype}), Device("cpu", "intel")).regime == regime


@pytest.mark.parametrize(("lowered", "backend"), [("", "torch"), ("no graph", "torch"), ("graph", "reference")])
def test_float16_by_autocast(lowered, backend, multiplies):
    """Stock asks oneDNN for its layer in float16, which it does not have where a graph is kept, whatever wants one."""
    multiplies(torch.bfloat16, torch.float16)
    problem = Problem(**{**vars(PACKED), "dtype": torch.float16, "runs": 0, "training": False})
    decision = functional._decision.__wrapped__(
        "auto", "auto", lowered, True, Device("cpu", "intel"), (), *vars(problem).values()
    )
    assert decision.backend == backend


INFER = {"training": False}
INFER_BF16 = {**BF16, **INFER}


@pytest.mark.parametrize(
    ("backend", "changes"),
    [
        ("torch", {"runs": 0}),
        ("reference", {"T": 191}),
        ("onednn", {"T": 192}),
        ("torch", {"T": 7}),
        ("reference", {"T": 8}),
        ("torch", {"T": 7, "B": 1, "H": 64}),
        ("onednn", {"T": 8, "B": 1, "H": 64}),
        ("reference", {"T": 639, "B": 2, "H": 256}),  # its weights would be copied for too few rows
        ("onednn", {"T": 640, "B": 2, "H": 256}),
        ("reference", {"T": 341, "P": 64}),
        ("onednn", {"T": 342, "P": 64}),
        ("onednn", {"T": 342, "P": 64, "runs": 0}),
        ("onednn", {**BF16, "B": 5}),
        ("reference", {**BF16, "B": 6}),
        ("torch", {**BF16, "T": 7, "B": 5}),
        ("onednn", {**BF16, "T": 8, "B": 5}),
        ("reference", {**BF16, "T": 1599, "B": 1, "H": 256}),
        ("onednn", {**BF16, "T": 1600, "B": 1, "H": 256}),
        ("reference", {**BF16, "T": 85, "B": 2, "P": 64}),
        ("onednn", {**BF16, "T": 86, "B": 2, "P": 64}),
        ("reference", {**INFER, "T": 39, "B": 20, "I": 32}),
        ("onednn", {**INFER, "T": 40, "B": 20, "I": 32}),
        ("onednn", {**INFER, "B": 66}),
        ("reference", {**INFER, "B": 67}),
        ("onednn", {**INFER, "I": 150}),
        ("reference", {**INFER, "I": 151}),
        ("reference", {**INFER, "I": 384}),
        ("torch", {**INFER, "I": 385}),
        ("torch", {**INFER, "T": 319, "B": 2, "H": 256}),  # its weights would be copied for too few rows
        ("onednn", {**INFER, "T": 320, "B": 2, "H": 256}),
        ("torch", {**INFER, "T": 32, "B": 23}),
        ("reference", {**INFER, "T": 32, "B": 24}),
        ("torch", {**INFER, "T": 32, "B": 39, "H": 52}),
        ("reference", {**INFER, "T": 32, "B": 40, "H": 52}),
        ("reference", {**INFER, "T": 341, "P": 64}),
        ("onednn", {**INFER, "T": 342, "P": 64}),
        ("torch", {**INFER, "T": 39, "B": 1, "P": 64}),
        ("onednn", {**INFER, "T": 40, "B": 1, "P": 64}),
        ("reference", {**INFER_BF16, "T": 191}),
        ("onednn", {**INFER_BF16, "T": 192}),
        ("reference", {**INFER_BF16, "T": 29, "B": 2, "I": 322, "H": 323}),
        ("onednn", {**INFER_BF16, "T": 30, "B": 2, "I": 322, "H": 323}),
        ("reference", {**INFER_BF16, "T": 769, "B": 2, "I": 257, "H": 256}),
        ("onednn", {**INFER_BF16, "T": 770, "B": 2, "I": 257, "H": 256}),
        ("reference", {**INFER_BF16, "T": 15, "B": 2}),
        ("onednn", {**INFER_BF16, "T": 16, "B": 2}),
        ("torch", {**INFER_BF16, "T": 11, "B": 2}),
        ("reference", {**INFER_BF16, "T": 12, "B": 2}),
        ("reference", {**INFER_BF16, "T": 39, "B": 1, "H": 64, "P": 32}),
        ("onednn", {**INFER_BF16, "T": 40, "B": 1, "H": 64, "P": 32}),
        ("reference", {**INFER_BF16, "T": 23, "H": 363}),
        ("onednn", {**INFER_BF16, "T": 24, "H": 363}),
        ("onednn", {**INFER_BF16, "T": 24, "H": 363, "I": 181}),
        ("reference", {**INFER_BF16, "T": 24, "H": 362}),
        ("reference", {**INFER_BF16, "T": 24, "H": 363, "I": 182}),
        ("torch", {**INFER, "T": 47, "dtype": torch.float64}),
        ("reference", {**INFER, "T": 48, "dtype": torch.float64}),
        ("reference", {**INFER, "T": 48, "P": 64, "dtype": torch.float64}),
        ("torch", {**INFER, "I": 385, "dtype": torch.float64}),
        ("torch", {**INFER, "dtype": torch.complex64}),
    ],
    ids=str,
)
@pytest.mark.usefixtures("multiplies")
def test_auto_on_intel(backend, changes):
    assert decide_with("intel", changes) == backend


ODD = {**BF16, "runs": 0, "I": 39, "training": False}


@pytest.mark.parametrize(
    ("backend", "changes"),
    [
        ("reference", {}),
        ("reference", BF16),
        ("onednn", {**BF16, "T": 90, "B": 6, "H": 96}),
        ("reference", {**BF16, "T": 89, "B": 6, "H": 96}),
        ("onednn", {**BF16, "B": 1, "H": 99}),
        ("reference", {**BF16, "B": 1, "H": 100}),
        ("onednn", {**BF16, "B": 1, "H": 80, "P": 38}),
        ("reference", {**BF16, "B": 1, "H": 80, "P": 39}),
        ("onednn", {**BF16, "T": 12, "B": 1, "I": 32, "H": 32}),
        ("reference", {**BF16, "T": 11, "B": 1, "I": 32, "H": 32}),
        ("reference", {**BF16, "T": 6}),
        ("torch", {**BF16, "T": 5}),
        ("reference", {**BF16, "T": 6, "I": 512, "H": 512}),
        ("torch", {**BF16, "T": 19, "B": 17, "I": 512, "H": 512}),
        ("reference", {**BF16, "T": 20, "B": 17, "I": 512, "H": 512}),
        ("torch", {**BF16, "T": 11, "B": 64, "I": 512, "H": 512, "P": 256}),
        ("reference", {**BF16, "T": 12, "B": 64, "I": 512, "H": 512, "P": 256}),
        ("reference", {**INFER_BF16, "T": 63, "B": 32}),
        ("onednn", {**INFER_BF16, "T": 64, "B": 32}),
        ("onednn", {**INFER_BF16, "I": 256}),
        ("reference", {**INFER_BF16, "I": 257}),
        ("reference", {**INFER_BF16, "H": 127}),
        ("onednn", {**INFER_BF16, "H": 127, "B": 12}),
        ("reference", {**INFER_BF16, "T": 55, "B": 3, "I": 320}),
        ("onednn", {**INFER_BF16, "T": 56, "B": 3, "I": 320}),
        ("reference", {**INFER_BF16, "T": 31, "B": 2}),
        ("onednn", {**INFER_BF16, "T": 32, "B": 2}),
        ("onednn", {**INFER_BF16, "B": 8, "H": 336}),
        ("torch", {**INFER_BF16, "B": 8, "H": 336, "I": 65}),
        ("onednn", {**INFER_BF16, "B": 2, "I": 127, "H": 200}),
        ("torch", {**INFER_BF16, "T": 31, "B": 1}),
        ("reference", {**INFER_BF16, "T": 16, "B": 2}),
        ("torch", {**INFER_BF16, "T": 16, "B": 8, "H": 129}),
        ("reference", {**INFER_BF16, "T": 20, "I": 999, "H": 256}),
        ("torch", {**INFER_BF16, "T": 20, "H": 257}),
        ("reference", {**INFER_BF16, "T": 16, "H": 256}),
        ("torch", {**INFER_BF16, "T": 15, "H": 256}),
        ("onednn", {**INFER_BF16, "T": 32, "B": 1, "I": 129, "H": 64, "P": 63}),
        ("reference", {**INFER_BF16, "T": 32, "B": 1, "I": 130, "H": 64, "P": 63}),
        ("reference", {**INFER_BF16, "T": 31, "B": 1, "I": 32, "H": 64, "P": 16}),
        ("torch", {**INFER_BF16, "T": 15, "B": 1, "P": 64}),
        ("reference", {**INFER_BF16, "T": 8, "B": 2, "P": 64}),
        ("reference", {**INFER_BF16, "T": 20, "H": 384, "P": 256}),
        ("torch", {**INFER_BF16, "T": 20, "H": 385, "P": 256}),
        ("onednn", ODD),
        ("torch", {**ODD, "training": True}),
        ("torch", {**ODD, "I": 40}),
        ("torch", {**ODD, "H": 127}),
        ("torch", {**ODD, "T": 47}),
        ("torch", {**ODD, "B": 4}),
        ("torch", {**ODD, "dtype": torch.float32}),
    ],
    ids=str,
)
@pytest.mark.usefixtures("multiplies")
def test_auto_with_amx(backend, changes):
    assert decide_with("amx", changes) == backend


@pytest.mark.parametrize(
    ("pays", "target", "sizes", "dtype"),  # rows, B, I, H, P
    [
        (True, "intel", (1, 1, 64, 64, 192), torch.float32),
        (False, "intel", (1, 1, 65, 64, 192), torch.float32),
        (True, "intel", (704, 2, 192, 512, 512), torch.float32),
        (False, "intel", (703, 2, 192, 512, 512), torch.float32),
        (True, "intel", (1408, 2, 192, 512, 512), torch.bfloat16),
        (False, "intel", (1407, 2, 192, 512, 512), torch.bfloat16),
        (True, "intel", (9999, 16, 192, 128, 128), torch.float64),
        (False, "intel", (9999, 16, 193, 128, 128), torch.float64),
        (True, "intel", (9999, 16, 1024, 128, 128), torch.bfloat16),
        (True, "amx", (704, 2, 192, 512, 512), torch.float32),
        (True, "amx", (1, 1, 192, 128, 128), torch.bfloat16),
        (False, "amx", (9999, 16, 193, 128, 128), torch.bfloat16),
        (False, "cpu", (193, 3, 64, 128, 128), torch.float32),
        (True, "cpu", (9999, 16, 512, 128, 128), torch.float32),
        (False, "cpu", (9999, 16, 513, 128, 128), torch.float32),
        (True, "avx2", (9999, 16, 128, 256, 256), torch.float32),
        (False, "avx2", (9999, 16, 256, 256, 256), torch.float32),  # its weights would leave the cache
    ],
    ids=str,
)
@pytest.mark.usefixtures("multiplies")
def test_one_product(pays, target, sizes, dtype):
    assert cpu_rules.one_product_pays(target, *sizes, dtype=dtype) == pays


@pytest.mark.parametrize(
    ("training", "runs", "backend"), [(True, 14, "reference"), (True, 0, "reference"), (False, 14, "torch")]
)
def test_auto_without_onednn(training, runs, backend, monkeypatch):
    monkeypatch.setattr(torch._C, "_get_mkldnn_enabled", lambda: False)
    problem = Problem(**{**vars(PACKED), "training": training, "runs": runs})
    assert decide(problem, Device("cpu", "cpu")).backend == backend
