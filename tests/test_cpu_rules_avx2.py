"""What "auto" does with CPU tensors where there is no AVX-512, by the problem and by torch's threads."""

from __future__ import annotations

import pytest
import torch
from cpu_choices import BF16, FP16, decide_with


@pytest.mark.parametrize(
    ("backend", "changes"),
    [
        ("torch", {"runs": 0}),
        ("torch", {"T": 7}),
        ("reference", {"T": 8}),
        ("reference", {"T": 47}),
        ("onednn", {"T": 48}),
        ("reference", {"T": 11, "B": 1}),
        ("onednn", {"T": 12, "B": 2, "H": 64}),
        ("reference", {"T": 127, "P": 64}),
        ("onednn", {"T": 128, "P": 64}),
        ("reference", {"B": 8, "I": 256, "H": 256}),
        ("onednn", {"B": 10, "I": 256, "H": 256}),
        ("onednn", {"T": 400, "I": 256, "H": 16, "B": 8}),
        ("reference", {"T": 400, "I": 257, "H": 16, "B": 8}),
        ("torch", {"T": 31, "B": 2, "training": False}),
        ("onednn", {"T": 32, "B": 2, "training": False}),
        ("torch", {"T": 63, "B": 2, "H": 16, "training": False}),
        ("onednn", {"T": 64, "B": 2, "H": 16, "training": False}),
        ("onednn", {"T": 400, "I": 256, "H": 16, "B": 8, "training": False}),
        ("torch", {"T": 400, "I": 257, "H": 16, "B": 8, "training": False}),
        ("torch", {"T": 39, "H": 256, "training": False}),
        ("onednn", {"T": 40, "H": 256, "training": False}),
        ("onednn", {"B": 85, "training": False}),
        ("reference", {"B": 86, "training": False}),
        ("reference", {"B": 86, "I": 256, "training": False}),
        ("torch", {"B": 86, "I": 257, "training": False}),
        ("onednn", {"T": 47, "B": 40, "training": False}),
        ("torch", {"T": 47, "B": 41, "training": False}),
        ("reference", {"T": 48, "B": 41, "training": False}),
        ("reference", {"T": 80, "B": 40, "H": 64, "training": False}),
        ("torch", {"T": 80, "B": 39, "H": 64, "training": False}),
        ("onednn", {"T": 512, "P": 64, "training": False}),
        ("torch", {"T": 511, "P": 64, "training": False}),
        ("onednn", {"T": 44, "B": 1, "P": 64, "training": False}),
        ("torch", {"T": 43, "B": 1, "P": 64, "training": False}),
        ("onednn", {"T": 512, "B": 2, "P": 16, "training": False}),
        ("torch", {"T": 512, "B": 2, "P": 15, "training": False}),
        ("onednn", {"T": 320, "B": 2, "H": 256, "P": 128, "training": False}),
        ("torch", {"T": 319, "B": 2, "H": 256, "P": 128, "training": False}),
        ("torch", {"dtype": torch.float64, "T": 11}),
        ("reference", {"dtype": torch.float64, "T": 12}),
        ("torch", {"dtype": torch.float64, "training": False}),
    ],
    ids=str,
)
@pytest.mark.usefixtures("multiplies")
def test_auto_without_avx512(backend, changes):
    assert decide_with("avx2", changes) == backend


@pytest.mark.parametrize(
    ("backend", "changes"),
    [
        ("onednn", {"B": 320}),
        ("reference", {"B": 321}),
        ("onednn", {"T": 256, "P": 64}),
        ("torch", {"T": 255, "P": 64}),
        ("reference", {"B": 34, "training": True}),  # as with one thread
        ("onednn", {"B": 33, "training": True}),
    ],
    ids=str,
)
@pytest.mark.usefixtures("multiplies")
def test_auto_without_avx512_in_threads(backend, changes):
    assert decide_with("avx2", {"training": False, **changes}, threads=2) == backend


@pytest.mark.parametrize(
    ("backend", "changes"),
    [
        ("reference", {"T": 383}),
        ("onednn", {"T": 384}),
        ("onednn", {"T": 384, "runs": 0}),
        ("reference", {"T": 127, "B": 4}),
        ("onednn", {"T": 128, "B": 4}),
        ("onednn", {"H": 64, "P": 32}),
        ("reference", {"H": 65, "P": 32}),
        ("torch", {"B": 1, "I": 16, "H": 16, "T": 11}),
        ("onednn", {"B": 1, "I": 16, "H": 16, "T": 12}),
        ("torch", {"B": 1, "T": 7}),
        ("reference", {"B": 1, "T": 8}),
        ("torch", {"I": 16, "H": 16, "T": 11}),
        ("reference", {"I": 16, "H": 16, "T": 12, "B": 64}),
        ("reference", {"T": 31, "training": False}),
        ("onednn", {"T": 32, "training": False}),
        ("onednn", {"T": 32, "B": 27, "training": False}),
        ("reference", {"T": 32, "B": 28, "training": False}),
        ("onednn", {"T": 16, "B": 1, "H": 256, "training": False}),
        ("onednn", {"T": 512, "B": 1, "H": 64, "P": 8, "training": False}),
        ("reference", {"T": 512, "B": 1, "H": 64, "P": 7, "training": False}),
        ("torch", {"B": 1, "T": 15, "training": False}),
        ("reference", {"B": 1, "T": 16, "training": False}),
        ("torch", {"I": 16, "H": 16, "T": 31, "training": False}),
        ("reference", {"I": 16, "H": 16, "T": 32, "training": False}),
    ],
    ids=str,
)
def test_auto_where_16_bit_is_not_multiplied(backend, changes, multiplies):
    assert decide_with("avx2", {**FP16, **changes}) == backend
    multiplies(torch.float16)
    assert decide_with("avx2", {**BF16, **changes}) == backend
