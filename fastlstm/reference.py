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

import torch
from torch import Tensor

from fastlstm.packing import first_rows, previous

# a gradient times y (1 - y), or 1 - y^2, in one pass
_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
_tanh_backward = torch.ops.aten.tanh_backward.grad_input


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

    output = gates.new_empty(N, D * P)
    cells = gates.new_empty((N, D * H) if save else 0)
    h_n, c_n = (state.to(dtype, copy=True, memory_format=torch.contiguous_format) for state in (h0, c0))

    for d in range(D):
        w_hh_t = _transposed(w_hh[d].to(dtype))
        w_hr_t = None if w_hr is None else w_hr[d].to(dtype).t()
        gates_d = gates[:, d * 4 * H : (d + 1) * 4 * H]
        # views of each step, all made at once: in the loop they would cost as much as the arithmetic
        parts = (gates_d, gates_d[:, : 2 * H], *gates_d.chunk(4, 1), output[:, d * P : (d + 1) * P])
        steps = list(zip(*(part.split(sizes) for part in parts), strict=True))
        cells_steps = cells[:, d * H : (d + 1) * H].split(sizes) if save else ()
        h, c = h_n[d], c_n[d]
        for t in _order(len(sizes), d):
            gates_t, i_f, i, f, g, o, h_t = steps[t]
            n = len(h_t)
            if n < len(h):  # rows have ended, or have not begun
                h_n[d, n : len(h)], c_n[d, n : len(h)] = h[n:], c[n:]
                h, c = h[:n], c[:n]
            elif n > len(h):  # rows begin, only where time runs backwards
                h, c = torch.cat((h, h_n[d, len(h) : n])), torch.cat((c, c_n[d, len(c) : n]))

            gates_t.addmm_(h, w_hh_t)
            i_f.sigmoid_()
            c = torch.mul(c, f, out=cells_steps[t] if save else c).addcmul_(i, g.tanh_())

            if w_hr_t is None:
                h = torch.tanh(c, out=h_t).mul_(o.sigmoid_())
            else:
                h = torch.mm(c.tanh().mul_(o.sigmoid_()), w_hr_t, out=h_t)
        h_n[d, : len(h)], c_n[d, : len(c)] = h, c
    gates = gates_x.copy_(gates) if save else gates_x.new_empty(0)  # a copy onto itself costs nothing
    output, h_n, c_n = (value.to(h0.dtype) for value in (output, h_n, c_n))
    return output, h_n, c_n, gates, cells


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
    dc_n = dc_n.to(dtype, copy=True, memory_format=torch.contiguous_format)
    tanh_c, dh_d = cells.new_empty(len(cells), H), cells.new_empty(len(cells), P)
    rows = torch.arange(len(gates), device=gates.device)

    for d in range(D):
        i, f, g, o = gates[:, d * 4 * H : (d + 1) * 4 * H].to(dtype).chunk(4, 1)
        cells_d = cells[:, d * H : (d + 1) * H]
        torch.tanh(cells_d, out=tanh_c)

        # all that does not depend on dh and dc, for all rows at once; the loop multiplies it in place
        dgates_d = dgates[:, d * 4 * H : (d + 1) * 4 * H]
        da_i, da_f, da_g, da_o = dgates_d.chunk(4, 1)
        _sigmoid_backward(g, i, grad_input=da_i)  # g i (1 - i)
        previous(cells_d, c0[d].to(dtype), batch_sizes, reverse=d == 1, out=da_f)
        _sigmoid_backward(da_f, f, grad_input=da_f)  # c_prev f (1 - f)
        _tanh_backward(i, g, grad_input=da_g)  # i (1 - g^2)
        _sigmoid_backward(tanh_c, o, grad_input=da_o)  # tanh_c o (1 - o)
        dc_dm = _tanh_backward(o, tanh_c, grad_input=tanh_c)  # o (1 - tanh_c^2)

        w_hh_d = w_hh[d].to(dtype)
        w_hr_d = None if w_hr is None else w_hr[d].to(dtype)
        # each step adds its part to the rows of the step before
        dh_d.copy_(d_output[:, d * P : (d + 1) * P])
        # a row's last step in one direction is its first in the other
        dh_d.index_add_(0, first_rows(rows, B, batch_sizes, reverse=d == 0), dh_n[d].to(dtype))
        parts = (dgates_d, dgates_d[:, : 3 * H].unflatten(1, (3, H)), da_o, f, dc_dm)
        steps = list(zip(*(part.split(sizes) for part in parts), strict=True))
        dh_steps = dh_d.split(sizes)
        dc = dc_n[d]
        dc_of_gates = dc.unsqueeze(1)
        order = _order(len(sizes), d)
        for t, before in zip(reversed(order), (*reversed(order[:-1]), None), strict=False):
            da, da_ifg, da_o, f, dc_dm = steps[t]
            dh = dh_steps[t]
            if len(dh) != len(dc):
                dc = dc_n[d, : len(dh)]
                dc_of_gates = dc.unsqueeze(1)

            dm = dh if w_hr_d is None else torch.mm(dh, w_hr_d)
            dc.addcmul_(dm, dc_dm)
            da_ifg.mul_(dc_of_gates)
            da_o.mul_(dm)
            dc.mul_(f)

            if before is not None:
                dh = dh_steps[before]
                if len(dh) != len(da):
                    n = min(len(dh), len(da))
                    dh, da = dh[:n], da[:n]
                dh.addmm_(da, w_hh_d)
        if w_hr is not None:
            dh_rows[:, d * P : (d + 1) * P] = dh_d
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
        gates_x_steps = gates_x.to(dtype)[:, d * 4 * H : (d + 1) * 4 * H].split(sizes)
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


def _sizes(rows: Tensor, B: int, batch_sizes: Tensor | None) -> list[int]:
    """Return the number of active rows at each step."""
    if batch_sizes is not None:
        return batch_sizes.tolist()
    return [B] * (len(rows) // B) if B else []


def _order(T: int, d: int) -> range:
    """Return the steps in the order in which direction `d` takes them."""
    return range(T) if d == 0 else range(T - 1, -1, -1)


def _transposed(w: Tensor) -> Tensor:
    """Return w^T as MKL multiplies a few rows by it fastest: small matrices laid out anew, a cache line between rows.

    It gives a tenth at 10 rows and a third to a half at 2; without the gap, columns would fall on the same cache sets.
    """
    if w.numel() > 1 << 18:
        return w.t()
    gap = 64 // w.element_size()
    return w.new_empty(w.shape[1], w.shape[0] + gap)[:, : w.shape[0]].copy_(w.t())
