"""One LSTM layer with gradients: the custom ops, and the autograd Function that wraps them.

The recurrence is an opaque op for torch.compile and torch.export (`fastlstm::lstm_forward` and `lstm_backward`);
everything around it is plain torch over the whole sequence: the input GEMM before it and, in backward, the GEMMs
that turn dgates into the gradients of the input, the weights, the biases and h0.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from fastlstm import reference

# w_ih [4H, I], w_hh [4H, P], b_ih [4H], b_hh [4H], w_hr [P, H] of one direction
DirectionWeights = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def lstm_layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[DirectionWeights],
    batch_sizes: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the D directions of one layer over rows (`reference.py` says how rows are laid out).

    Args:
        x: [N, I].
        h0: [D, B, P] (P is H without projection).
        c0: [D, B, H].
        weights: one tuple (w_ih, w_hh, b_ih, b_hh, w_hr) a direction; biases and w_hr may be None.
        batch_sizes: [T] int64 on the CPU for packed rows, or None for dense ones.
        backend: "reference" or "triton".

    Returns:
        output [N, D*P], h_n [D, B, P], c_n [D, B, H].
    """
    flat = [weight for direction in weights for weight in direction]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, h0, c0, *flat)):
        output, h_n, c_n, _, _ = LSTMFunction.apply(x, h0, c0, batch_sizes, backend, *flat)  # pyright: ignore
        return output, h_n, c_n
    w_hh, w_hr = _recurrent_weights(flat)
    output, h_n, c_n, _, _ = lstm_forward(_gates_x(x, flat), h0, c0, w_hh, w_hr, batch_sizes, False, backend)
    return output, h_n, c_n


class LSTMFunction(torch.autograd.Function):
    """One layer with a hand-written backward, and a differentiable form for double backward."""

    @staticmethod
    def forward(
        x: Tensor, h0: Tensor, c0: Tensor, batch_sizes: Tensor | None, backend: str, *flat: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Return what `lstm_layer` does, and the activated gates and cells for backward."""
        w_hh, w_hr = _recurrent_weights(flat)
        return lstm_forward(_gates_x(x, flat), h0, c0, w_hh, w_hr, batch_sizes, True, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        """Save for backward.

        Beyond the inputs and the output that the caller holds anyway, a row and direction cost 4H activated gates
        in the input's dtype and H cells in float32: 20H bytes in float32, 12H in float16 and bfloat16 (40H in
        float64, whose cells are float64).
        """
        x, h0, c0, batch_sizes, backend, *flat = inputs
        rows, _, _, gates, cells = output
        ctx.mark_non_differentiable(gates, cells)
        ctx.save_for_backward(x, h0, c0, batch_sizes, rows, gates, cells, *flat)
        ctx.backend = backend

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        """Return the gradient of each input that needs one."""
        x, h0, c0, batch_sizes, output, gates, cells, *flat = ctx.saved_tensors
        d_output, dh_n, dc_n, _, _ = cotangents
        needs_x, needs_h0, needs_c0, _, _, *needs_flat = ctx.needs_input_grad
        needs = (needs_x, needs_h0, needs_c0, *needs_flat)
        if torch.is_grad_enabled():
            gradients = _differentiable_backward((d_output, dh_n, dc_n), (x, h0, c0, *flat), needs, batch_sizes)
        else:
            saved = (output, gates, cells)
            gradients = _backward((d_output, dh_n, dc_n), (x, h0, c0, *flat), needs, saved, batch_sizes, ctx.backend)
        dx, dh0, dc0, *dflat = gradients
        return dx, dh0, dc0, None, None, *dflat


def _backward(
    cotangents: tuple[Tensor, Tensor, Tensor],
    inputs: tuple[Any, ...],
    needs: tuple[bool, ...],
    saved: tuple[Tensor, Tensor, Tensor],
    batch_sizes: Tensor | None,
    backend: str,
) -> list[Tensor | None]:
    """Run the recurrence's adjoint, then one GEMM over all rows for each gradient that is needed."""
    d_output, dh_n, _ = cotangents
    x, h0, c0, *flat = inputs
    output, gates, cells = saved
    needs_x, needs_h0, needs_c0, *needs_flat = needs
    D, B, P = h0.shape
    H = c0.shape[2]
    w_hh, w_hr = _recurrent_weights(flat)
    dgates, dc0 = lstm_backward(*cotangents, gates, cells, c0, w_hh, w_hr, batch_sizes, backend)

    dx = dgates @ torch.cat(flat[::5]) if needs_x else None
    dh0 = torch.empty_like(h0) if needs_h0 else None
    dflat: list[Tensor | None] = []
    for d in range(D):
        needs_w_ih, needs_w_hh, needs_b_ih, needs_b_hh, needs_w_hr = needs_flat[5 * d : 5 * d + 5]
        dgates_d = dgates[:, d * 4 * H : (d + 1) * 4 * H]
        output_d = output[:, d * P : (d + 1) * P]
        reverse = d == 1
        dw_ih = dw_hh = db = dw_hr = None
        if dh0 is not None:
            torch.mm(reference.first_rows(dgates_d, B, batch_sizes, reverse), w_hh[d], out=dh0[d])
        if needs_w_ih:
            dw_ih = dgates_d.t() @ x
        if needs_w_hh:
            dw_hh = dgates_d.t() @ reference.previous(output_d, h0[d], batch_sizes, reverse)
        if needs_b_ih or needs_b_hh:
            db = dgates_d.sum(0)
        if needs_w_hr:
            o = gates[:, (4 * d + 3) * H : (4 * d + 4) * H]
            m = o * cells[:, d * H : (d + 1) * H].tanh().to(o.dtype)
            # h_t is used by the output, by the step after it and, at the end, by h_n
            dh = d_output[:, d * P : (d + 1) * P]
            dh = dh + reference.previous(dgates_d @ w_hh[d], dh_n[d], batch_sizes, not reverse)
            dw_hr = dh.t() @ m
        dflat += [dw_ih, dw_hh, db if needs_b_ih else None, db if needs_b_hh else None, dw_hr]
    return [dx, dh0, dc0 if needs_c0 else None, *dflat]


def _differentiable_backward(
    cotangents: tuple[Tensor, Tensor, Tensor],
    inputs: tuple[Any, ...],
    needs: tuple[bool, ...],
    batch_sizes: Tensor | None,
) -> list[Tensor | None]:
    """Differentiate the differentiable form, so that the gradients can be differentiated again."""
    # aliases: a path from one input to another outside this layer must not be counted
    aliases: list[Any] = [None if t is None else t.view_as(t) for t in inputs]
    x, h0, c0, *flat = aliases
    w_hh, w_hr = _recurrent_weights(flat)
    outputs = reference.lstm_differentiable(_gates_x(x, flat), h0, c0, w_hh, w_hr, batch_sizes)
    wanted = [alias for alias, needed in zip(aliases, needs, strict=True) if needed and alias is not None]
    gradients = iter(torch.autograd.grad(outputs, wanted, cotangents, create_graph=True, allow_unused=True))
    return [next(gradients) if needed else None for needed in needs]


def _gates_x(x: Tensor, flat: Sequence[Tensor | None]) -> Tensor:
    """Return the input's part of the gates, both biases in it, for all rows and directions: [N, D*4H]."""
    bias = None
    if flat[2] is not None:
        bias = _cat(flat[2::5]) + _cat(flat[3::5])
    return F.linear(x, _cat(flat[::5]), bias)


def _recurrent_weights(flat: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """Return w_hh [D, 4H, P] and w_hr [D, P, H] or None."""
    return _stack(flat[1::5]), None if flat[4] is None else _stack(flat[4::5])


def _cat(tensors: Sequence[Any]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _stack(tensors: Sequence[Any]) -> Tensor:
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def _implementation(backend: str) -> ModuleType:
    """Return the module whose forward and backward run the recurrence."""
    if backend == "reference":
        return reference
    from fastlstm.kernels import launch  # imports triton, which a CPU-only install need not have

    return launch


@torch.library.custom_op("fastlstm::lstm_forward", mutates_args=())
def lstm_forward(
    gates_x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None,
    batch_sizes: Tensor | None,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the recurrence of one layer: `reference.lstm_forward` says what it takes and returns."""
    return _implementation(backend).lstm_forward(gates_x, h0, c0, w_hh, w_hr, batch_sizes, save)


@lstm_forward.register_fake
def _(gates_x, h0, c0, w_hh, w_hr, batch_sizes, save, backend):
    N = gates_x.shape[0]
    D, _, P = h0.shape
    H = c0.shape[2]
    return (
        gates_x.new_empty(N, D * P),
        torch.empty_like(h0, memory_format=torch.contiguous_format),
        torch.empty_like(c0, memory_format=torch.contiguous_format),
        gates_x.new_empty(gates_x.shape if save else 0),
        gates_x.new_empty((N, D * H) if save else 0, dtype=reference.accumulation_dtype(gates_x.dtype)),
    )


@torch.library.custom_op("fastlstm::lstm_backward", mutates_args=())
def lstm_backward(
    d_output: Tensor,
    dh_n: Tensor,
    dc_n: Tensor,
    gates: Tensor,
    cells: Tensor,
    c0: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None,
    batch_sizes: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Run the adjoint of the recurrence: `reference.lstm_backward` says what it takes and returns."""
    implementation = _implementation(backend)
    return implementation.lstm_backward(d_output, dh_n, dc_n, gates, cells, c0, w_hh, w_hr, batch_sizes)


@lstm_backward.register_fake
def _(d_output, dh_n, dc_n, gates, cells, c0, w_hh, w_hr, batch_sizes, backend):
    return torch.empty_like(gates), torch.empty_like(c0, memory_format=torch.contiguous_format)
