r"""The recurrence in plain torch: the specification that every kernel answers to.

One call handles the D directions of one layer, after the input GEMM. With gates i, f, g, o in torch's order:

    a_t = gates_x_t + h_{t-1} W_hh^T                     [B, 4H]
    i, f, o = sigmoid(a_i, a_f, a_o);  g = tanh(a_g)
    c_t = f c_{t-1} + i g;   m_t = o tanh(c_t)           [B, H]
    h_t = m_t W_hr^T  (m_t without projection)           [B, P]

`lstm_forward` saves what `lstm_backward` needs, `lstm_backward` is written by hand, and `lstm_differentiable` is the
same forward with nothing in place, for autograd to differentiate as often as it likes. `kernels/README.md` derives
the backward.

Data come as rows: row `t*B + b` of a dense batch, row `offsets[t] + b` of a packed one, whose rows are sorted by
falling length, so that the first `batch_sizes[t]` rows are active at step t and the others keep their state.
Direction 1 runs time backwards. Elementwise work and state are float32 for the 16-bit dtypes.

This is also the fast route on a CPU where stock torch steps through Python-sized pieces of autograd graph (float64,
float16, projection): one loop, no graph. It is the wrong tool for dense float32, which oneDNN runs faster.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the cell state and of elementwise work: float32 for float16 and bfloat16."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def lstm_forward(
    gates_x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None,
    batch_sizes: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the recurrence over all steps.

    Args:
        gates_x: [N, D*4H], x W_ih^T + b_ih + b_hh; N rows as the module docstring lays out. Overwritten: the
            activated gates take its place, so that a layer in training holds one such buffer and not two.
        h0: [D, B, P] (P is H without projection).
        c0: [D, B, H].
        w_hh: [D, 4H, P].
        w_hr: [D, P, H], or None without projection.
        batch_sizes: [T] int64 on the CPU for packed rows, or None for dense ones.
        save: whether to return what `lstm_backward` needs.

    Returns:
        output [N, D*P], h_n [D, B, P], c_n [D, B, H] in the dtype of `gates_x`; activated gates [N, D*4H] in the
        same dtype and cells c_t [N, D*H] in the accumulation dtype (both of size 0 unless `save`).
    """
    D, B, P = h0.shape
    H = c0.shape[2]
    N = len(gates_x)
    dtype = accumulation_dtype(gates_x.dtype)
    sizes = _sizes(gates_x, B, batch_sizes)
    gates = gates_x.to(dtype)

    output = h0.new_empty(N, D * P)
    cells = gates.new_empty((N, D * H) if save else 0)
    h_n, c_n = (state.to(dtype, copy=True, memory_format=torch.contiguous_format) for state in (h0, c0))
    m_buffer = gates.new_empty(B, H)

    for d in range(D):
        w_hh_t = w_hh[d].to(dtype).t()
        w_hr_t = None if w_hr is None else w_hr[d].to(dtype).t()
        gates_steps = _steps(gates, d, 4 * H, sizes)
        output_steps = _steps(output, d, P, sizes)
        cells_steps = _steps(cells, d, H, sizes) if save else ()
        h, c, m = h_n[d], c_n[d], m_buffer
        for t in _order(len(sizes), d):
            n = sizes[t]
            if n != len(h):
                h, c, m = h_n[d, :n], c_n[d, :n], m_buffer[:n]

            i_f, g, o = gates_steps[t].addmm_(h, w_hh_t).split((2 * H, H, H), 1)
            i, f = i_f.sigmoid_().chunk(2, 1)
            c.mul_(f).addcmul_(i, g.tanh_())
            torch.tanh(c, out=m)

            if w_hr_t is None:
                torch.mul(o.sigmoid_(), m, out=h)
            else:
                torch.mm(m.mul_(o.sigmoid_()), w_hr_t, out=h)
            output_steps[t].copy_(h)
            if save:
                cells_steps[t].copy_(c)
    gates = gates_x.copy_(gates) if save else gates_x.new_empty(0)  # a copy onto itself costs nothing
    return output, h_n.to(h0.dtype), c_n.to(h0.dtype), gates, cells


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the adjoint of `lstm_forward`, back through the steps.

    Only what the recurrence alone can give is computed here: every other gradient is one GEMM over all rows of
    `dgates` (see `autograd.py`).

    Args:
        d_output: [N, D*P], cotangent of the output.
        dh_n: [D, B, P], cotangent of h_n.
        dc_n: [D, B, H], cotangent of c_n.
        gates: [N, D*4H], saved by `lstm_forward`.
        cells: [N, D*H], saved by `lstm_forward`.
        c0: [D, B, H].
        w_hh: [D, 4H, P].
        w_hr: [D, P, H], or None.
        batch_sizes: as in `lstm_forward`.

    Returns:
        dgates [N, D*4H], the gradient of the pre-activations; dc0 [D, B, H]; and with a projection dh [N, D*P], the
        whole gradient of h_t (from the output, from the step after and, at the end, from h_n), else size 0.
    """
    D, B, H = c0.shape
    P = dh_n.shape[2]
    dtype = cells.dtype
    sizes = _sizes(gates, B, batch_sizes)
    dgates = gates.new_empty(gates.shape, dtype=dtype)
    dh_rows = d_output.new_empty(0 if w_hr is None else d_output.shape)
    dh_n, dc_n = (state.to(dtype, copy=True, memory_format=torch.contiguous_format) for state in (dh_n, dc_n))

    for d in range(D):
        i, f, g, o = gates[:, d * 4 * H : (d + 1) * 4 * H].to(dtype).chunk(4, 1)
        cells_d = cells[:, d * H : (d + 1) * H]
        tanh_c = cells_d.tanh()
        c_prev = previous(cells_d, c0[d].to(dtype), batch_sizes, reverse=d == 1)

        # all that does not depend on dh and dc, for all rows at once; the loop multiplies it in place
        da_i, da_f, da_g, da_o = dgates[:, d * 4 * H : (d + 1) * 4 * H].chunk(4, 1)
        torch.addcmul(i, i, i, value=-1, out=da_i).mul_(g)  # g i (1 - i)
        torch.addcmul(f, f, f, value=-1, out=da_f).mul_(c_prev)  # c_prev f (1 - f)
        torch.addcmul(i, i, torch.mul(g, g, out=da_g), value=-1, out=da_g)  # i (1 - g^2)
        torch.addcmul(o, o, o, value=-1, out=da_o).mul_(tanh_c)  # tanh_c o (1 - o)
        dc_dm = torch.addcmul(o, o, tanh_c.square_(), value=-1, out=tanh_c)  # o (1 - tanh_c^2)

        w_hh_d = w_hh[d].to(dtype)
        w_hr_d = None if w_hr is None else w_hr[d].to(dtype)
        d_output_steps = _steps(d_output, d, P, sizes)
        dgates_steps = _steps(dgates, d, 4 * H, sizes)
        dh_steps = () if w_hr is None else _steps(dh_rows, d, P, sizes)
        f_steps = f.split(sizes)
        dc_dm_steps = dc_dm.split(sizes)
        dh, dc = dh_n[d], dc_n[d]
        for t in reversed(_order(len(sizes), d)):
            n = sizes[t]
            if n != len(dh):
                dh, dc = dh_n[d, :n], dc_n[d, :n]

            dm = dh.add_(d_output_steps[t])
            if w_hr_d is not None:
                dh_steps[t].copy_(dh)
                dm = torch.mm(dh, w_hr_d)
            dc.addcmul_(dm, dc_dm_steps[t])

            da_ifg, da_o = dgates_steps[t].split((3 * H, H), 1)
            da_ifg.unflatten(1, (3, H)).mul_(dc.unsqueeze(1))
            da_o.mul_(dm)

            dc.mul_(f_steps[t])
            torch.mm(dgates_steps[t], w_hh_d, out=dh)
    return dgates.to(gates.dtype), dc_n.to(c0.dtype), dh_rows


def lstm_differentiable(
    gates_x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the same recurrence with nothing in place, so that autograd can differentiate it any number of times.

    Arguments and the first three results are those of `lstm_forward`. Slower, and its graph holds every step: it serves
    double backward and is the oracle for the hand-written `lstm_backward`.
    """
    D, B, _ = h0.shape
    H = c0.shape[2]
    dtype = accumulation_dtype(gates_x.dtype)
    sizes = _sizes(gates_x, B, batch_sizes)
    outputs, h_n, c_n = [], [], []
    for d in range(D):
        h, c, w_hh_t = h0[d].to(dtype), c0[d].to(dtype), w_hh[d].to(dtype).t()
        gates_x_steps = _steps(gates_x.to(dtype), d, 4 * H, sizes)
        output_steps: dict[int, Tensor] = {}
        for t in _order(len(sizes), d):
            n = sizes[t]
            i, f, g, o = (gates_x_steps[t] + h[:n] @ w_hh_t).chunk(4, 1)
            c_t = f.sigmoid() * c[:n] + i.sigmoid() * g.tanh()
            h_t = o.sigmoid() * c_t.tanh()
            if w_hr is not None:
                h_t = h_t @ w_hr[d].to(dtype).t()
            output_steps[t] = h_t
            h, c = torch.cat((h_t, h[n:])), torch.cat((c_t, c[n:]))
        outputs.append(torch.cat([output_steps[t] for t in range(len(sizes))]))
        h_n.append(h)
        c_n.append(c)
    output = torch.cat(outputs, 1).to(h0.dtype)
    return output, torch.stack(h_n).to(h0.dtype), torch.stack(c_n).to(h0.dtype)


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
    B = len(initial)
    if batch_sizes is None:
        return torch.cat((values[B:], initial) if reverse else (initial, values[: len(values) - B]))
    ends = batch_sizes.cumsum(0)
    t = torch.arange(len(batch_sizes)).repeat_interleave(batch_sizes)
    b = torch.arange(len(values)) - (ends - batch_sizes)[t]
    if reverse:
        # a row's first step backwards is the last one where it is active
        active_next = torch.cat((batch_sizes[1:], batch_sizes.new_zeros(1)))
        index = torch.where(b < active_next[t], B + ends[t] + b, b)
    else:
        starts_previous = torch.cat((batch_sizes.new_zeros(1), ends[:-1] - batch_sizes[:-1]))
        index = torch.where(t > 0, B + starts_previous[t] + b, b)
    return torch.cat((initial, values)).index_select(0, index.to(values.device))


def first_rows(values: Tensor, B: int, batch_sizes: Tensor | None, reverse: bool) -> Tensor:
    """Return the row of each batch entry at its first step in a direction: [B, K] from `values` [N, K]."""
    if not reverse:
        return values[:B]
    if batch_sizes is None:
        return values[len(values) - B :]
    lengths, offsets = spans(batch_sizes)
    return values.index_select(0, (offsets[lengths - 1] + torch.arange(B, device="cpu")).to(values.device))


def spans(batch_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the length of each row [B] of a packed batch, and the first data row of each step [T]."""
    lengths = batch_sizes.bincount().flip(0).cumsum(0).flip(0)[1:]
    return lengths, batch_sizes.cumsum(0) - batch_sizes


def _sizes(rows: Tensor, B: int, batch_sizes: Tensor | None) -> list[int]:
    """Return the number of active rows at each step."""
    if batch_sizes is not None:
        return batch_sizes.tolist()
    return [B] * (len(rows) // B) if B else []


def _order(T: int, d: int) -> range:
    """Return the steps in the order in which direction `d` takes them."""
    return range(T) if d == 0 else range(T - 1, -1, -1)


def _steps(rows: Tensor, d: int, width: int, sizes: list[int]) -> Sequence[Tensor]:
    """Split the columns of direction `d` into one view a step."""
    return rows[:, d * width : (d + 1) * width].split(sizes)
