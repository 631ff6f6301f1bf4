"""One LSTM layer with gradients: the formulas that tie the ops of `ops.py` together.

The recurrence's adjoint is an op; the GEMMs that turn its dgates into the gradients of the input, the weights, the
biases and h0 are plain torch, one over all rows for each gradient that is asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from fastlstm import autocast, gemms, packing, reference, tracing
from fastlstm.ops import as_rows, gemms_suffice, lstm_backward, lstm_forward, lstm_gates, run_backward, run_forward
from fastlstm.weights import biases, by_kind, by_layer, join, spread, stack_tensors


def lstm_layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    backend: str,
    recompute: bool = False,
    stack: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the D directions of one layer over rows (`reference.py` says how rows are laid out).

    Args:
        x: [N, I], or dense rows as [T, B, I].
        h0: [D, B, P] (P is H without projection).
        c0: [D, B, H].
        weights: of each direction w_ih, w_hh and, where there are, b_ih, b_hh and w_hr: torch's flat order.
        batch_sizes: [T] int64 on the CPU for packed rows, or None for dense ones.
        backend: "reference", "triton" (and, after a space, the name of a layout), or "auto" for the better of the two
            where and when the layer runs.
        recompute: whether backward makes the activated gates again instead of finding them saved: by GEMMs over all
            rows where those give them to within a unit in the last place (`gemms_suffice`), or else, with the cells,
            by this very pass, which costs about half of what the recurrences of a training step do, a GEMM next to
            nothing.
        stack: whether D counts layers of one direction, each fed by the one before, which "triton" runs all at once;
            without projection and `recompute`.

    Returns:
        output [N, D*P] (or [T, B, D*P]; of a stack that of its last layer, [..., H]; never a view), h_n [D, B, P],
        c_n [D, B, H].
    """
    if tracing.transformed():
        output, h_n, c_n = _differentiable(x, h0, c0, spread(weights, len(h0)), batch_sizes, stack)
    else:
        needed = torch.is_grad_enabled() and any(t.requires_grad for t in (x, h0, c0, *weights))
        recompute = recompute and needed
        # an exported program is for inference first: trained after all, backward makes again what was not saved
        save = needed and not torch.compiler.is_exporting()
        if recompute and not gemms_suffice(backend, x.device, x.dtype, h0.shape != c0.shape):
            save = False
        how = (batch_sizes, save, recompute, backend, stack)
        if tracing.watched(x, h0, c0, *weights):
            output, h_n, c_n, _, _ = lstm_forward(x, h0, c0, weights, *how)
        elif needed:
            output, h_n, c_n, _, _ = LSTMFunction.apply(x, h0, c0, *how, *weights)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                output, h_n, c_n, _, _ = run_forward(x, h0, c0, weights, *how)
    return output[..., -h0.shape[2] :].contiguous() if stack else output, h_n, c_n


def differentiable_backward(
    cotangents: tuple[Tensor, ...],
    inputs: tuple[Any, ...],
    needs: tuple[bool, ...],
    batch_sizes: Tensor | None,
    stack: bool = False,
) -> list[Tensor | None]:
    """Differentiate the differentiable form, so that the gradients can be differentiated again where that is asked."""
    again = torch.is_grad_enabled()
    with autocast.off(inputs[0].device), torch.enable_grad():
        # aliases: a path from one input to another outside this layer must not be counted
        aliases: list[Any] = [None if t is None else t.view_as(t) for t in inputs]
        x, h0, c0, *flat = aliases
        outputs = _differentiable(x, h0, c0, flat, batch_sizes, stack)
    wanted = [alias for alias, needed in zip(aliases, needs, strict=True) if needed and alias is not None]
    gradients = iter(torch.autograd.grad(outputs, wanted, cotangents, create_graph=again, allow_unused=True))
    return [next(gradients) if needed else None for needed in needs]


def _differentiable(
    x: Tensor, h0: Tensor, c0: Tensor, flat: Sequence[Tensor | None], batch_sizes: Tensor | None, stack: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the layer in plain torch ops, with nothing in place."""
    if stack:
        layers = []
        for n in range(len(h0)):
            layers.append(_differentiable(x, h0[n : n + 1], c0[n : n + 1], flat[5 * n : 5 * n + 5], batch_sizes))
            x = layers[-1][0]
        outputs, *states = zip(*layers, strict=True)
        return torch.cat(outputs, -1), torch.cat(states[0]), torch.cat(states[1])
    w_ih, w_hh, w_hr = by_kind(flat)
    gates_x = F.linear(as_rows(x), join(w_ih), biases(flat))
    output, h_n, c_n = reference.lstm_differentiable(gates_x, h0, c0, w_hh, w_hr or None, batch_sizes)
    return output.view(*x.shape[:-1], output.shape[1]), h_n, c_n


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    """Save for backward.

    Beyond the inputs and the output that the caller holds anyway (of a stack, its last layer's), a row and direction
    cost 4H activated gates in the input's dtype and H cells in float32: 20H bytes in float32, 12H in float16 and
    bfloat16 (40H in float64, whose cells are float64). With `recompute` the gates are not kept: 4H bytes, or nothing
    where `save` is false.
    """
    x, h0, c0, weights, batch_sizes, save, recompute, backend, stack = inputs
    output_rows, _, _, gates, cells = output
    ctx.mark_non_differentiable(gates, cells)
    ctx.set_materialize_grads(False)  # no zeros in the size of the gates
    ctx.save_for_backward(x, h0, c0, batch_sizes, output_rows, gates, cells, *weights)
    ctx.save, ctx.recompute, ctx.backend, ctx.stack = save, recompute, backend, stack


def _backward(ctx: Any, *cotangents: Tensor | None) -> tuple:
    """Return the gradient of each input of the op that needs one."""
    needs_x, needs_h0, needs_c0, needs_weights, *_ = ctx.needs_input_grad
    dx, dh0, dc0, *dweights = _differentiate(ctx, cotangents, (needs_x, needs_h0, needs_c0), needs_weights)
    return dx, dh0, dc0, dweights, None, None, None, None, None


lstm_forward.register_autograd(_backward, setup_context=_save_for_backward)


class LSTMFunction(torch.autograd.Function):
    """What `lstm_forward` and its formula are, without the op.

    torch.func never sees it, so it needs no `setup_context`, for which torch would read its signature in every call.
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Run a layer; `given` are the arguments of the op with the weights, which autograd must see, at the end."""
        arguments: tuple[Any, ...] = (*given[:3], given[8:], *given[3:8])
        results = run_forward(*arguments)
        _save_for_backward(ctx, arguments, results)
        return results

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *cotangents: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Return the gradient of each input that needs one."""
        needs = ctx.needs_input_grad
        dx, dh0, dc0, *dweights = _differentiate(ctx, cotangents, needs[:3], needs[8:])
        return dx, dh0, dc0, None, None, None, None, None, *dweights


def _differentiate(
    ctx: Any, cotangents: Sequence[Tensor | None], needs: tuple[bool, ...], needs_weights: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of x, h0, c0 and each weight, None where there is no need of one."""
    x, h0, c0, batch_sizes, output, gates, cells, *weights = ctx.saved_tensors
    d_output, dh_n, dc_n, *_ = cotangents
    if dh_n is None and dc_n is None and h0.shape == c0.shape:  # most often so: a tensor less to fill is a launch less
        dh_n = dc_n = torch.zeros_like(c0)
    given = zip((d_output, dh_n, dc_n), (output, h0, c0), strict=True)
    of_results = tuple(torch.zeros_like(like) if tensor is None else tensor for tensor, like in given)
    flat = spread(weights, len(h0))
    needs = (*needs, *(bool(need) for need in spread(needs_weights, len(h0))))
    arguments = (of_results, (x, h0, c0, *flat), needs)
    # the adjoint that is written by hand has no conjugates
    if torch.is_grad_enabled() or tracing.need_plain_ops(cotangents) or x.is_complex():
        gradients = differentiable_backward(*arguments, batch_sizes, ctx.stack)
    else:
        with autocast.off(x.device):
            if not ctx.save:
                again = (batch_sizes, True, False, ctx.backend, ctx.stack)
                run = lstm_forward if tracing.watched(x, h0, c0, *weights) else run_forward
                gates, cells = run(x, h0, c0, weights, *again)[3:]
            elif ctx.recompute:
                gates = lstm_gates(x, h0, output, weights, batch_sizes)
            gradients = _gradients(*arguments, (output, gates, cells), batch_sizes, ctx.backend, ctx.stack)
    there = [weight is not None for weight in flat]
    return [*gradients[:3], *itertools.compress(gradients[3:], there)]


def _gradients(
    cotangents: tuple[Tensor, ...],
    inputs: tuple[Any, ...],
    needs: tuple[bool, ...],
    saved: tuple[Tensor, Tensor, Tensor],
    batch_sizes: Tensor | None,
    backend: str,
    stack: bool,
) -> list[Tensor | None]:
    """Run the recurrence's adjoint, then one GEMM over all rows for each gradient that is needed."""
    x, h0, c0, *flat = inputs
    output, gates, cells = saved
    d_output, dh_n, dc_n = cotangents
    shape, (x, output, d_output) = x.shape, map(as_rows, (x, output, d_output))
    needs_x, needs_h0, needs_c0, *needs_flat = needs
    D, B, _ = h0.shape
    H = c0.shape[2]
    w_ih, w_hh, w_hr = by_kind(flat)
    above = by_layer(flat)[1] if stack else None
    run = lstm_backward if tracing.watched(*cotangents, gates, cells, c0, *w_hh) else run_backward
    dgates, dc0, dh = run(d_output, dh_n, dc_n, gates, cells, c0, w_hh, w_hr, batch_sizes, backend, above)

    dh0: list[Tensor] = []
    dflat: list[Tensor | None] = []
    for d, (dgates_d, output_d) in enumerate(zip(dgates.chunk(D, 1), output.chunk(D, 1), strict=True)):
        needs_w_ih, needs_w_hh, needs_b_ih, needs_b_hh, needs_w_hr = needs_flat[5 * d : 5 * d + 5]
        reverse = d == 1 and not stack
        input = output[:, (d - 1) * H : d * H] if stack and d else x
        dw_ih = dw_hh = db = dw_hr = None
        if needs_h0:
            dh0.append(gemms.times_weights(packing.first_rows(dgates_d, B, batch_sizes, reverse), [w_hh[d]]))
        if needs_w_ih:
            dw_ih = gemms.sum_of_outer(dgates_d, input)
        if needs_w_hh:
            dw_hh = gemms.sum_of_outer(dgates_d, packing.previous(output_d, h0[d], batch_sizes, reverse))
        if needs_b_ih or needs_b_hh:
            db = dgates_d.sum(0)
        if needs_w_hr:
            o = gates[:, (4 * d + 3) * H : (4 * d + 4) * H]
            m = cells[:, d * H : (d + 1) * H].tanh().to(o.dtype).mul_(o)
            dw_hr = gemms.sum_of_outer(dh.chunk(D, 1)[d], m)
        # each its own, as stock's are: who scales one in place does not scale the other
        db_hh = db.clone() if db is not None and needs_b_ih and needs_b_hh else db
        dflat += [dw_ih, dw_hh, db if needs_b_ih else None, db_hh if needs_b_hh else None, dw_hr]
    # last, for it may be the largest, and the products above need room of their own while they are made
    of_x = (dgates.chunk(D, 1)[0], w_ih[:1]) if stack else (dgates, w_ih)
    dx = gemms.times_weights(*of_x).view(shape) if needs_x else None
    return [dx, stack_tensors(dh0) if needs_h0 else None, dc0 if needs_c0 else None, *dflat]
