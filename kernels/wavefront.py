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
from torch.nn.functional import linear

from ..plans import Plan
from .launch import backward_pass, forward_pass, laid_out_anew, lstm_backward, lstm_forward, settle


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
    plan, _ = settle(plan, c0, gates_x.dtype, backward=False, stack=True)
    if plan.regime == "wavefront":
        return forward_pass(gates_x, h0, c0, w_hh, batch_sizes, save, plan, (bias, w_ih))
    layers = []
    for n in range(len(c0)):
        if n:
            gates_x = linear(layers[-1][0], w_ih[n - 1], bias[n - 1])
        states = (h0[n : n + 1], c0[n : n + 1])
        layers.append(lstm_forward(gates_x, *states, w_hh[n : n + 1], None, batch_sizes, save))
    output, h_n, c_n, gates, cells = zip(*layers, strict=True)
    return torch.hstack(output), torch.cat(h_n), torch.cat(c_n), torch.hstack(gates), torch.hstack(cells)


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
    plan, _ = settle(plan, c0, gates.dtype, backward=True, stack=True)
    if plan.regime == "wavefront":
        return backward_pass(d_output, dh_n, dc_n, gates, cells, c0, w_hh, batch_sizes, plan, w_ih)
    L, _, H = c0.shape
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
