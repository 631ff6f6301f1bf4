"""The GEMMs over all rows of a layer: what the recurrence leaves to do before and after it.

Each is one product of torch's, or one a direction, in the order of factors in which it is fastest. But where oneDNN has
no product in 16 bit for the processor, torch multiplies such numbers one at a time; so there they are widened to
float32, a block of rows at a time, which would else take the memory that 16 bit have saved. A tracer, who may not know
how many rows there are, sees one block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from fastlstm import cpu_rules, tracing
from fastlstm.weights import join

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


def times_weights(rows: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Return rows [W_1; W_2; ...], [N, K] of [N, D*M] and D weights [M, K]: the gradient of the inputs."""
    if rows.device.type != "cpu":
        return rows @ join(weights)
    # on a CPU no joined copy of the weights is made, which may be larger than all rows
    (part, weight), *others = zip(rows.chunk(len(weights), 1), weights, strict=True)
    if _in_float32(rows):
        total = linear(part, weight.t(), None)
        for part, weight in others:
            total += linear(part, weight.t(), None)
        return total
    M, K = weight.shape
    # where there is much to add up, MKL's float64 GEMM takes a third to nine tenths of the time in this order
    turned = rows.dtype == torch.float64 and M >= K and _are_many(rows, 6 * K)
    total = weight.t() @ part.t() if turned else part @ weight
    for part, weight in others:
        total.addmm_(*((weight.t(), part.t()) if turned else (part, weight)))
    return total.t().contiguous() if turned else total


def sum_of_outer(rows: Tensor, columns: Tensor) -> Tensor:
    """Return rows^T columns, contiguous [M, K] of [N, M] and [N, K]: the gradient of a weight."""
    if rows.device.type != "cpu":
        return rows.t() @ columns
    # over many rows a CPU's GEMM gains at least as much in the other order as it costs to lay the result out anew
    turned = _are_many(rows, (2 if rows.dtype == torch.float64 else 6) * columns.shape[1])
    left, right = (columns, rows) if turned else (rows, columns)
    if not _in_float32(rows):
        total = left.t() @ right
    else:
        (first_left, *more_left), (first_right, *more_right) = _blocks(left, right)
        total = first_left.float().t() @ first_right.float()
        for some_left, some_right in zip(more_left, more_right, strict=True):
            total.addmm_(some_left.float().t(), some_right.float())
    total = total.t() if turned else total
    return total.to(rows.dtype, memory_format=torch.contiguous_format).contiguous()  # in one copy where there is one


def _in_float32(rows: Tensor) -> bool:
    """Whether products of such rows are better made in float32."""
    return rows.device.type == "cpu" and cpu_rules.is_widened(rows.dtype)


def _are_many(rows: Tensor, fewest: int) -> bool:
    """Whether there are that many rows; a tracer, to whom their number may be a symbol, is told that there are."""
    return tracing.watched(rows) or len(rows) >= fewest


def _blocks(*matrices: Tensor) -> list[tuple[Tensor, ...]]:
    """Cut matrices into the same blocks of rows; for a tracer into one."""
    if tracing.watched(*matrices):
        return [(matrix,) for matrix in matrices]
    rows = max(128, _BLOCK_ELEMENTS // sum(matrix.shape[1] for matrix in matrices))
    return [matrix.split(rows) for matrix in matrices]
