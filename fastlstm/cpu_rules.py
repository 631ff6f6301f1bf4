"""What "auto" takes on a CPU, by what was measured there.

Stock's own op runs a dense batch in one call of oneDNN a layer, in float32 and, where the processor has it, bfloat16;
anything else it runs step by step, in training with a graph of every step. Beside it stand oneDNN's layer called for
chunks of steps (`cpu.py`), and plain torch's loop over the steps, its backward written by hand (`reference.py`). Which
is fastest depends on the size of a step, the number of steps and the processor. The bounds below come from scans of
150 to 1100 random shapes a processor, each route timed in turn, and are those with the least loss to the best route of
each shape that so few words can say.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fastlstm.problem import Problem
from fastlstm.reference import accumulation_dtype

# dtypes in 16 bit in which oneDNN has a product for this processor; asked once, for a tracer could not
_MULTIPLIED = {
    dtype
    for dtype, name in ((torch.bfloat16, "_is_mkldnn_bf16_supported"), (torch.float16, "_is_mkldnn_fp16_supported"))
    if torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, name)()
}


def choose(p: Problem, target: str) -> tuple[str, str, str]:
    """Return (backend, regime, reason) of a problem on a CPU, by its target as `problem.Device` names it."""
    if target == "amx" and p.dtype != torch.bfloat16:
        target = "intel"  # its tiles are for bfloat16
    if p.B == 0:
        return "torch", "stock", "The batch has no rows."
    if is_widened(p.dtype):
        return _choose_widened(p, target)
    if onednn_has(p.dtype):
        # stock, too, sees that a packed batch with one run is dense
        if p.runs <= 1 and not p.P:
            if p.T == 1 and p.B <= 8 and not p.training:
                return "torch", "step", "For one step oneDNN's layout of the weights costs more than torch's cell."
            odd = target == "amx" and p.I % 2 and not p.H % 2 and not p.training
            if odd and p.T >= 48 and p.B * p.H**2 * (p.I + 32) > 1 << 24:  # less is over too soon to gain
                return "onednn", "chunks", "oneDNN does an odd number of inputs without AMX; chunks make it even."
            return "torch", "stock", "Stock's own op runs a dense batch in one oneDNN call a layer."
        if target == "avx2":
            return _choose_without_avx512(p)
        if not (obstacle := _obstacle_to_chunks(p, target)):
            return "onednn", "chunks", "Stock would go step by step; chunks of steps run as dense oneDNN layers."
    else:
        obstacle = "oneDNN has no kernel for this dtype here"
    if _loop_pays(p, target):
        how = "its backward written by hand" if p.training else "a few ops each"
        return "reference", "loop", f"Since {obstacle}, plain torch runs the steps, {how}."
    return "torch", "stock", f"Since {obstacle}, stock's own loop over the steps is as fast as any."


def _choose_widened(p: Problem, target: str) -> tuple[str, str, str]:
    """Return (backend, regime, reason) on a CPU for a dtype in 16 bit that oneDNN does not multiply there.

    Torch multiplies such numbers one at a time, so float32 pays for all but the smallest calls.
    """
    # elsewhere than on "avx2" it was not measured, so as in float32
    chunks = _chunks_pay(p) if target == "avx2" else not _obstacle_to_chunks(replace(p, dtype=torch.float32), target)
    dear = p.P and p.H > 64  # W_hh W_hr, which chunks need, in 16 bit
    if chunks and not dear and onednn_has(torch.float32):
        return "onednn", "chunks", "This processor is slow in this dtype; oneDNN's layer runs in float32, in chunks."
    fewest, least = (8, 1 << 17) if p.training else (16, 1 << 18)
    if (p.training and p.T >= 12) or (fewest <= p.T * p.B and least <= p.T * _products(p)):
        return "reference", "loop", "This processor is slow in this dtype; plain torch runs the steps, in float32."
    return "torch", "stock", "The call is over before float32 copies of the weights would pay."


def _choose_without_avx512(p: Problem) -> tuple[str, str, str]:
    """Return (backend, regime, reason) for packed rows or a projection in float32 on a CPU without AVX-512.

    There oneDNN's layer, too, goes step by step, by a GEMM that is no faster than MKL's.
    """
    if _chunks_pay(p):
        return "onednn", "chunks", "Stock would go step by step; chunks of steps run as dense oneDNN layers."
    if p.T >= 8 if p.training else (p.T >= 48 and p.B >= 40 and 2 * p.H >= p.I):
        how = "its backward written by hand" if p.training else "a few ops each"
        return "reference", "loop", f"The steps are large, or few; plain torch runs them, {how}."
    return "torch", "stock", "The steps are large, or few, so that stock's own loop is as fast as any."


def _chunks_pay(p: Problem) -> bool:
    """Whether chunks in float32 beat a loop over the steps on a CPU without AVX-512, in 16 bit too.

    They do so while a step is small and steps are many. On the 1100 shapes that it was fitted to, the choice is within
    2 to 4 % of the best for each, and 6 % in the smallest calls without a backward pass.
    """
    shortest = 12 if p.training else 24 if is_widened(p.dtype) else 44
    if shortest > p.T or 16 * p.H < p.I:
        return False
    # in training they hold the weights and gradients of them twice, in float32: not where that exceeds what steps save
    rows = (4 if is_widened(p.dtype) else 2) * (p.I + p.H)
    if p.training and p.H * (rows - p.T * p.B) > 1 << 15:
        return False
    if p.P:
        return (16 if p.training else 4) * p.T >= p.B * (p.I + p.P)
    if p.training:
        return _products(p) <= p.T << 10 if is_widened(p.dtype) else p.B * (p.I + p.H) <= p.T << 6
    return p.T * max(100, p.H) >= 400 * p.B  # where H is large the loop's weights do not fit a cache


def _obstacle_to_chunks(p: Problem, target: str) -> str:
    """Return why `cpu.py` would lose against a loop over the steps, or ''.

    A loop is MKL's products, stock's as ours, and on an "intel" processor they are its best. On "amx" bfloat16 is
    multiplied in tiles, which oneDNN alone does.
    """
    bf16 = p.dtype == torch.bfloat16
    weight = p.H * (p.I + p.H)
    if target == "intel" and _mkl_pays(p) and _loop_pays(p, target):
        return "MKL's products of a step are as fast as oneDNN's layer"
    # stock's steps without a graph are the cheapest, in float32 above all, and where it multiplies many inputs at once;
    # a projection adds products of its own
    if p.training:
        shortest = 12
    elif bf16:
        tiles = 15 + (p.B * p.I >> 10) + (weight >> 16) if target == "amx" else 0
        shortest = max(tiles, 24 if p.B * p.H < 128 else 16)
    else:
        shortest = max(48 if p.P else 80, p.B * p.I >> 4) if target == "intel" else 24
    if (1.5 * shortest if p.P else shortest) > p.T:
        return "a sequence is too short to pay for the call"
    if p.H > 4 * p.P > 0:
        return "the state without its projection is more than four times as wide"
    if target == "amx":  # what it computes costs little, so its copies and gradients of the weights cost the more
        widest, largest, fewest = (4, 1 << 14, 8) if p.training else (16, 1 << 14, 0)
    else:
        widest, largest, fewest = 16, 1 << 16, 5 if bf16 else 4 if p.training else 2
    if widest * p.H < p.I or (bf16 and p.I + p.H >= 1024):
        return "oneDNN is slow where the input is this wide"
    if weight > largest and fewest * (p.I + p.H) > p.T * p.B:
        return "oneDNN's copies of the weights would cost more than the steps"
    return ""


def _products(p: Problem) -> int:
    """Return how many products a step has for each gate."""
    return p.B * p.H * (p.I + (p.P or p.H))


def _mkl_pays(p: Problem) -> bool:
    """Whether a step has so many products that MKL is as fast as oneDNN's layer on an "intel" processor."""
    if p.training or p.P or p.dtype == torch.bfloat16:
        return _products(p) > 1 << 17
    return _products(p) > min(p.T << 11, 1 << 19)  # a chunk's call costs less the more steps it has


def _loop_pays(p: Problem, target: str) -> bool:
    """Whether the reference's loop over the steps beats stock's, where oneDNN's layer is no choice."""
    if p.dtype == torch.float16 and p.B >= 8:  # stock's is slow with or without a graph
        return True
    if p.training:  # the loop saves stock's graph, but over few steps what a call costs outweighs that
        if target == "amx" and _products(p) > 1 << 23:  # the loop's are in float32
            return (64 if p.P else 16) <= p.T
        if target == "cpu" and p.P and p.dtype == torch.bfloat16:
            return False
        return {"cpu": 16, "avx2": 12}.get(target, 8) <= p.T
    if target != "intel":
        return False
    if p.dtype == torch.bfloat16:  # stock's products are slower than MKL's of float32
        return p.T >= 16
    wide = p.I / p.H  # stock multiplies all inputs at once
    double = p.dtype == torch.float64
    large = _products(p) > 1 << 19 and not double
    shortest = 24 if p.P and not double else max(32, 40 * wide) if large else 72 * max(1, wide)
    if p.dtype not in (torch.float32, torch.float64) or wide > (1 if double else 2) or shortest > p.T:
        return False
    few = not p.P and _products(p) >= p.B**2 << 13  # rows, and weights too large for what is computed with them
    if not double and (few or not _mkl_pays(p)):  # for float64 oneDNN has no layer to compare with
        return False
    return one_product_pays(p.T * p.B, p.B, p.I, p.H, p.P or p.H, p.dtype)


def one_product_pays(rows: int, B: int, I: int, H: int, P: int, dtype: torch.dtype) -> bool:  # noqa: E741
    """Whether `reference.lstm_infer` beats the input GEMM over all `rows` and then `lstm_forward`, on a CPU.

    All weights must stay in its cache, and rows be enough to pay for laying them out.
    """
    size = 4 * H * (I + 1 + P) * accumulation_dtype(dtype).itemsize
    widest = 2 * B * P if is_widened(dtype) else 4 * P  # else the GEMM must be widened, too, a block at a time
    return B >= 4 and widest >= I and size <= 1 << 21 and rows > I + P


def onednn_has(dtype: torch.dtype) -> bool:
    """Whether oneDNN runs stock's dense LSTM in a dtype on this machine."""
    return _onednn_is_on() and (dtype == torch.float32 or (dtype == torch.bfloat16 and dtype in _MULTIPLIED))


def is_widened(dtype: torch.dtype) -> bool:
    """Whether a CPU should compute a dtype in float32, since oneDNN has no product in it on this machine."""
    return dtype in (torch.float16, torch.bfloat16) and not (_onednn_is_on() and dtype in _MULTIPLIED)


def _onednn_is_on() -> bool:
    return torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()
