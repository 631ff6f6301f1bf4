"""What "auto" takes on a CPU, by what was measured there.

Stock's own op runs a dense batch in one call of oneDNN a layer, in float32 and, where the processor has it, bfloat16;
anything else it runs step by step, in training with a graph of every step. Beside it stand oneDNN's layer called for
chunks of steps (`cpu.py`), and plain torch's loop over the steps, its backward written by hand (`reference.py`). Which
is fastest depends on the size of a step, the number of steps and the processor. The bounds below come from scans of
150 to 5000 random shapes a processor, each route timed in turn, and are those with the least loss to the best route of
each shape that so few words can say.
"""

from __future__ import annotations

import torch

from fastlstm.problem import Device, Problem
from fastlstm.reference import accumulation_dtype

# dtypes in 16 bit in which oneDNN has a product for this processor; asked once, for a tracer could not
_MULTIPLIED = {
    dtype
    for dtype, name in ((torch.bfloat16, "_is_mkldnn_bf16_supported"), (torch.float16, "_is_mkldnn_fp16_supported"))
    if torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, name)()
}


def choose(p: Problem, device: Device) -> tuple[str, str, str]:
    """Return (backend, regime, reason) of a problem on a CPU."""
    target, threads = _target_for(p.dtype, device.target), device.processors
    if p.B == 0:
        return "torch", "stock", "The batch has no rows."
    if p.dtype.is_complex:
        return "torch", "stock", "Nothing here is made for complex numbers."
    # stock, too, sees that a packed batch with one run is dense
    if p.runs <= 1 and not p.P and onednn_has(p.dtype, graph=p.training):
        if p.T == 1 and p.B <= 8 and not p.training and p.dtype != torch.float16:
            return "torch", "step", "For one step oneDNN's layout of the weights costs more than torch's cell."
        odd = target == "amx" and p.I % 2 and not p.H % 2 and not p.training
        if odd and p.T >= 48 and p.B * p.H**2 * (p.I + 32) > 1 << 24:  # less is over too soon to gain
            return "onednn", "chunks", "oneDNN does an odd number of inputs without AMX; chunks make it even."
        return "torch", "stock", "Stock's own op runs a dense batch in one oneDNN call a layer."
    if p.dtype in (torch.float16, torch.bfloat16) and not onednn_has(p.dtype):
        return _choose_without_layer(p, target, threads)
    if onednn_has(p.dtype):
        if _chunks_pay(p, target, threads):
            return "onednn", "chunks", "Stock would go step by step; chunks of steps run as dense oneDNN layers."
        why = "The steps are large, or few"
    else:
        why = "In this dtype oneDNN has no kernel here"
    if _loop_pays(p, target):
        how = "its backward written by hand" if p.training else "a few ops each"
        return "reference", "loop", f"{why}; plain torch runs them, {how}."
    return "torch", "stock", f"{why}; stock's own loop is as fast as any."


def _choose_without_layer(p: Problem, target: str, threads: int) -> tuple[str, str, str]:
    """Return (backend, regime, reason) on a CPU for a dtype in 16 bit where stock goes step by step, dense or not.

    Where the dtype `is_widened`, torch multiplies such numbers one at a time, so float32 pays for all but the smallest
    calls.
    """
    widened = is_widened(p.dtype)
    dear = widened and p.P and p.H > 64  # W_hh W_hr, which chunks need
    if onednn_has(torch.float32) and not dear and _chunks_pay(p, target, threads):
        return "onednn", "chunks", "This processor is slow in this dtype; oneDNN's layer runs in float32, in chunks."
    fewest, least = (8, 1 << 17) if p.training else (16, 1 << 18)
    enough = (p.training and p.T >= 12) or (fewest <= p.T * p.B and least <= p.T * _products(p))
    loop_pays = enough if widened else _loop_pays(p, target)
    if loop_pays:
        return "reference", "loop", "This processor is slow in this dtype; plain torch runs the steps, in float32."
    return "torch", "stock", "The call is over before float32 copies of the weights would pay."


def _chunks_pay(p: Problem, target: str, threads: int) -> bool:
    """Whether oneDNN's layer, called for chunks of steps, beats a loop over the steps.

    It does so while a step is small and steps are many.
    """
    if target == "avx2":
        return _chunks_pay_without_avx512(p, threads)
    rules = {"intel": _chunks_pay_on_intel, "amx": _chunks_pay_by_amx}
    return rules.get(target, _chunks_pay_elsewhere)(p)


def _chunks_pay_without_avx512(p: Problem, threads: int) -> bool:
    """As `_chunks_pay`, in 16 bit too, which is widened: there the layer goes step by step, by a GEMM like MKL's.

    It shares out all its work among threads, of a loop only the products are large enough for that. On the 1900 shapes
    that this was fitted to, with one thread and with two, the choice is within 2 to 5 % of the best for each.
    """
    widened = is_widened(p.dtype)
    if 16 * p.H < p.I:
        return False
    if p.training:
        # they hold the weights and gradients of them twice, in float32: not where that exceeds what steps save
        rows = (4 if widened else 2) * (p.I + p.H)
        if p.T < 12 or p.H * (rows - p.T * p.B) > 1 << 15:
            return False
        if p.P:
            return 16 * p.T >= p.B * (p.I + p.P)
        return _products(p) <= p.T << 10 if widened else p.B * (p.I + p.H) <= p.T << 6
    if not widened and _copies_are_dear(p, 2):
        return False
    if p.P:
        return p.T >= 44 and p.H <= 8 * p.P and (8 if threads > 1 else 4) * p.T >= p.B * (p.I + p.P)
    size = p.T * max(64, p.H)  # where H is large the loop's weights do not fit a cache
    return size >= 1 << 12 and size >= (40 if threads > 1 else 150) * p.B


def _chunks_pay_on_intel(p: Problem) -> bool:
    """As `_chunks_pay`, where MKL's products are at their best, and bfloat16's are not done in tiles.

    On the 5000 shapes that this and `_loop_pays` were fitted to, the choice is within 1 to 2 % of the best for each.
    """
    narrow = p.dtype != torch.float32
    shortest = 8 if p.training else 16 if narrow and not p.P else 40
    if p.training:
        fewest = 5 if narrow else 4
    elif p.dtype == torch.bfloat16:
        fewest = 3 if p.I > p.H else 0  # else two copies of all weights are no more than a loop's W_hh in float32
    else:
        fewest = 6 if narrow else 2
    if shortest > p.T or _copies_are_dear(p, fewest):
        return False
    if p.P:
        return _products(p) <= (384 if narrow else 768) * p.T
    if narrow and not p.training and p.H**2 > 1 << 17 and 2 * p.I <= p.H and p.T >= 24:
        return True  # in float32, as a loop has them, the weights leave its cache
    if p.dtype == torch.float16:
        return _products(p) <= p.T << 10
    if p.training:
        return _products(p) <= (1 << 17 if narrow else p.T << 11)
    if narrow:
        fast_loop = one_product_pays("intel", p.T * p.B, p.B, p.I, p.H, p.H, p.dtype)
        return p.B * (p.I + p.H) <= 44 * p.T and (_products(p) <= p.T << 11 or not fast_loop)
    return p.B * (p.I + p.H) <= p.T << 7 and 2 * p.I <= 3 * p.T


def _chunks_pay_by_amx(p: Problem) -> bool:
    """As `_chunks_pay` in bfloat16 where oneDNN multiplies it in tiles (AMX).

    What it computes there costs little, what it does besides, layouts and gradients of the weights, the more. On the
    3000 shapes that this, `_loop_pays` and `one_product_pays` were fitted to, a third in sixteens, the choice is
    within 2 % of the best for each in training, and within 8 % without: what would hold far more memory than stock is
    not taken.
    """
    if (12 if p.training else 32) > p.T:
        return False
    if p.training:
        return _products(p) <= p.T << 10 and p.H * (p.I + (p.P or p.H)) <= (1 << 13 if p.P else 1 << 14)
    if p.P:
        return _products(p) <= 384 * p.T
    if _copies_are_dear(p, 2):
        return False
    # it multiplies by pairs: with an odd H it goes without AMX
    pairs = p.H % 2 == 0 and 256 * p.B <= p.H * p.T and p.I <= 2 * p.H
    return pairs or p.B * (p.I + p.H) <= 24 * p.T


def _chunks_pay_elsewhere(p: Problem) -> bool:
    """As `_chunks_pay`, by scans of 150 to 220 shapes on an AMD EPYC with AVX-512."""
    bf16 = p.dtype == torch.bfloat16
    # stock's steps without a graph are the cheapest, in float32 above all, and where it multiplies many inputs at once;
    # a projection adds products of its own
    if p.training:
        shortest = 12
    elif bf16:
        shortest = 24 if p.B * p.H < 128 else 16
    else:
        shortest = 24
    if (1.5 * shortest if p.P else shortest) > p.T or p.H > 4 * p.P > 0:
        return False
    wide = 16 * p.H < p.I or (bf16 and p.I + p.H >= 1024)
    return not wide and not _copies_are_dear(p, 5 if bf16 else 4 if p.training else 2)


def _copies_are_dear(p: Problem, fewest: int) -> bool:
    """Whether weights are large, and rows too few, not `fewest` for each column of them, to pay for copies of them."""
    return p.H * (p.I + p.H) > 1 << 16 and fewest * (p.I + p.H) > p.T * p.B


def _products(p: Problem) -> int:
    """Return how many products a step has for each gate."""
    return p.B * p.H * (p.I + (p.P or p.H))


def _loop_pays(p: Problem, target: str) -> bool:
    """Whether the reference's loop over the steps beats stock's, where oneDNN's layer is no choice."""
    width = p.P or p.H
    if p.training:  # the loop saves stock's graph, but over few steps what a call costs outweighs that
        if p.dtype == torch.float16 and p.B >= 8:
            return True
        if target == "amx":  # the loop's products are in float32
            return (6 if _products(p) <= 1 << 23 else 12 if p.P else 20) <= p.T
        if target == "cpu" and p.P and p.dtype == torch.bfloat16:
            return False
        return (16 if target == "cpu" else 12 if target == "avx2" and p.dtype != torch.float32 else 8) <= p.T
    if target == "avx2":
        return p.dtype == torch.float32 and p.T >= 48 and p.B >= 40 and 2 * p.H >= p.I
    if target == "amx":
        fewest, largest = (16, 3 << 15) if p.P else (32, 1 << 16)
        return max(fewest, width if p.H * width > 1 << 14 else 0) <= p.T * p.B and p.H * width <= largest
    if target != "intel":
        return False
    if p.dtype == torch.bfloat16:  # stock's products are slower than MKL's of float32
        return p.T * p.B >= 24
    if p.dtype == torch.float16:  # so they are, until weights in float32 leave a cache
        return (4 * width if p.H * width > 1 << 18 else 32) <= p.T * p.B
    if p.dtype not in (torch.float32, torch.float64):
        return False
    # stock multiplies all inputs at once, and its steps cost little where they are small
    return p.I <= 3 * p.H and p.T * p.B >= 768 and p.T * p.B * p.H >= 1 << 16


def one_product_pays(target: str, rows: int, B: int, I: int, H: int, P: int, dtype: torch.dtype) -> bool:  # noqa: E741
    """Whether `reference.lstm_infer` beats the input GEMM over all `rows` and then `lstm_forward`, on a CPU.

    Rows must be enough to pay for laying out all weights, which, but on Intel's processors, must stay in a cache. The
    GEMM is the faster the wider it is, save in 16 bit, where `lstm_infer` has float32. With AMX it is done in tiles,
    and loses only where it is small, whatever the rows.
    """
    target = _target_for(dtype, target)
    if target == "amx":
        return H * I <= 3 << 13
    if target == "intel":
        narrow = accumulation_dtype(dtype) != dtype
        return H * (I + P) <= 1 << 14 or (rows >= 2 * (I + P) if narrow else rows >= I + P and 2 * I <= 3 * P)
    size = 4 * H * (I + 1 + P) * accumulation_dtype(dtype).itemsize
    widest = 2 * B * P if is_widened(dtype) else 4 * P  # else the GEMM must be widened, too, a block at a time
    return B >= 4 and widest >= I and size <= 1 << 21 and rows > I + P


def _target_for(dtype: torch.dtype, target: str) -> str:
    """Return what a processor is to a dtype: the tiles of "amx" are for bfloat16, to others it is like any "intel"."""
    return "intel" if target == "amx" and dtype != torch.bfloat16 else target


def onednn_has(dtype: torch.dtype, graph: bool = True) -> bool:
    """Whether oneDNN runs stock's dense LSTM in a dtype on this machine; float16 it does without a `graph` only."""
    return _onednn_is_on() and (
        dtype == torch.float32 or (dtype in _MULTIPLIED and (dtype == torch.bfloat16 or not graph))
    )


# all that torch.compiler.assume_constant_result does, but for importing torch._dynamo, and triton with it
onednn_has._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def is_widened(dtype: torch.dtype) -> bool:
    """Whether a CPU should compute a dtype in float32, since oneDNN has no product in it on this machine."""
    return dtype in (torch.float16, torch.bfloat16) and not (_onednn_is_on() and dtype in _MULTIPLIED)


def _onednn_is_on() -> bool:
    return torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()
