"""The custom ops: what torch.compile, torch.export and every other tracer see of a layer.

A layer, both its directions, is one opaque op, `fastlstm::lstm_forward`: the input GEMM over the whole sequence, then
the recurrence (or both in one). `fastlstm::lstm_backward` is the recurrence's adjoint, and `fastlstm::lstm_gates` makes
again what forward did not save. `autograd.py` has the formulas that tie them together.

Where nobody looks on, `run_forward` and `run_backward` are called as they are: around a function of torch's own tensors
an op costs the host a tenth of a millisecond and more, with which a short sequence is done on a GPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlstm import checks, cpu_rules, dispatch, gemms, packing, reference
from fastlstm.problem import Problem, device_of
from fastlstm.weights import biases, by_kind, by_layer, join, spread, stack_tensors

_WIDE_ELEMENTS = 1 << 22  # of float32 pre-activations that `lstm_gates` holds at once


def run_forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    save: bool,
    recompute: bool,
    backend: str,
    stack: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run one layer: the input GEMM x [N, I] or [T, B, I] -> [N, D*4H], then `reference.lstm_forward` says what.

    Where nothing is saved and that is faster, both in one: `reference.lstm_infer`.

    weights are those of each direction in torch's flat order, none of them missing or None. Of what is saved, the
    gates are left out (of size 0) if `recompute`. D counts the layers of a `stack`, and N*D*P their outputs.
    """
    if batch_sizes is not None:
        checks.check_rows(batch_sizes, len(x), h0.shape[1])
    flat = spread(weights, len(h0))
    if stack:
        w_ih, above, w_hh = by_layer(flat)
        bias, bias_above = biases(flat[:5]), biases(flat[5:])
        bias_above = above.new_zeros(above.shape[:2]) if bias_above is None else bias_above.view(above.shape[:2])
        run = _recurrence("stack_forward", backend, c0)
        gates_x = gemms.linear(as_rows(x), w_ih, bias)
        results = run(gates_x, bias_above, h0, c0, above, stack_tensors(w_hh), batch_sizes, save)
    else:
        (w_ih, w_hh, w_hr), bias = by_kind(flat), biases(flat)
        (N, I), (_, B, P) = as_rows(x).shape, h0.shape  # noqa: E741
        sizes = N, B, I, c0.shape[2], P
        pays = x.is_cpu and cpu_rules.one_product_pays(device_of(x).target, *sizes, x.dtype)
        kernels = _resolve(backend, c0.device, c0.dtype, B).startswith("triton")
        if pays and not (save or recompute or kernels):
            results = reference.lstm_infer(as_rows(x), h0, c0, w_ih, bias, w_hh, w_hr or None, batch_sizes)
        else:
            run = _recurrence("lstm_forward", backend, c0)
            results = run(gemms.linear(as_rows(x), join(w_ih), bias), h0, c0, w_hh, w_hr or None, batch_sizes, save)
    output, h_n, c_n, gates, cells = results
    return shaped_as(output, x), h_n, c_n, gates.new_empty(0) if recompute else gates, cells


lstm_forward = torch.library.custom_op("fastlstm::lstm_forward", run_forward, mutates_args=())


@lstm_forward.register_fake
def _(x, h0, c0, weights, batch_sizes, save, recompute, backend, stack):
    N = math.prod(x.shape[:-1])
    D, B, P = h0.shape
    H = c0.shape[2]
    cells_dtype = reference.accumulation_dtype(x.dtype)
    return (
        x.new_empty(*x.shape[:-1], D * P),
        x.new_empty(D, B, P),
        x.new_empty(D, B, H),
        x.new_empty((N, D * 4 * H) if save and not recompute else 0),
        x.new_empty((N, D * H) if save else 0, dtype=cells_dtype),
    )


def run_backward(
    d_output: Tensor,
    dh_n: Tensor,
    dc_n: Tensor,
    gates: Tensor,
    cells: Tensor,
    c0: Tensor,
    w_hh: Sequence[Tensor],
    w_hr: Sequence[Tensor],
    batch_sizes: Tensor | None,
    backend: str,
    above: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the adjoint of the recurrence: `reference.lstm_backward` says what it takes and returns.

    Of a stack, `above` is w_ih [L - 1, 4H, H] of the layers above the first.
    """
    if above is not None:
        run = _recurrence("stack_backward", backend, c0)
        dgates, dc0 = run(d_output, dh_n, dc_n, gates, cells, c0, above, stack_tensors(w_hh), batch_sizes)
        return dgates, dc0, d_output.new_empty(0)
    run = _recurrence("lstm_backward", backend, c0)
    return run(d_output, dh_n, dc_n, gates, cells, c0, w_hh, w_hr or None, batch_sizes)


lstm_backward = torch.library.custom_op("fastlstm::lstm_backward", run_backward, mutates_args=())


@lstm_backward.register_fake
def _(d_output, dh_n, dc_n, gates, cells, c0, w_hh, w_hr, batch_sizes, backend, above=None):
    dh = d_output.new_empty(d_output.shape if w_hr else 0)
    return gates.new_empty(gates.shape), c0.new_empty(c0.shape), dh


@torch.library.custom_op("fastlstm::lstm_gates", mutates_args=())
def lstm_gates(x: Tensor, h0: Tensor, output: Tensor, weights: Sequence[Tensor], batch_sizes: Tensor | None) -> Tensor:
    """Return the activated gates [N, D*4H] of a layer that has run, from its output [N, D*P] or [T, B, D*P].

    The layer is one in 16 bit and without projection. Every step's h_{t-1} is known, so there is no recurrence: two
    GEMMs over all rows. Sums are float32 as in the kernels, so that no gate is more than a unit in the last place off.
    """
    D = len(h0)
    flat = spread(weights, D)
    w_ih, w_hh, _ = by_kind(flat)
    gates, output = gemms.linear(as_rows(x), join(w_ih), biases(flat)), as_rows(output)
    most = max(1, _WIDE_ELEMENTS // len(w_hh[0]))  # rows at a time, since wide ones would take what was saved
    for d, (gates_d, output_d) in enumerate(zip(gates.chunk(D, 1), output.chunk(D, 1), strict=True)):
        h_previous = packing.previous(output_d, h0[d], batch_sizes, reverse=d == 1)
        for rows, h in zip(gates_d.split(most), h_previous.split(most), strict=True):
            if h.is_cuda:
                sums = torch.mm(h, w_hh[d].t(), out_dtype=torch.float32)
            else:
                sums = torch.mm(h.float(), w_hh[d].t().float())
            i, f, g, o = sums.add_(rows).chunk(4, 1)
            for gate in (i, f, o):
                gate.sigmoid_()
            g.tanh_()
            rows.copy_(sums)
    return gates


@lstm_gates.register_fake
def _(x, h0, output, weights, batch_sizes):
    return x.new_empty(math.prod(x.shape[:-1]), len(h0) * weights[0].shape[0])


def gemms_suffice(backend: str, device: torch.device, dtype: torch.dtype, projected: bool) -> bool:
    """Whether `lstm_gates` makes the very gates of forward again, but for a unit in the last place.

    It knows h as the 16-bit output, and so do the kernels; the reference goes on with it in float32. With a projection
    they know no h, and float32 shows the order of a sum.
    """
    if projected or dtype not in (torch.float16, torch.bfloat16):
        return False
    return _resolve(backend, device, dtype).startswith("triton")


# as `cpu_rules.onednn_has`; it may ask the driver of a GPU
gemms_suffice._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@torch.library.custom_op("fastlstm::first_step", mutates_args=())
def first_step(batch_sizes: Tensor) -> Tensor:
    """Return zeros [B] for the B of a packed batch: a tracer knows no values, and takes a size for one."""
    return batch_sizes.new_zeros(int(batch_sizes[0]))


@first_step.register_fake
def _(batch_sizes):
    return batch_sizes.new_empty(torch.library.get_ctx().new_dynamic_size())


@torch.library.custom_op("fastlstm::zero_states", mutates_args=())
def zero_states(data: Tensor, rows: int, B: int, H: int) -> Tensor:
    """Return zeros [rows, B, H] like `data`; of `new_zeros` inductor would make a kernel and compile it."""
    return data.new_zeros(rows, B, H)


@zero_states.register_fake
def _(data, rows, B, H):
    return data.new_empty(rows, B, H)


def as_rows(tensor: Tensor) -> Tensor:
    """Return [N, K] of [N, K] or [T, B, K]; unlike `flatten`, under the older of torch's vmaps too."""
    return tensor if tensor.dim() == 2 else tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def shaped_as(output: Tensor, x: Tensor) -> Tensor:
    """Return the output rows [N, K] in the form of x, [N, I] or [T, B, I], and no view: nobody has what it is of."""
    return output if x.dim() == 2 else torch.ops.aten._unsafe_view(output, (*x.shape[:-1], output.shape[1]))


def _resolve(backend: str, device: torch.device, dtype: torch.dtype, B: int = 1) -> str:
    """Return who runs a layer of B rows, where "auto" may have been asked for."""
    if backend != "auto":
        return backend
    # what is saved is the same whoever runs it, so forward and backward need not choose alike
    return dispatch.decide_layer(Problem(1, B, 1, 1, dtype=dtype, training=True), device_of(device))


def _recurrence(name: str, backend: str, c0: Tensor) -> Callable[..., Any]:
    """Return the function that runs a recurrence on c0 [D, B, H]: "lstm_forward", "stack_backward", ..."""
    backend, _, layout = _resolve(backend, c0.device, c0.dtype, c0.shape[1]).partition(" ")
    if backend != "triton":
        return getattr(reference, name)
    dispatch.check_triton(c0.dtype, c0.shape[2], c0.device.type)  # a compiled call has asked nobody
    from fastlstm.kernels import launch, wavefront  # import triton, which a CPU-only install need not have

    kernels = wavefront if name.startswith("stack") else launch
    return functools.partial(getattr(kernels, name), plan=layout or None)
