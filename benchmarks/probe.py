"""What the machine at hand can do: the roofs of the roofline, measured in a few seconds."""

from __future__ import annotations

import time
from functools import partial

import torch

from benchmarks.peers import STOCK_LSTM
from benchmarks.results import rounded
from benchmarks.timing import Step, sample_seconds
from benchmarks.workloads import DTYPES
from fastlstm import cpu_rules

BANDWIDTH = "bandwidth GB/s"


@torch.no_grad()
def probe(device: torch.device, dtypes: set[str]) -> dict[str, float]:
    """Measure the best of half a second: GFLOP/s of a large matrix product by dtype, and GB/s of a copy.

    A copy of 256 MiB (1 GiB on a GPU) is larger than the caches; its bytes are those read plus those written. On a CPU
    the product is torch's or oneDNN's, whichever is faster, as it is or inside an LSTM: oneDNN knows more processors.
    """
    small = device.type == "cpu"
    source = torch.ones(2**28 if small else 2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() / _best(partial(target.copy_, source), device)
    found = {BANDWIDTH: rounded(copied / 1e9)}
    n = 512 if small else 8192
    for dtype in sorted(dtypes):
        a, b = (torch.randn(n, n, device=device).to(DTYPES[dtype]) for _ in range(2))
        rates = [2 * n**3 / _best(partial(torch.mm, a, b), device)]
        if small and cpu_rules.onednn_has(DTYPES[dtype]):
            weight = torch.ops.mkldnn._reorder_linear_weight(b, n)
            product = partial(torch.ops.mkldnn._linear_pointwise, a, weight, None, "none", [], "")
            rates.append(2 * n**3 / _best(product, device))
            lstm, x = STOCK_LSTM(n, n, dtype=a.dtype), torch.randn(8, 256, n).to(a.dtype)
            rates.append(2 * x.numel() * 8 * n / _best(partial(lstm, x), device))
        found[dtype] = rounded(max(rates) / 1e9)
    return found


def _best(step: Step, device: torch.device) -> float:
    """Seconds of the fastest call in half a second."""
    step()
    best, deadline = sample_seconds(step, device), time.perf_counter() + 0.5
    while time.perf_counter() < deadline:
        best = min(best, sample_seconds(step, device))
    return best
