"""Where the rows of a batch lie: row `t*B + b` of a dense one, row `offsets[t] + b` of a packed one.

All of it follows from batch_sizes [T], the number of rows active at each step, which torch keeps on the CPU. For a GPU
what has the size of T or B is computed there, and goes over in one copy, since each op on a GPU would cost the host as
much; what has a value for each row is computed on the GPU, by ops that do not make the host wait. In a CUDA graph,
which holds the batch sizes that it was captured with, all is computed on the GPU, and so it is for a tracer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastlstm import tracing
from fastlstm.problem import capturing


def spans(batch_sizes: Tensor, B: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the length of each of the B rows of a packed batch, and the first data row of each step [T]."""

    def compute(sizes: Tensor) -> tuple[Tensor, Tensor]:
        # one more, of length 0, where B is odd: then what comes behind is as aligned as kernels like it
        return _lengths(sizes, B + B % 2), sizes.cumsum(0) - sizes

    lengths, offsets = _computed_for(device, batch_sizes, compute)
    return lengths[:B], offsets


def previous(values: Tensor, initial: Tensor, batch_sizes: Tensor | None, reverse: bool) -> Tensor:
    """Return, for each row, the row of `values` at the step before it in a direction, `initial` at its first step.

    Args:
        values: [N, K] rows of all steps.
        initial: [B, K].
        batch_sizes: [T] for packed rows, None for dense ones.
        reverse: whether the direction runs time backwards, so that the step before t is t + 1.

    Returns:
        [N, K].
    """
    B = initial.shape[0]
    if batch_sizes is None:
        return torch.cat((values[B:], initial) if reverse else (initial, values[: values.shape[0] - B]))

    def compute(sizes: Tensor) -> tuple[Tensor, ...]:
        ends = sizes.cumsum(0)
        if reverse:
            return ends, sizes, _last_rows(sizes, B)
        return ends, torch.cat((sizes.new_zeros(1), -sizes[:-1])), torch.arange(B, device=sizes.device)

    # a row's first step has none: any row will do until `initial` takes its place
    ends, shifts, first = _computed_for(values.device, batch_sizes, compute)
    rows = torch.arange(values.shape[0], device=values.device)
    step_of_row = torch.searchsorted(ends, rows, right=True)
    index = rows + shifts.index_select(0, step_of_row)
    if reverse:
        index = index.clamp(max=values.shape[0] - 1)
    return torch.index_select(values, 0, index).index_copy_(0, first, initial)


def first_rows(values: Tensor, B: int, batch_sizes: Tensor | None, reverse: bool) -> Tensor:
    """Return the row of each batch entry at its first step in a direction: [B, K] from `values` [N, K]."""
    if not reverse:
        return values[:B]
    if batch_sizes is None:
        return values[values.shape[0] - B :]
    (last,) = _computed_for(values.device, batch_sizes, lambda sizes: (_last_rows(sizes, B),))
    return values.index_select(0, last)


def _lengths(batch_sizes: Tensor, B: int) -> Tensor:
    """Return the length of each row [B]."""
    b = torch.arange(B, device=batch_sizes.device)
    return batch_sizes.shape[0] - torch.searchsorted(batch_sizes.flip(0), b, right=True)


def _last_rows(batch_sizes: Tensor, B: int) -> Tensor:
    """Return the data row of each batch entry's last step [B]."""
    offsets = batch_sizes.cumsum(0) - batch_sizes
    return offsets[_lengths(batch_sizes, B) - 1] + torch.arange(B, device=batch_sizes.device)


def _computed_for(
    device: torch.device, batch_sizes: Tensor, compute: Callable[[Tensor], tuple[Tensor, ...]]
) -> Sequence[Tensor]:
    """Return what `compute` makes of the batch sizes, on the device of the rows."""
    if batch_sizes.device == device:
        return compute(batch_sizes)
    if capturing(device):
        return compute(_captured(batch_sizes, device))
    if tracing.watched(batch_sizes):
        return compute(batch_sizes.to(device))
    parts = compute(batch_sizes)
    return torch.cat(parts).to(device, non_blocking=True).split([len(part) for part in parts])


def _captured(batch_sizes: Tensor, device: torch.device) -> Tensor:
    """Return the batch sizes on a device, as arguments of the kernels of a CUDA graph, which reads no host memory."""
    sizes = torch.empty_like(batch_sizes, device=device)
    values, counts = batch_sizes.unique_consecutive(return_counts=True)
    for part, value in zip(sizes.split(counts.tolist()), values.tolist(), strict=True):
        part.fill_(value)
    return sizes
