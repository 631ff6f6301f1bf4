"""From tensors to launches: allocate the results, pick a plan, run the recurrence, add the projection around it.

`lstm_forward` and `lstm_backward` have the signatures of those in `fastlstm.reference`, and a plan. Triton is
imported when this module is, which nothing outside the kernels does before it is needed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from ..packing import first_rows, previous, spans
from ..plans import PERSISTENT_REGISTERS, Plan, choose
from ..problem import Device, Problem, allows_tf32, device_of, limit_processors
from ..weights import stack_tensors
from .backward_persistent import backward_persistent
from .backward_resident import backward_resident
from .backward_stepwise import backward_stepwise
from .forward_persistent import forward_persistent
from .forward_resident import forward_resident
from .forward_stepwise import forward_stepwise


def lstm_forward(
    gates_x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_hh: Tensor | Sequence[Tensor],
    w_hr: Tensor | Sequence[Tensor] | None,
    batch_sizes: Tensor | None,
    save: bool,
    plan: Plan | str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run one layer's recurrence, all directions in one call: `reference.lstm_forward` says what it takes and returns.

    Args beyond those:
        plan: layout of the kernels; None asks `plans.choose`, and a string is what it is told.

    Raises:
        RuntimeError: gates_x or w_hh do not have the sizes that c0 tells; the kernels would read past their end.
    """
    w_hh = stack_tensors(w_hh)
    if w_hr is None:
        return _forward(gates_x, h0, c0, w_hh, batch_sizes, save, plan=plan)
    # h = m W_hr^T, so the recurrence runs on m with W_eff = W_hh W_hr; h0 has no m and enters step 0's gates
    rows = torch.arange(gates_x.shape[0], device=gates_x.device)
    for d, gates_d in enumerate(gates_x.chunk(len(h0), 1)):
        gates_d[first_rows(rows, h0.shape[1], batch_sizes, reverse=d == 1)] += h0[d] @ w_hh[d].T
    m0, w_hr = torch.zeros_like(c0), stack_tensors(w_hr)
    m, m_n, c_n, gates, cells = _forward(gates_x, m0, c0, torch.bmm(w_hh, w_hr), batch_sizes, save, plan=plan)
    output = torch.einsum("ndh,dph->ndp", m.view(m.shape[0], *c0.shape[::2]), w_hr).flatten(1).contiguous()
    return output, torch.bmm(m_n, w_hr.mT), c_n, gates, cells


def lstm_backward(
    d_output: Tensor,
    dh_n: Tensor,
    dc_n: Tensor,
    gates: Tensor,
    cells: Tensor,
    c0: Tensor,
    w_hh: Tensor | Sequence[Tensor],
    w_hr: Tensor | Sequence[Tensor] | None,
    batch_sizes: Tensor | None,
    plan: Plan | str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one layer's recurrence back: `reference.lstm_backward` says what it takes and returns, `plan` is as above."""
    w_hh = stack_tensors(w_hh)
    if w_hr is None:
        dgates, dc0 = _backward(d_output, dh_n, dc_n, gates, cells, c0, w_hh, batch_sizes, plan=plan)
        return dgates, dc0, d_output.new_empty(0)
    w_hr = stack_tensors(w_hr)
    D, P, _ = w_hr.shape
    dm = torch.einsum("ndp,dph->ndh", d_output.reshape(-1, D, P), w_hr).flatten(1)
    w_eff = torch.bmm(w_hh, w_hr)
    dgates, dc0 = _backward(dm, torch.bmm(dh_n, w_hr), dc_n, gates, cells, c0, w_eff, batch_sizes, plan=plan)
    # h_t is used by the output, by the step after it (before it in time, for direction 1) and, at the end, by h_n
    dh = d_output.clone(memory_format=torch.contiguous_format)
    for d, (dh_d, dgates_d) in enumerate(zip(dh.chunk(D, 1), dgates.chunk(D, 1), strict=True)):
        dh_d += previous(dgates_d @ w_hh[d], dh_n[d], batch_sizes, reverse=d == 0)
    return dgates, dc0, dh


class _RefusedError(Exception):
    """The chip cannot hold the programs of a grid all at once; the argument says how many it may."""


def laid_out_anew(run: Callable) -> Callable:
    """Decorate a pass: where the driver refuses its grid, the layout is chosen again, for fewer processors.

    A persistent layout gives way to a smaller one or, in the end, to stepwise. One that was asked for is an error. The
    layout is the last argument of the pass, and `plan` when it is called.
    """

    @functools.wraps(run)
    def again(*arguments: Any, plan: Plan | str | None = None) -> Any:
        device = arguments[0].device
        while True:
            try:
                return run(*arguments, plan)
            except _RefusedError as refused:
                (most,) = refused.args
                if isinstance(plan, Plan) or most >= device_of(device).processors:
                    raise RuntimeError(f"A grid was refused: {refused.__cause__}") from refused.__cause__
                limit_processors(device, most)

    return again


def together(kernel: Any, grid: tuple[int, int], **arguments: Any) -> None:
    """Launch a grid whose programs meet."""
    try:
        kernel[grid](**arguments)
    except (RuntimeError, triton.OutOfResources) as error:
        # the words of CUDA's and HIP's error 720; a share of a card, or an old one, may refuse any such launch
        too_many, never = "too many blocks in cooperative launch", "operation not supported"
        refused = isinstance(error, triton.OutOfResources) or too_many in str(error) or never in str(error)
        if arguments["first"] or not refused:  # after the first grid, the pass cannot be run again
            raise
        raise _RefusedError(math.prod(grid) - 1 if too_many in str(error) else 0) from error


def forward_pass(gates_x, h0, c0, w_hh, batch_sizes, save, plan, above=None):
    """Run `lstm_forward` without projection; with `above`, (bias, w_ih), it is `wavefront.stack_forward`."""
    D, B, H = c0.shape
    parts = D if above is None else 1  # of gates_x
    N, dtype = gates_x.shape[0], gates_x.dtype
    T = steps(N, B, batch_sizes)
    if gates_x.shape[1] != parts * 4 * H or w_hh.shape != (D, 4 * H, H):  # a kernel would read past the end of them
        raise RuntimeError(f"Expected weight_hh of size {(4 * H, H)} in a layer of hidden_size={H}")
    gates_x, h0, c0, w_hh = (tensor.contiguous() for tensor in (gates_x, h0, c0, w_hh))
    output = gates_x.new_empty(N, D * H)
    # each element is read and written by one program, which cannot know what to write before it has read
    gates = gates_x if save and parts == D else gates_x.new_empty((N, D * 4 * H) if save else 0)
    cells = gates_x.new_empty((N, D * H) if save else 0, dtype=torch.float32)
    if N == 0:
        return output, h0.clone(), c0.clone(), gates, cells

    plan, PRECISION = settle(plan, c0, dtype, backward=False)
    shared = {
        "gates_x_ptr": gates_x,
        "w_hh_ptr": w_hh,
        "output_ptr": output,
        "gates_ptr": gates,
        "cells_ptr": cells,
        "SAVE": save,
        **common_arguments(plan, PRECISION, T, c0, batch_sizes, backward=False),
    }
    with device_guard(c0.device):
        if plan.regime == "resident":
            h_n, c_n = torch.empty_like(h0), torch.empty_like(c0)
            grid = (triton.cdiv(B, plan.BLOCK_B), D)
            forward_resident[grid](**shared, h0_ptr=h0, c0_ptr=c0, h_n_ptr=h_n, c_n_ptr=c_n)
        elif plan.kernel == "persistent":
            h_n, c_n = torch.empty_like(h0), torch.empty_like(c0)
            width, slots = width_of(plan, H), 2 if above is None else T + 1
            # zeros: units past H meet zeros of W_hh, but a NaN among them would be one after the product too
            shared["exchange_ptr"] = gates_x.new_zeros(slots, at_once(plan, B, D), plan.BLOCK_B, width)
            shared["w_hh_ptr"] = padded(plan, w_hh, above and above[1], width)
            shared["bias_ptr"] = above and above[0].contiguous()
            for grid, meeting in meetings(plan, c0):
                together(forward_persistent, grid, **shared, **meeting, h0_ptr=h0, c0_ptr=c0, h_n_ptr=h_n, c_n_ptr=c_n)
        else:
            # a program reads all of h and writes its own units, so h takes turns between two buffers
            h_in, h_n = h0, torch.empty_like(h0)
            spare = torch.empty_like(h0)
            c = c0.to(torch.float32, copy=True)
            grid = (triton.cdiv(H, plan.BLOCK_H), triton.cdiv(B, plan.BLOCK_B), D)
            for s in range(T):
                forward_stepwise[grid](**shared, h_in_ptr=h_in, h_out_ptr=h_n, c_ptr=c, s=s)
                h_in, h_n, spare = h_n, spare, h_n
            h_n, c_n = h_in, c.to(dtype)
    return output, h_n, c_n, gates, cells


def backward_pass(d_output, dh_n, dc_n, gates, cells, c0, w_hh, batch_sizes, plan, w_ih=None):
    """Run `lstm_backward` without projection; with `w_ih`, it is `wavefront.stack_backward`."""
    D, B, H = c0.shape
    N, dtype = gates.shape[0], gates.dtype
    T = steps(N, B, batch_sizes)
    tensors = (d_output, dh_n, dc_n, gates, cells, c0, w_hh)  # a hook on saved tensors may have laid them out anew
    d_output, dh_n, dc_n, gates, cells, c0, w_hh = (tensor.contiguous() for tensor in tensors)
    dgates = torch.empty_like(gates)
    if N == 0:
        return dgates, dc_n.clone()

    plan, PRECISION = settle(plan, c0, dtype, backward=True)
    shared = {
        "d_output_ptr": d_output,
        "dh_n_ptr": dh_n,
        "gates_ptr": gates,
        "cells_ptr": cells,
        "c0_ptr": c0,
        "w_hh_ptr": w_hh,
        "dgates_ptr": dgates,
        **common_arguments(plan, PRECISION, T, c0, batch_sizes, backward=True),
    }
    with device_guard(c0.device):
        if plan.regime == "resident":
            dc0 = torch.empty_like(c0)
            backward_resident[(triton.cdiv(B, plan.BLOCK_B), D)](**shared, dc_n_ptr=dc_n, dc0_ptr=dc0)
        elif plan.kernel == "persistent":
            dc0 = torch.empty_like(c0)
            programs = -(-H // plan.BLOCK_H)
            units = programs * plan.BLOCK_H
            width = width_of(plan, H if w_ih is None else 2 * units)
            if w_ih is None:
                weights = padded(plan, w_hh, None, width)
            else:
                weights = pad(padded(plan, w_hh, w_ih, units), (0, width - 2 * units))
                shared["d_output_ptr"] = d_output.clone()  # the kernel fills in the dy of the layers below the last
            # in the dtype of gates: half the traffic, and the rounding of dgates itself weighs more (see README.md)
            tiles = (width // plan.BLOCK_H, programs, plan.BLOCK_B, plan.BLOCK_H)
            shared |= {"w_hh_ptr": weights, "partials_ptr": gates.new_empty(2, at_once(plan, B, D), *tiles)}
            for grid, meeting in meetings(plan, c0):
                together(backward_persistent, grid, **shared, **meeting, dc_n_ptr=dc_n, dc0_ptr=dc0)
        else:
            dc = dc_n.to(torch.float32, copy=True)
            grid = (triton.cdiv(H, plan.BLOCK_H), triton.cdiv(B, plan.BLOCK_B), D)
            for s in range(T):
                backward_stepwise[grid](**shared, dc_ptr=dc, s=s)
            dc0 = dc.to(dtype)
    return dgates, dc0


_forward, _backward = laid_out_anew(forward_pass), laid_out_anew(backward_pass)


def settle(
    plan: Plan | str | None, c0: Tensor, dtype: torch.dtype, backward: bool, stack: bool = False
) -> tuple[Plan, str]:
    """Return the plan of a pass over the D directions, or layers of a `stack`, of c0 [D, B, H]; and its precision."""
    D, B, H = c0.shape
    device = device_of(c0.device)
    PRECISION = precision(dtype, device)
    if not isinstance(plan, Plan):
        layers, directions = (D, 1) if stack else (1, D)
        problem = Problem(1, B, H, H, L=layers, D=directions, dtype=dtype, tf32=PRECISION == "tf32")
        plan = choose(problem, device, backward, plan or "")
    return plan, PRECISION


def common_arguments(
    plan: Plan, PRECISION: str, T: int, c0: Tensor, batch_sizes: Tensor | None, backward: bool
) -> dict[str, Any]:
    """Return the arguments that every kernel takes."""
    _, B, H = c0.shape
    lengths, offsets = (None, None) if batch_sizes is None else spans(batch_sizes, B, c0.device)
    return {
        "lengths_ptr": lengths,
        "offsets_ptr": offsets,
        "T": T,
        "B": B,
        "H": H,
        "PRECISION": PRECISION,
        "VARLEN": batch_sizes is not None,
        **_layout(plan, backward, device_of(c0.device)),
    }


def precision(dtype: torch.dtype, device: Device) -> str:
    """Return `input_precision` of the dots."""
    return "tf32" if dtype == torch.float32 and device.kind == "cuda" and allows_tf32() else "ieee"


@functools.lru_cache(maxsize=4096)
def _layout(plan: Plan, backward: bool, device: Device) -> dict[str, int | bool]:
    """Return a plan's keyword arguments to a launch."""
    names = {"BLOCK_H", "BLOCK_B", "num_warps", "num_stages"}
    if plan.regime != "resident":
        names |= {"BLOCK_K"}
    if plan.kernel == "persistent":
        names |= {"TAIL_K", "KEPT"} if backward else {"TAIL_K", "KEPT", "AHEAD", "SPLIT"}
    layout: dict[str, int | bool] = {name: getattr(plan, name) for name in names}
    if plan.kernel == "persistent":
        layout["STREAM"] = plan.regime == "streaming"
        layout["STACK"] = plan.regime == "wavefront"
        layout["HIP"] = device.kind == "hip"
        if device.kind == "cuda" and plan.regime in ("persistent", "wavefront"):
            layout["maxnreg"] = PERSISTENT_REGISTERS
        layout["launch_cooperative_grid"] = True  # programs that cannot all be on the chip are an error, not a hang
        if backward:
            layout["THREADS"] = plan.num_warps * (64 if layout["HIP"] else 32)
    return layout


def at_once(plan: Plan, B: int, D: int) -> int:
    """Return how many groups of programs that meet run in one launch: of each tile of rows and direction, one."""
    groups = -(-B // plan.BLOCK_B) * D
    return min(groups, plan.groups or groups)


def meetings(plan: Plan, c0: Tensor) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
    """Yield (grid, arguments) of each launch of a persistent kernel: all groups, as many at once as the plan says."""
    D, B, H = c0.shape
    groups, most = -(-B // plan.BLOCK_B) * D, at_once(plan, B, D)
    # a cache line for each counter: they are polled
    counters = torch.zeros(groups, 32, dtype=torch.int32, device=c0.device)
    for first in range(0, groups, most):
        grid = (-(-H // plan.BLOCK_H), min(most, groups - first))
        yield grid, {"counters_ptr": counters[first:], "D": D, "first": first}


def width_of(plan: Plan, columns: int) -> int:
    """Return how many columns the chunks of a persistent plan cover: `columns` rounded up."""
    kept = plan.KEPT * plan.BLOCK_K
    return kept + -(-(columns - kept) // plan.TAIL_K) * plan.TAIL_K


def padded(plan: Plan, w_hh: Tensor, w_ih: Tensor | None, width: int) -> Tensor:
    """Return W_hh [D, 4, UNITS, width] with zeros up to whole programs: no mask, and aligned rows, in a kernel.

    Beside it, in a stack, stands W_ih of the layers above the first, zeros for that: [D, 4, UNITS, 2 * width].
    """
    D, _, H = w_hh.shape
    columns, units = width - H, -H % plan.BLOCK_H
    if w_ih is not None:
        weights = (w_hh, pad(w_ih, (0, 0, 0, 0, 1, 0)))
        return torch.cat([pad(weight.view(D, 4, H, H), (0, columns, 0, units)) for weight in weights], 3)
    return pad(w_hh.view(D, 4, H, H), (0, columns, 0, units)) if columns or units else w_hh


def steps(N: int, B: int, batch_sizes: Tensor | None) -> int:
    """Return T."""
    if batch_sizes is not None:
        return batch_sizes.numel()
    return N // B if B else 0


def device_guard(device: torch.device) -> AbstractContextManager:
    """Make `device` the current one: Triton launches on the current device, not on its arguments'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
