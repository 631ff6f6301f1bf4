"""All layers of a stack in one launch of the persistent kernels: each works a few steps behind the one below it.

Forward, the programs of a layer hold W_ih beside W_hh and find the h of the layer below in its exchange buffer, which
has a slot for every step. Backward, their parts of dgates [W_hh | W_ih] are parts of dh and of the layer below's dy.
Nobody waits for a layer above (backward: below), which may lag as far as it likes.

`stack_forward` and `stack_backward` are `launch.lstm_forward` and `launch.lstm_backward` with layers in the place of
directions. Where a chip does not hold all layers' programs at once, they run layer after layer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from ..plans import Plan
from .backward_persistent import backward_persistent
from .forward_persistent import forward_persistent
from .launch import (
    at_once,
    device_guard,
    laid_out_anew,
    lstm_backward,
    lstm_forward,
    meetings,
    padded,
    prepare,
    steps,
    together,
    width_of,
)


@laid_out_anew
def stack_forward(
    gates_x: Tensor,
    bias: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    batch_sizes: Tensor | None,
    save: bool,
    plan: Plan | str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the recurrences of all layers.

    Args:
        gates_x: [N, 4H], of the first layer. May be overwritten.
        bias: [L - 1, 4H], of the layers above it.
        h0: [L, B, H].
        c0: [L, B, H].
        w_ih: [L - 1, 4H, H], of the layers above the first.
        w_hh: [L, 4H, H].
        batch_sizes: [T] int64 on the CPU for packed rows, or None for dense ones.
        save: whether to return what `stack_backward` needs.
        plan: as for `launch.lstm_forward`.

    Returns:
        output [N, L*H] of all layers, h_n [L, B, H], c_n [L, B, H]; gates [N, L*4H] and cells [N, L*H], both of size 0
        unless `save`.
    """
    L, B, H = c0.shape
    N, dtype = gates_x.shape[0], gates_x.dtype
    T = steps(N, B, batch_sizes)
    plan, common = prepare(T, c0, dtype, batch_sizes, plan, backward=False, stack=True)
    if plan.regime != "wavefront":
        layers = []
        for n in range(L):
            if n:
                gates_x = linear(layers[-1][0], w_ih[n - 1], bias[n - 1])
            states = (h0[n : n + 1], c0[n : n + 1])
            layers.append(lstm_forward(gates_x, *states, w_hh[n : n + 1], None, batch_sizes, save))
        output, h_n, c_n, gates, cells = zip(*layers, strict=True)
        return torch.hstack(output), torch.cat(h_n), torch.cat(c_n), torch.hstack(gates), torch.hstack(cells)

    gates_x, bias, h0, c0 = (tensor.contiguous() for tensor in (gates_x, bias, h0, c0))
    output = gates_x.new_empty(N, L * H)
    gates = gates_x.new_empty((N, L * 4 * H) if save else 0)
    cells = gates_x.new_empty((N, L * H) if save else 0, dtype=torch.float32)
    h_n, c_n = torch.empty_like(h0), torch.empty_like(c0)
    width = width_of(plan, H)
    arguments = {
        "gates_x_ptr": gates_x,
        "bias_ptr": bias,
        "w_hh_ptr": _side_by_side(plan, w_hh, w_ih, width),
        "h0_ptr": h0,
        "c0_ptr": c0,
        "output_ptr": output,
        "h_n_ptr": h_n,
        "c_n_ptr": c_n,
        "gates_ptr": gates,
        "cells_ptr": cells,
        "exchange_ptr": gates_x.new_zeros(T + 1, at_once(plan, B, L), plan.BLOCK_B, width),
        "SAVE": save,
    }
    with device_guard(c0.device):
        for grid, meeting in meetings(plan, c0):
            together(forward_persistent, grid, **arguments, **common, **meeting)
    return output, h_n, c_n, gates, cells


@laid_out_anew
def stack_backward(
    d_output: Tensor,
    dh_n: Tensor,
    dc_n: Tensor,
    gates: Tensor,
    cells: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    batch_sizes: Tensor | None,
    plan: Plan | str | None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrences of all layers back; return dgates [N, L*4H] and dc0 [L, B, H].

    Of d_output [N, L*H] only the last layer's columns count; dh_n and dc_n are [L, B, H], and the others those of
    `stack_forward`.
    """
    L, B, H = c0.shape
    T = steps(len(gates), B, batch_sizes)
    plan, common = prepare(T, c0, gates.dtype, batch_sizes, plan, backward=True, stack=True)
    if plan.regime != "wavefront":
        layers = []
        dy = d_output[:, -H:]
        for n in reversed(range(L)):
            cotangents = (dy, dh_n[n : n + 1], dc_n[n : n + 1])
            saved = (gates.chunk(L, 1)[n], cells.chunk(L, 1)[n], c0[n : n + 1], w_hh[n : n + 1])
            layers.append(lstm_backward(*cotangents, *saved, None, batch_sizes))
            if n:
                dy = layers[-1][0] @ w_ih[n - 1]
        dgates, dc0, _ = zip(*reversed(layers), strict=True)
        return torch.hstack(dgates), torch.cat(dc0)

    dh_n, dc_n, gates, cells, c0 = (tensor.contiguous() for tensor in (dh_n, dc_n, gates, cells, c0))
    dgates, dc0 = torch.empty_like(gates), torch.empty_like(c0)
    programs = -(-H // plan.BLOCK_H)
    units = programs * plan.BLOCK_H
    width = width_of(plan, 2 * units)
    owners = width // plan.BLOCK_H
    arguments = {
        # the kernel fills in the dy of the layers below the last
        "d_output_ptr": d_output.clone(memory_format=torch.contiguous_format),
        "dh_n_ptr": dh_n,
        "dc_n_ptr": dc_n,
        "gates_ptr": gates,
        "cells_ptr": cells,
        "c0_ptr": c0,
        "w_hh_ptr": pad(_side_by_side(plan, w_hh, w_ih, units), (0, width - 2 * units)),
        "dgates_ptr": dgates,
        "dc0_ptr": dc0,
        "partials_ptr": gates.new_empty(2, at_once(plan, B, L), owners, programs, plan.BLOCK_B, plan.BLOCK_H),
    }
    with device_guard(c0.device):
        for grid, meeting in meetings(plan, c0):
            together(backward_persistent, grid, **arguments, **common, **meeting)
    return dgates, dc0


def _side_by_side(plan: Plan, w_hh: Tensor, w_ih: Tensor, width: int) -> Tensor:
    """Return [L, 4, UNITS, 2 * width]: W_hh of each layer, then its W_ih, zeros for the first, which has none below."""
    weights = (w_hh.contiguous(), pad(w_ih, (0, 0, 0, 0, 1, 0)))
    return torch.cat([padded(plan, weight, width).view(len(w_hh), 4, -1, width) for weight in weights], 3)
