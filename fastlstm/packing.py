"""Where the rows of a batch lie: row `t*B + b` of a dense one, row `offsets[t] + b` of a packed one.

All of it follows from batch_sizes [T], the number of rows active at each step, which torch keeps on the CPU. For a GPU
they are brought over before anything is computed of them, and the rest is done there, by ops that do not make the host
wait. So packed batches too can be captured in a CUDA graph, which holds the batch sizes that it was captured with.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from fastlstm.problem import capturing


@overload
def on_device(batch_sizes: Tensor, device: torch.device) -> Tensor: ...
@overload
def on_device(batch_sizes: None, device: torch.device) -> None: ...
def on_device(batch_sizes: Tensor | None, device: torch.device) -> Tensor | None:
    """Return the batch sizes on the device of the rows; a CUDA graph gets them as arguments of its kernels."""
    if batch_sizes is None or batch_sizes.device == device:
        return batch_sizes
    if not capturing(device):
        return batch_sizes.to(device, non_blocking=True)
    sizes = torch.empty_like(batch_sizes, device=device)
    values, counts = batch_sizes.unique_consecutive(return_counts=True)
    for part, value in zip(sizes.split(counts.tolist()), values.tolist(), strict=True):
        part.fill_(value)
    return sizes


def spans(batch_sizes: Tensor, B: int) -> tuple[Tensor, Tensor]:
    """Return the length of each of the B rows of a packed batch, and the first data row of each step [T]."""
    b = torch.arange(B, device=batch_sizes.device)
    lengths = batch_sizes.shape[0] - torch.searchsorted(batch_sizes.flip(0), b, right=True)
    return lengths, batch_sizes.cumsum(0) - batch_sizes


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
    N, sizes = values.shape[0], on_device(batch_sizes, values.device)
    rows = torch.arange(N, device=sizes.device)
    # a row's first step has none: any row will do until `initial` takes its place. A tracer cannot know the sum of
    # the sizes, and a GPU would have to be asked for it
    if reverse:
        index = (rows + sizes.repeat_interleave(sizes, output_size=N)).clamp(max=N - 1)
        first = _last_rows(sizes, B)
    else:
        sizes_before = torch.cat((sizes.new_zeros(1), sizes[:-1]))
        index = rows - sizes_before.repeat_interleave(sizes, output_size=N)
        first = rows[:B]
    return torch.index_select(values, 0, index).index_copy_(0, first, initial)


def first_rows(values: Tensor, B: int, batch_sizes: Tensor | None, reverse: bool) -> Tensor:
    """Return the row of each batch entry at its first step in a direction: [B, K] from `values` [N, K]."""
    if not reverse:
        return values[:B]
    if batch_sizes is None:
        return values[values.shape[0] - B :]
    return values.index_select(0, _last_rows(on_device(batch_sizes, values.device), B))


def _last_rows(batch_sizes: Tensor, B: int) -> Tensor:
    """Return the data row of each batch entry's last step [B]."""
    lengths, offsets = spans(batch_sizes, B)
    return offsets[lengths - 1] + torch.arange(B, device=batch_sizes.device)
