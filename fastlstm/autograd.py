"""One LSTM layer with gradients: the custom ops, and the autograd Function that wraps them.

For torch.compile and torch.export a layer is one opaque op, `fastlstm::lstm_forward`: the input GEMM over the whole
sequence, then the recurrence. `fastlstm::lstm_backward` is the recurrence's adjoint; the GEMMs that turn its dgates
into the gradients of the input, the weights, the biases and h0 are plain torch, one over all rows for each gradient
that is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F  # noqa: N812

from fastlstm import dispatch, reference
from fastlstm.problem import Problem, device_of

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
        backend: "reference", "triton", or "auto" for the better of the two where and when the layer runs.

    Returns:
        output [N, D*P], h_n [D, B, P], c_n [D, B, H].
    """
    flat = [weight for direction in weights for weight in direction]
    if transformed():
        return _differentiable(x, h0, c0, flat, batch_sizes)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, h0, c0, *flat)):
        output, h_n, c_n, _, _ = LSTMFunction.apply(x, h0, c0, batch_sizes, backend, *flat)  # pyright: ignore
        return output, h_n, c_n
    output, h_n, c_n, _, _ = lstm_forward(x, h0, c0, *_by_kind(flat), batch_sizes, False, backend)
    return output, h_n, c_n


def transformed() -> bool:
    """Whether torch.func or forward-mode AD is at work: they see into plain ops only, and past ours to a wrong result.

    torch.compile has transforms of its own, and never asks.
    """
    if torch.compiler.is_compiling():
        return False
    functions: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return forward_ad._current_level >= 0 or functions.peek_interpreter_stack() is not None


class LSTMFunction(torch.autograd.Function):
    """One layer with a hand-written backward, and a differentiable form for double backward."""

    @staticmethod
    def forward(
        x: Tensor, h0: Tensor, c0: Tensor, batch_sizes: Tensor | None, backend: str, *flat: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Return what `lstm_layer` does, and the activated gates and cells for backward."""
        return lstm_forward(x, h0, c0, *_by_kind(flat), batch_sizes, True, backend)

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
        ctx.set_materialize_grads(False)  # no zeros in the size of the gates
        ctx.save_for_backward(x, h0, c0, batch_sizes, rows, gates, cells, *flat)
        ctx.backend = backend

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple:
        """Return the gradient of each input that needs one."""
        x, h0, c0, batch_sizes, output, gates, cells, *flat = ctx.saved_tensors
        forms = (output, h0, c0)
        d_output, dh_n, dc_n = (
            torch.zeros_like(form) if cotangent is None else cotangent
            for cotangent, form in zip(cotangents, forms, strict=False)
        )
        needs_x, needs_h0, needs_c0, _, _, *needs_flat = ctx.needs_input_grad
        needs = (needs_x, needs_h0, needs_c0, *needs_flat)
        if torch.is_grad_enabled():
            gradients = differentiable_backward((d_output, dh_n, dc_n), (x, h0, c0, *flat), needs, batch_sizes)
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
    x, h0, c0, *flat = inputs
    output, gates, cells = saved
    needs_x, needs_h0, needs_c0, *needs_flat = needs
    D, B, _ = h0.shape
    H = c0.shape[2]
    w_ih, _, w_hh, w_hr = _by_kind(flat)
    dgates, dc0, dh = lstm_backward(*cotangents, gates, cells, c0, w_hh, w_hr, batch_sizes, backend)

    dx = dgates @ w_ih if needs_x else None
    dh0: list[Tensor] = []
    dflat: list[Tensor | None] = []
    for d, (dgates_d, output_d) in enumerate(zip(dgates.chunk(D, 1), output.chunk(D, 1), strict=True)):
        needs_w_ih, needs_w_hh, needs_b_ih, needs_b_hh, needs_w_hr = needs_flat[5 * d : 5 * d + 5]
        reverse = d == 1
        dw_ih = dw_hh = db = dw_hr = None
        if needs_h0:
            dh0.append(reference.first_rows(dgates_d, B, batch_sizes, reverse) @ w_hh[d])
        if needs_w_ih:
            dw_ih = _sum_of_outer(dgates_d, x)
        if needs_w_hh:
            dw_hh = _sum_of_outer(dgates_d, reference.previous(output_d, h0[d], batch_sizes, reverse))
        if needs_b_ih or needs_b_hh:
            db = dgates_d.sum(0)
        if needs_w_hr:
            o = gates[:, (4 * d + 3) * H : (4 * d + 4) * H]
            m = o * cells[:, d * H : (d + 1) * H].tanh().to(o.dtype)
            dw_hr = _sum_of_outer(dh.chunk(D, 1)[d], m)
        dflat += [dw_ih, dw_hh, db if needs_b_ih else None, db if needs_b_hh else None, dw_hr]
    return [dx, _stack(dh0) if needs_h0 else None, dc0 if needs_c0 else None, *dflat]


def differentiable_backward(
    cotangents: tuple[Tensor, Tensor, Tensor],
    inputs: tuple[Any, ...],
    needs: tuple[bool, ...],
    batch_sizes: Tensor | None,
) -> list[Tensor | None]:
    """Differentiate the differentiable form, so that the gradients can be differentiated again."""
    # aliases: a path from one input to another outside this layer must not be counted
    aliases: list[Any] = [None if t is None else t.view_as(t) for t in inputs]
    x, h0, c0, *flat = aliases
    outputs = _differentiable(x, h0, c0, flat, batch_sizes)
    wanted = [alias for alias, needed in zip(aliases, needs, strict=True) if needed and alias is not None]
    gradients = iter(torch.autograd.grad(outputs, wanted, cotangents, create_graph=True, allow_unused=True))
    return [next(gradients) if needed else None for needed in needs]


def _differentiable(
    x: Tensor, h0: Tensor, c0: Tensor, flat: Sequence[Tensor | None], batch_sizes: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the layer in plain torch ops, with nothing in place."""
    w_ih, bias, w_hh, w_hr = _by_kind(flat)
    return reference.lstm_differentiable(F.linear(x, w_ih, bias), h0, c0, w_hh, w_hr, batch_sizes)


def _sum_of_outer(rows: Tensor, columns: Tensor) -> Tensor:
    """Return rows^T columns, [M, K] of [N, M] and [N, K]: the gradient of a weight."""
    # in this order MKL's float64 GEMM takes two thirds of the time; a gradient is contiguous, as stock's is
    return (columns.t() @ rows).t().contiguous()


def _by_kind(flat: Sequence[Any]) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Return the directions' weights together: w_ih [D*4H, I], b_ih + b_hh [D*4H], w_hh [D, 4H, P], w_hr [D, P, H]."""
    w_ih, w_hh, b_ih, b_hh, w_hr = (flat[kind::5] for kind in range(5))
    bias = None if b_ih[0] is None else _cat(b_ih) + _cat(b_hh)
    return _cat(w_ih), bias, _stack(w_hh), None if w_hr[0] is None else _stack(w_hr)


def _cat(tensors: Sequence[Any]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _stack(tensors: Sequence[Any]) -> Tensor:
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def _implementation(backend: str, c0: Tensor) -> ModuleType:
    """Return the module whose forward and backward run the recurrence on c0 [D, B, H]."""
    if backend == "auto":
        D, B, H = c0.shape
        # what is saved is the same whoever runs it, so forward and backward need not choose alike
        problem = Problem(1, B, H, H, D=D, dtype=c0.dtype, training=True)
        backend = dispatch.decide(problem, device_of(c0.device)).backend
    if backend != "triton":
        return reference
    from fastlstm.kernels import launch  # imports triton, which a CPU-only install need not have

    return launch


@torch.library.custom_op("fastlstm::lstm_forward", mutates_args=())
def lstm_forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    bias: Tensor | None,
    w_hh: Tensor,
    w_hr: Tensor | None,
    batch_sizes: Tensor | None,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run one layer: the input GEMM x [N, I] -> [N, D*4H], then `reference.lstm_forward` says what."""
    gates_x = F.linear(x, w_ih, bias)
    return _implementation(backend, c0).lstm_forward(gates_x, h0, c0, w_hh, w_hr, batch_sizes, save)


@lstm_forward.register_fake
def _(x, h0, c0, w_ih, bias, w_hh, w_hr, batch_sizes, save, backend):
    N = x.shape[0]
    D, B, P = h0.shape
    H = c0.shape[2]
    cells_dtype = reference.accumulation_dtype(x.dtype)
    return (
        x.new_empty(N, D * P),
        x.new_empty(D, B, P),
        x.new_empty(D, B, H),
        x.new_empty((N, D * 4 * H) if save else 0),
        x.new_empty((N, D * H) if save else 0, dtype=cells_dtype),
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the adjoint of the recurrence: `reference.lstm_backward` says what it takes and returns."""
    implementation = _implementation(backend, c0)
    return implementation.lstm_backward(d_output, dh_n, dc_n, gates, cells, c0, w_hh, w_hr, batch_sizes)


@lstm_backward.register_fake
def _(d_output, dh_n, dc_n, gates, cells, c0, w_hh, w_hr, batch_sizes, backend):
    dh = d_output.new_empty(0 if w_hr is None else d_output.shape)
    return gates.new_empty(gates.shape), c0.new_empty(c0.shape), dh
