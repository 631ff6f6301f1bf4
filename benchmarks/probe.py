"""What the machine at hand can do: the roofs of the roofline, measured in a few seconds."""

from __future__ import annotations

import time
from functools import partial

import torch

from benchmarks.results import rounded
from benchmarks.timing import Step, sample_seconds
from benchmarks.workloads import DTYPES

BANDWIDTH = "bandwidth GB/s"


def probe(device: torch.device, dtypes: set[str]) -> dict[str, float]:
    """Measure the best of half a second: GFLOP/s of a square matrix product by dtype, and GB/s of a copy.

    A copy of 256 MiB (1 GiB on a GPU) is larger than the caches; its bytes are those read plus those written.
    """
    small = device.type == "cpu"
    source = torch.ones(2**28 if small else 2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() / _best(partial(target.copy_, source), device)
    found = {BANDWIDTH: rounded(copied / 1e9)}
    n = 1024 if small else 8192
    for dtype in sorted(dtypes):
        a, b = (torch.randn(n, n, device=device).to(DTYPES[dtype]) for _ in range(2))
        seconds = _best(partial(torch.mm, a, b), device)
        if small:  # two libraries, of which the second, oneDNN, knows more processors
            x, kernels = a.view(1, n, 32, n // 32), b.view(n, n, 1, 1)
            seconds = min(seconds, _best(partial(torch.conv2d, x, kernels), device))
        found[dtype] = rounded(2 * n**3 / seconds / 1e9)
    return found


def _best(step: Step, device: torch.device) -> float:
    """Seconds of the fastest call in half a second."""
    step()
    best, deadline = sample_seconds(step, device), time.perf_counter() + 0.5
    while time.perf_counter() < deadline:
        best = min(best, sample_seconds(step, device))
    return best
