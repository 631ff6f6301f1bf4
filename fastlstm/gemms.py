"""The GEMMs over all rows of a layer: what the recurrence leaves to do before and after it.

Each is one product of torch's, in the order of factors in which it is fastest. But where oneDNN has no product in 16
bit for the processor, torch multiplies such numbers one at a time; so there they are widened to float32, a block of
rows at a time, which would else take the memory that 16 bit have saved. A tracer, who may not know how many rows there
are, sees one block.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from fastlstm import cpu_rules, tracing

_BLOCK_ELEMENTS = 1 << 17  # of float32 rows that are held at once


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return rows weight^T + bias, [N, M] of [N, K], [M, K] and [M]: the pre-activations of the inputs."""
    if not _in_float32(rows):
        return F.linear(rows, weight, bias)
    weight, bias = weight.float(), None if bias is None else bias.float()
    product = rows.new_empty(rows.shape[0], weight.shape[0])
    for some, to in zip(*_blocks(rows, product), strict=True):
        to.copy_(F.linear(some.float(), weight, bias))
    return product


def times_weight(rows: Tensor, weight: Tensor) -> Tensor:
    """Return rows weight, [N, K] of [N, M] and [M, K]: the gradient of the inputs."""
    if _in_float32(rows):
        return linear(rows, weight.t(), None)
    # in this order MKL's float64 GEMM takes a third to two thirds of the time
    if rows.dtype == torch.float64 and rows.device.type == "cpu":
        return (weight.t() @ rows.t()).t().contiguous()
    return rows @ weight


def sum_of_outer(rows: Tensor, columns: Tensor) -> Tensor:
    """Return rows^T columns, contiguous [M, K] of [N, M] and [N, K]: the gradient of a weight."""
    if rows.device.type != "cpu":
        return rows.t() @ columns
    # in this order MKL's float64 GEMM takes two thirds of the time
    if not _in_float32(rows):
        return (columns.t() @ rows).t().contiguous()
    (first_rows, *more_rows), (first_columns, *more_columns) = _blocks(rows, columns)
    total = first_columns.float().t() @ first_rows.float()
    for some_rows, some_columns in zip(more_rows, more_columns, strict=True):
        total.addmm_(some_columns.float().t(), some_rows.float())
    return total.t().to(rows.dtype, memory_format=torch.contiguous_format)


def _in_float32(rows: Tensor) -> bool:
    """Whether products of such rows are better made in float32."""
    return rows.device.type == "cpu" and cpu_rules.is_widened(rows.dtype)


def _blocks(*matrices: Tensor) -> list[tuple[Tensor, ...]]:
    """Cut matrices into the same blocks of rows; for a tracer into one."""
    if tracing.watched(*matrices):
        return [(matrix,) for matrix in matrices]
    rows = max(128, _BLOCK_ELEMENTS // sum(matrix.shape[1] for matrix in matrices))
    return [matrix.split(rows) for matrix in matrices]
