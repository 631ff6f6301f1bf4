r"""The recurrence in plain torch: the specification that every kernel answers to.

One call handles the D directions of one layer, after the input GEMM. With gates i, f, g, o in torch's order:

    a_t = gates_x_t + h_{t-1} W_hh^T                     [B, 4H]
    i, f, o = sigmoid(a_i, a_f, a_o);  g = tanh(a_g)
    c_t = f c_{t-1} + i g;   m_t = o tanh(c_t)           [B, H]
    h_t = m_t W_hr^T  (m_t without projection)           [B, P]

`lstm_forward` saves what `lstm_backward` needs, `lstm_backward` is written by hand, `lstm_infer` has the input GEMM in
its steps and saves nothing, and `lstm_differentiable` is the same forward with nothing in place, for autograd to
differentiate as often as it likes. `kernels/README.md` derives the backward.

Data come as rows: row `t*B + b` of a dense batch, row `offsets[t] + b` of a packed one, whose rows are sorted by
falling length, so that the first `batch_sizes[t]` rows are active at step t and the others keep their state.
Direction 1 runs time backwards. Elementwise work and state are float32 for the 16-bit dtypes.

This is also the fast route on a CPU where stock torch steps through Python-sized pieces of autograd graph (float64,
float16, projection, packed batches): one loop, no graph. It is the wrong tool for dense float32, which oneDNN runs
faster.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

# 16-bit rows are widened in blocks of so many bytes at least
_BLOCK_BYTES = 1 << 19
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
    w_hh: Tensor | Sequence[Tensor],
    w_hr: Tensor | Sequence[Tensor] | None,
    batch_sizes: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the recurrence over all steps.

    Args:
        gates_x: [N, D*4H], x W_ih^T + b_ih + b_hh; N rows as the module docstring lays out. Overwritten: the
            activated gates take its place, so that a layer in training holds one such buffer and not two.
        h0: [D, B, P] (P is H without projection).
        c0: [D, B, H].
        w_hh: [4H, P] of each direction, stacked or not.
        w_hr: [P, H] of each direction, likewise, or None without projection.
        batch_sizes: [T] int64 on the CPU for packed rows, or None for dense ones.
        save: whether to return what `lstm_backward` needs.

    Returns:
        output [N, D*P], h_n [D, B, P], c_n [D, B, H] in the dtype of `gates_x`; activated gates [N, D*4H] in the
        same dtype and cells c_t [N, D*H] in the accumulation dtype (both of size 0 unless `save`).
    """
    D, B, P = h0.shape
    H = c0.shape[2]
    dtype = accumulation_dtype(gates_x.dtype)
    narrow = dtype != gates_x.dtype
    sizes = _sizes(gates_x, B, batch_sizes)
    blocks = _blocks(sizes, (4 * H + P) * dtype.itemsize if narrow else 0)

    output = gates_x.new_empty(len(gates_x), D * P)
    cells = gates_x.new_empty((len(gates_x), D * H) if save else 0, dtype=dtype)
    h_n, c_n = (state.to(dtype, copy=True, memory_format=torch.contiguous_format) for state in (h0, c0))
    most_rows = max((rows.stop - rows.start for _, rows in blocks), default=0) if narrow else 0
    wide_gates, wide_hidden = (gates_x.new_empty(most_rows, width, dtype=dtype) for width in (4 * H, P))

    for d in range(D):
        w_hh_t = _transposed(w_hh[d].to(dtype))
        w_hr_t = None if w_hr is None else w_hr[d].to(dtype).t()
        h, c = h_n[d], c_n[d]
        for steps, rows in reversed(blocks) if d else blocks:
            gates_x_rows = gates_x[rows, d * 4 * H : (d + 1) * 4 * H]
            output_rows = output[rows, d * P : (d + 1) * P]
            gates, hidden = gates_x_rows, output_rows
            if narrow:
                gates, hidden = wide_gates[: len(gates)].copy_(gates), wide_hidden[: len(gates)]
            # views of each step, all made at once: in the loop they would cost as much as the arithmetic
            views = _views((gates, gates[:, : 2 * H], *gates.chunk(4, 1), hidden), sizes[steps])
            cells_steps = cells[rows, d * H : (d + 1) * H].split(sizes[steps]) if save else ()
            for k in _order(len(views), d):
                gates_t, i_f, i, f, g, o, h_t = views[k]
                n = len(h_t)
                if n < len(h):  # rows have ended, or have not begun
                    h_n[d, n : len(h)], c_n[d, n : len(h)] = h[n:], c[n:]
                    h, c = h[:n], c[:n]
                elif n > len(h):  # rows begin, only where time runs backwards
                    h, c = torch.cat((h, h_n[d, len(h) : n])), torch.cat((c, c_n[d, len(c) : n]))

                gates_t.addmm_(h, w_hh_t)
                i_f.sigmoid_()
                c = torch.mul(c, f, out=cells_steps[k] if save else c).addcmul_(i, g.tanh_())

                if w_hr_t is None:
                    h = torch.tanh(c, out=h_t).mul_(o.sigmoid_())
                else:
                    h = torch.mm(c.tanh().mul_(o.sigmoid_()), w_hr_t, out=h_t)
            if narrow:
                output_rows.copy_(hidden)
                if save:
                    gates_x_rows.copy_(gates)
        h_n[d, : len(h)], c_n[d, : len(c)] = h, c
    return output, h_n.to(h0.dtype), c_n.to(h0.dtype), gates_x if save else gates_x.new_empty(0), cells


def lstm_infer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Sequence[Tensor],
    bias: Tensor | None,
    w_hh: Tensor | Sequence[Tensor],
    w_hr: Tensor | Sequence[Tensor] | None,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run a layer for no backward pass, one product a step: [x_t, 1, h_{t-1}] [W_ih, b, W_hh]^T.

    Nothing has the size of all gates, and states stay where they are: a row that has ended, or has not begun, is not
    touched. A product is one for each gate, whose weights lie together, and torch is faster over a gate's whole rows;
    but where H leaves a part of the processor's vectors empty, one product for all gates leaves less.

    Args:
        x: [N, I], rows as the module docstring lays them out.
        h0: [D, B, P] (P is H without projection).
        c0: [D, B, H].
        w_ih: [4H, I] of each direction.
        bias: [D*4H], b_ih + b_hh, or None.
        w_hh: [4H, P] of each direction, stacked or not.
        w_hr: [P, H] of each direction, likewise, or None without projection.
        batch_sizes: as in `lstm_forward`.

    Returns:
        what `lstm_forward` does without `save`.
    """
    D, B, P = h0.shape
    H, I = c0.shape[2], x.shape[1]  # noqa: E741
    K = I + 1 + P
    dtype = accumulation_dtype(x.dtype)
    narrow = dtype != x.dtype
    sizes = _sizes(x, B, batch_sizes)
    x_steps = x.split(sizes)
    output = x.new_empty(len(x), D * P)
    operand = x.new_ones(D, B, K, dtype=dtype)
    h_n = operand[:, :, I + 1 :].copy_(h0)
    c_n = c0.new_empty(D, B, H, dtype=dtype).copy_(c0)
    by_gate = H % 16 == 0
    product = torch.bmm if by_gate else torch.mm
    all_gates, all_tanh_g = x.new_empty(B, 4 * H, dtype=dtype), x.new_empty(B, H, dtype=dtype)

    for d in range(D):
        bias_d = None if bias is None else bias[d * 4 * H : (d + 1) * 4 * H]
        weights = _joined(w_ih[d], bias_d, w_hh[d], dtype, by_gate)
        w_hr_t = None if w_hr is None else _transposed(w_hr[d].to(dtype))
        output_steps = output[:, d * P : (d + 1) * P].split(sizes)
        all_inputs, all_x, all_h, all_c = operand[d], operand[d, :, :I], h_n[d], c_n[d]
        for n, steps in itertools.groupby(_order(len(sizes), d), sizes.__getitem__):
            # a view costs as much as a small op, so none is made twice
            inputs, x_t, h, c = all_inputs[:n], all_x[:n], all_h[:n], all_c[:n]
            if by_gate:
                inputs, gates = inputs.expand(4, n, K), all_gates.as_strided((4, n, H), (n * H, H, 1))
                sigmoids, (i, f, o, g) = gates[:3], gates.unbind()
                tanh_g = g
            else:  # torch is slow over parts of rows: tanh of g goes elsewhere, then the sigmoid runs over all gates
                gates = sigmoids = all_gates[:n]
                i, f, o, g = gates.chunk(4, 1)
                tanh_g = all_tanh_g[:n]
            for t in steps:
                x_t.copy_(x_steps[t])
                product(inputs, weights, out=gates)
                torch.tanh(g, out=tanh_g)
                sigmoids.sigmoid_()
                c.mul_(f).addcmul_(i, tanh_g)

                to, other = (h, output_steps[t]) if narrow else (output_steps[t], h)
                if w_hr_t is None:
                    torch.tanh(c, out=to).mul_(o)
                else:
                    torch.mm(o.mul_(c.tanh()), w_hr_t, out=to)
                other.copy_(to)
    h_n = h0.new_empty(D, B, P).copy_(h_n)
    return output, h_n, c_n.to(h0.dtype), x.new_empty(0), x.new_empty(0, dtype=dtype)


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
        w_hh: [4H, P] of each direction, stacked or not.
        w_hr: [P, H] of each direction, likewise, or None.
        batch_sizes: as in `lstm_forward`.

    Returns:
        dgates [N, D*4H], the gradient of the pre-activations; dc0 [D, B, H]; and with a projection dh [N, D*P], the
        whole gradient of h_t (from the output, from the step after and, at the end, from h_n), else size 0.
    """
    D, B, H = c0.shape
    P = dh_n.shape[2]
    dtype = cells.dtype
    narrow = dtype != gates.dtype
    sizes = _sizes(gates, B, batch_sizes)
    blocks = _blocks(sizes, (9 * H + P) * dtype.itemsize if narrow else 0)

    dgates = gates.new_empty(gates.shape)
    dh_rows = d_output.new_empty(0 if w_hr is None else d_output.shape)  # contiguous, as a tracer is told
    dc_n = dc_n.to(dtype, copy=True, memory_format=torch.contiguous_format)

    for d in range(D):
        w_hh_d = w_hh[d].to(dtype)
        w_hr_d = None if w_hr is None else w_hr[d].to(dtype)
        dh_n_d, c0_d = dh_n[d].to(dtype), c0[d].to(dtype)
        cells_steps = cells[:, d * H : (d + 1) * H].split(sizes)
        dc = dc_n[d, :0]
        dc_of_gates = dc.unsqueeze(1)
        da = dc.new_empty(0, 4 * H)
        for steps, rows in blocks if d else reversed(blocks):
            columns = slice(d * 4 * H, (d + 1) * 4 * H)
            i, f, g, o = gates[rows, columns].to(dtype).chunk(4, 1)
            tanh_c = cells[rows, d * H : (d + 1) * H].tanh()

            # all that does not depend on dh and dc, for all rows at once; the loop multiplies it in place
            dgates_rows = torch.empty_like(gates[rows, columns], dtype=dtype) if narrow else dgates[rows, columns]
            da_i, da_f, da_g, da_o = dgates_rows.chunk(4, 1)
            _sigmoid_backward(g, i, grad_input=da_i)  # g i (1 - i)
            torch.cat(_before(cells_steps, c0_d, sizes, steps, d), out=da_f)
            _sigmoid_backward(da_f, f, grad_input=da_f)  # c_prev f (1 - f)
            _tanh_backward(i, g, grad_input=da_g)  # i (1 - g^2)
            _sigmoid_backward(tanh_c, o, grad_input=da_o)  # tanh_c o (1 - o)
            dc_dm = _tanh_backward(o, tanh_c, grad_input=tanh_c)  # o (1 - tanh_c^2)

            dh_block = d_output[rows, d * P : (d + 1) * P].to(dtype, copy=True)
            parts = (dgates_rows, dgates_rows[:, : 3 * H].unflatten(1, (3, H)), da_o, f, dc_dm, dh_block)
            views = _views(parts, sizes[steps])
            for k in _order(len(views), 1 - d):
                da_next, (da, da_ifg, da_o, f, dc_dm, dh) = da, views[k]
                n, known = len(dh), len(da_next)
                if n == known:
                    dh.addmm_(da_next, w_hh_d)
                else:
                    both = min(n, known)
                    dh[:both].addmm_(da_next[:both], w_hh_d)
                    dh[both:] += dh_n_d[both:n]  # their last step in this direction
                    dc = dc_n[d, :n]
                    dc_of_gates = dc.unsqueeze(1)

                dm = dh if w_hr_d is None else torch.mm(dh, w_hr_d)
                dc.addcmul_(dm, dc_dm)
                da_ifg.mul_(dc_of_gates)
                da_o.mul_(dm)
                dc.mul_(f)
            if narrow:
                dgates[rows, columns] = dgates_rows
            if w_hr is not None:
                dh_rows[rows, d * P : (d + 1) * P] = dh_block
    return dgates, dc_n.to(c0.dtype), dh_rows


def lstm_differentiable(
    gates_x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_hh: Tensor | Sequence[Tensor],
    w_hr: Tensor | Sequence[Tensor] | None,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the same recurrence with nothing in place, so that autograd can differentiate it any number of times.

    Arguments and the first three results are those of `lstm_forward`. Slower, and its graph holds every step: it serves
    double backward and is the oracle for the hand-written `lstm_backward`.
    """
    D, B, _ = h0.shape
    H = c0.shape[2]
    dtype = accumulation_dtype(gates_x.dtype)
    sizes = _sizes(gates_x, B, batch_sizes) or [0]  # of no rows one step, which ties what comes out to what goes in
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


def _blocks(sizes: list[int], row_bytes: int) -> list[tuple[slice, slice]]:
    """Cut the steps into (steps, rows), fewer than 32 blocks, which bound what is held beside the arguments at once.

    What fits a cache is faster in larger blocks still, so where nothing is held (`row_bytes` is 0) there is only one.
    """
    most = max(_BLOCK_BYTES, sum(sizes) * row_bytes // 16)
    blocks: list[tuple[slice, slice]] = []
    first = start = rows = 0
    for t, n in enumerate(sizes):
        if rows and (rows + n) * row_bytes > most:
            blocks.append((slice(first, t), slice(start, start + rows)))
            first, start, rows = t, start + rows, 0
        rows += n
    return [*blocks, (slice(first, len(sizes)), slice(start, start + rows))] if rows else []


def _views(parts: Sequence[Tensor], sizes: list[int]) -> list[tuple[Tensor, ...]]:
    """Return for each step its rows of each of `parts`."""
    return list(zip(*(part.split(sizes) for part in parts), strict=True))


def _before(cells: Sequence[Tensor], c0: Tensor, sizes: list[int], steps: slice, d: int) -> list[Tensor]:
    """Return, in pieces, the cell state with which each row of `steps` began, from those of all steps."""
    pieces = []
    for t in range(steps.start, steps.stop):
        before, n = (t + 1 if d else t - 1), sizes[t]
        known = sizes[before] if 0 <= before < len(sizes) else 0
        if known:
            pieces.append(cells[before] if known <= n else cells[before][:n])
        if known < n:
            pieces.append(c0[known:n])
    return pieces


def _order(T: int, d: int) -> range:
    """Return the steps in the order in which direction `d` takes them."""
    return range(T) if d == 0 else range(T - 1, -1, -1)


def _joined(w_ih: Tensor, bias: Tensor | None, w_hh: Tensor, dtype: torch.dtype, by_gate: bool) -> Tensor:
    """Return [W_ih, b, W_hh]^T, gates in the order i, f, o, g: [I + 1 + P, 4H], or `by_gate` [4, I + 1 + P, H]."""
    I, H = w_ih.shape[1], len(w_ih) // 4  # noqa: E741
    K = I + 1 + w_hh.shape[1]
    weights = w_ih.new_empty((4, K, H) if by_gate else (K, 4 * H), dtype=dtype)
    for gate, k in zip(weights if by_gate else weights.chunk(4, 1), (0, 1, 3, 2), strict=True):
        rows = slice(k * H, (k + 1) * H)
        gate[:I], gate[I + 1 :] = w_ih[rows].t(), w_hh[rows].t()
        gate[I] = 0 if bias is None else bias[rows]
    return weights


def _transposed(w: Tensor) -> Tensor:
    """Return w^T as MKL multiplies a few rows by it fastest: small matrices laid out anew, a cache line between rows.

    It gives a tenth at 10 rows and a third to a half at 2; without the gap, columns would fall on the same cache sets.
    """
    if w.numel() > 1 << 18:
        return w.t()
    gap = 64 // w.element_size()
    return w.new_empty(w.shape[1], w.shape[0] + gap)[:, : w.shape[0]].copy_(w.t())
