"""How a packed batch is cut into chunks of steps, each to run as one dense batch (`cpu.py`).

A chunk has as many rows as are active at its first step. Where a row ends inside it the rest of its places are dead:
they cost what live ones do, and cutting costs a call.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastlstm import cpu_rules, packing
from fastlstm.problem import device_of

# what cutting costs in training, as rows that could be computed meanwhile: the weights' new layout and a fixed time;
# and without a backward pass, where there is only the latter; measured
_ROWS_PER_CUT = 32
_FLOPS_PER_CUT = 5e6
_FLOPS_PER_CUT_FORWARD = 1.5e7
_ROWS_BY_AMX = 8  # are computed in the time that one takes without it
# a chunk's working memory stays below this, or below what is left free of the size of stock's graph (`_most_places`)
_CHUNK_BYTES = 1 << 20


class Chunk(NamedTuple):
    """Consecutive steps of one direction that run as one dense batch; a place is step * rows + row.

    Attributes:
        steps: number of steps.
        rows: number of batch rows, those active at the first step.
        source: [steps * rows], the row of the packed data at each place; where it is dead, any.
        alive: [any], the places that are not dead.
        dead: [any], those that are.
        data: the rows of the packed data at `alive`, in that order.
        ends: [any], the place of the last step of each row that goes no further: the last rows of the batch.
        keep: whether training keeps oneDNN's workspace; else backward makes it again.
    """

    steps: int
    rows: int
    source: Tensor
    alive: Tensor
    dead: Tensor
    data: slice | Tensor
    ends: Tensor
    keep: bool


def make_chunks(
    batch_sizes: Tensor,
    I: int,  # noqa: E741
    H: int,
    D: int,
    dtype: torch.dtype,
) -> list[list[Chunk]]:
    """Cut a packed layer that is to be trained into chunks, the same cuts for each of the D directions."""
    sizes = batch_sizes.tolist()
    N = sum(sizes)
    cuts = choose_cuts(sizes, I, H, dtype, training=True)
    keep = _keeps_workspaces(N, I, H, dtype)
    lengths, offsets = packing.spans(batch_sizes, sizes[0], batch_sizes.device)
    chunks: list[list[Chunk]] = [[] for _ in range(D)]
    begin = 0
    for (start, rows), (end, after) in itertools.pairwise(cuts):
        b = torch.arange(rows, device="cpu")
        lives = b < batch_sizes[start:end].unsqueeze(1)  # [steps, rows], in either direction
        alive, dead = (places.flatten().nonzero().squeeze(1) for places in (lives, ~lives))
        last = lengths[:rows] - 1
        ends = (last[after:] - start) * rows + b[after:]
        data = slice(begin, begin + len(alive))
        source = (offsets[start:end].unsqueeze(1) + b).clamp_(max=N - 1).flatten()
        chunks[0].append(Chunk(end - start, rows, source, alive, dead, data, ends, keep))
        if D == 2:
            step = torch.arange(start, end, device="cpu").unsqueeze(1)
            source = (offsets[(last - step).clamp_(min=0)] + b).flatten()
            chunks[1].append(Chunk(end - start, rows, source, alive, dead, source[alive], ends, keep))
        begin = data.stop
    return chunks


def choose_cuts(sizes: list[int], I: int, H: int, dtype: torch.dtype, training: bool) -> list[tuple[int, int]]:  # noqa: E741
    """Return (first step, rows active there) of each chunk, and (T, 0) as the last item."""
    N = sum(sizes)
    target = device_of(torch.device("cpu")).target
    most = _most_places(N, I, H, dtype, roomy=training and target == "avx2")
    flops = 8 * H * (I + H)  # of a row
    if training:
        rows = _ROWS_PER_CUT + _FLOPS_PER_CUT / flops
    else:
        rows = _FLOPS_PER_CUT_FORWARD / flops
        # of dense rows stock may hold little, in one call for all
        if cpu_rules.onednn_has(dtype) and sizes[0] != sizes[-1]:
            most = max(most, _most_places_forward(N, I, H, dtype))
    if dtype == torch.bfloat16 and target == "amx":
        rows *= _ROWS_BY_AMX
    return _cut(sizes, most, rows)


def lay_places(
    sizes: list[int], batch_sizes: Tensor, cuts: list[tuple[int, int]], D: int
) -> tuple[list[int], list[Tensor]]:
    """Lay all chunks one after the other: return the first place of each, and their end; and that of each data row [N].

    The latter for each of the D directions. What has a number for each step is made in Python, which is sooner done.
    """
    edges, first = [0], []
    for (start, rows), (end, _) in itertools.pairwise(cuts):
        first += range(edges[-1], edges[-1] + (end - start) * rows, rows)
        edges.append(edges[-1] + (end - start) * rows)
    offsets = itertools.accumulate(sizes, initial=0)

    def of_rows(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, device="cpu").repeat_interleave(batch_sizes)

    row = torch.arange(sum(sizes), device="cpu")
    by_direction = [row + of_rows([place - offset for place, offset in zip(first, offsets, strict=False)])]
    if D == 2:
        lengths, starts = packing.spans(batch_sizes, sizes[0], batch_sizes.device)
        b = row - starts.repeat_interleave(batch_sizes)
        by_direction.append(torch.tensor(first, device="cpu")[lengths[b] - 1 - of_rows(range(len(sizes)))] + b)
    return edges, by_direction


def _keeps_workspaces(N: int, I: int, H: int, dtype: torch.dtype) -> bool:  # noqa: E741
    """Whether workspaces are kept for backward, or made again.

    The bound is stock's memory, whose graph costs 48H bytes a row in float32 and 24H in 16 bit; a workspace costs 24H,
    and 17H in bfloat16. The gradients of the weights are float32 until all chunks are summed, which in bfloat16 leaves
    room for workspaces only where rows are many; float16, and bfloat16 where it is widened, have no room.
    """
    return dtype == torch.float32 or (cpu_rules.onednn_has(dtype) and N >= 6 * (I + H))


def _most_places(N: int, I: int, H: int, dtype: torch.dtype, roomy: bool) -> float:  # noqa: E741
    """Return how many places a chunk may have: what workspaces and gradients leave of stock's memory; measured.

    `roomy` tells that the layer's backward holds less of its own, as it does in float32 without AVX-512.
    """
    if dtype == torch.float32:
        free = 16 * H * (3 * N - I - H) if roomy else 24 * H * N
    else:
        free = 5 * H * N if _keeps_workspaces(N, I, H, dtype) else H * (16 * N - 28 * (I + H))
    narrow = dtype != torch.float32 and cpu_rules.onednn_has(dtype)
    place_bytes = 12 * max(I, H) + 32 * H if narrow else 32 * max(I, H) + 48 * H  # of a chunk in backward
    return max(_CHUNK_BYTES, free) / place_bytes


def _most_places_forward(N: int, I: int, H: int, dtype: torch.dtype) -> float:  # noqa: E741
    """Return how many places a chunk may have in inference: what copies of the weights leave of stock's; measured.

    In numbers of the dtype stock's op holds 6H a row, this 2H and its indices, and for each place I + H/2 or more.
    """
    a_row = (3.6 if dtype == torch.float32 else 2.2) * H - 30
    return (a_row * N - 7 * H * (I + H) - 44_000) / (1.6 * I + 0.5 * H)


def _cut(sizes: list[int], most: float, rows_per_cut: float) -> list[tuple[int, int]]:
    """Return (first step, rows active there) of each chunk of at most `most` places, and (T, 0) as the last item.

    A chunk ends where its dead places would come to be more than `rows_per_cut`, which another call costs.
    """
    cuts: list[tuple[int, int]] = []
    start = dead = cut_at = 0
    for rows, run in itertools.groupby(sizes):
        steps = len(list(run))
        if cuts:
            dead += (cuts[-1][1] - rows) * steps
        if dead > rows_per_cut:
            cut_at = start
        while cut_at < start + steps:
            cuts.append((cut_at, rows))
            cut_at += max(1, int(most // rows))
            dead = 0
        start += steps
    return [*cuts, (start, 0)]
