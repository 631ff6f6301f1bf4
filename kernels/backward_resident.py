"""Backward recurrence with the whole W_hh inside one program.

    dgates_t, dc_{t-1} = adjoint of cell(dy_t + dh_t, dc_t);  dh_{t-1} = dgates_t W_hh       for all t, from the last

The counterpart of forward_resident.py: W_hh is read once, dh and dc never leave the chip, and what the forward pass
saved arrives one step ahead of its use. The gradients of weights, input and h0 are GEMMs over all of dgates, after.
"""

import triton
import triton.language as tl

from .cell import cell_backward, dot, first_row, gate_rows, join_gates, rounded, split_gates


@triton.jit(do_not_specialize=["T", "B"])
def backward_resident(
    d_output_ptr,  # [N, D*H]
    dh_n_ptr,  # [D, B, H]
    dc_n_ptr,  # [D, B, H]
    gates_ptr,  # [N, D*4H], activated
    cells_ptr,  # [N, D*H], float32
    c0_ptr,  # [D, B, H]
    w_hh_ptr,  # [D, 4H, H]
    dgates_ptr,  # [N, D*4H]
    dc0_ptr,  # [D, B, H]
    lengths_ptr,  # [B] int64, falling; not touched without VARLEN
    offsets_ptr,  # [T] int64; not touched without VARLEN
    T,
    B,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PRECISION: tl.constexpr,
    VARLEN: tl.constexpr,
):
    """One program runs BLOCK_B rows of one direction back through all T steps. Grid: (ceil(B / BLOCK_B), D)."""
    pid_b = tl.program_id(0)
    direction = tl.program_id(1)
    D = tl.num_programs(1)
    dtype = gates_ptr.dtype.element_ty

    b = tl.arange(0, BLOCK_B)
    k = tl.arange(0, BLOCK_H)
    gate, unit = gate_rows(H, BLOCK_H)
    mask_b = pid_b * BLOCK_B + b < B
    mask = (k < H)[:, None] & mask_b[None, :]
    mask_gates = (unit < H)[:, None] & mask_b[None, :]

    # offsets of this tile: in a state [D, B, H], in a row of h or c [D*H], in a row of gates [D*4H]
    b0 = (pid_b * BLOCK_B).to(tl.int64)
    offs_state = (direction * B + b0) * H + k[:, None] + b[None, :] * H
    offs_h = direction * H + k[:, None] + b[None, :] * (D * H)
    offs_gates = direction * 4 * H + (gate * H + unit)[:, None] + b[None, :] * (D * 4 * H)

    w_t = tl.load(
        w_hh_ptr + direction * 4 * H * H + (gate * H + unit)[None, :] * H + k[:, None],
        mask=(unit < H)[None, :] & (k < H)[:, None],
        other=0.0,
    )
    w_t = rounded(w_t, PRECISION)
    dh = tl.load(dh_n_ptr + offs_state, mask=mask, other=0.0).to(tl.float32)
    dc = tl.load(dc_n_ptr + offs_state, mask=mask, other=0.0).to(tl.float32)
    c0 = tl.load(c0_ptr + offs_state, mask=mask, other=0.0).to(tl.float32)

    if VARLEN:
        lengths = tl.load(lengths_ptr + pid_b * BLOCK_B + b, mask=mask_b, other=0).to(tl.int32)
        zeros = tl.zeros_like(lengths)  # a comparison joins a mask only as a tensor of its shape
        T = tl.load(lengths_ptr + pid_b * BLOCK_B).to(tl.int32)  # lengths fall: no row of this tile is longer
    # direction 0 went up in time, so back means down
    t = (1 - direction) * (T - 1)
    step = 2 * direction - 1
    t_1 = tl.minimum(tl.maximum(t + step, 0), T - 1)
    row = first_row(t, B, offsets_ptr, VARLEN) + b0
    row_1 = first_row(t_1, B, offsets_ptr, VARLEN) + b0
    t_2 = tl.minimum(tl.maximum(t_1 + step, 0), T - 1)
    row_2 = first_row(t_2, B, offsets_ptr, VARLEN) + b0
    mask_t = mask & (t < lengths)[None, :] if VARLEN else mask
    mask_1 = mask & (t_1 < lengths)[None, :] if VARLEN else mask
    mask_gates_t = mask_gates & (t < lengths)[None, :] if VARLEN else mask_gates
    saved = tl.load(gates_ptr + row * (D * 4 * H) + offs_gates, mask=mask_gates_t, other=0.0)
    dy = tl.load(d_output_ptr + row * (D * H) + offs_h, mask=mask_t, other=0.0)
    c = tl.load(cells_ptr + row * (D * H) + offs_h, mask=mask_t, other=0.0)
    c_1 = tl.load(cells_ptr + row_1 * (D * H) + offs_h, mask=mask_1, other=0.0)

    for _ in range(T):
        # gates and dy arrive one step ahead of their use, cells two, row numbers three; at the end the last row again
        t_3 = tl.minimum(tl.maximum(t_2 + step, 0), T - 1)
        row_3 = first_row(t_3, B, offsets_ptr, VARLEN) + b0
        mask_2 = mask & (t_2 < lengths)[None, :] if VARLEN else mask
        mask_gates_1 = mask_gates & (t_1 < lengths)[None, :] if VARLEN else mask_gates
        saved_1 = tl.load(gates_ptr + row_1 * (D * 4 * H) + offs_gates, mask=mask_gates_1, other=0.0)
        dy_1 = tl.load(d_output_ptr + row_1 * (D * H) + offs_h, mask=mask_1, other=0.0)
        c_2 = tl.load(cells_ptr + row_2 * (D * H) + offs_h, mask=mask_2, other=0.0)

        # the cell before a row's first step is c0
        has_prev = t + step == t_1
        if VARLEN:
            has_prev = (t + step == t_1 + zeros) & (t_1 < lengths)
            has_prev = has_prev[None, :]
        c_prev = tl.where(has_prev, c_1, c0)
        i, f, g, o = split_gates(saved.to(tl.float32), BLOCK_H, BLOCK_B)
        di, df, dg, do, dc_new = cell_backward(dh + dy.to(tl.float32), dc, i, f, g, o, c_prev, c)
        da = join_gates(di, df, dg, do, BLOCK_H, BLOCK_B).to(dtype)
        tl.store(dgates_ptr + row * (D * 4 * H) + offs_gates, da, mask=mask_gates_t)

        dh_new = dot(w_t, da, PRECISION)
        dh = tl.where((t < lengths)[None, :], dh_new, dh) if VARLEN else dh_new
        dc = tl.where((t < lengths)[None, :], dc_new, dc) if VARLEN else dc_new
        t = t_1
        t_1 = t_2
        t_2 = t_3
        row = row_1
        row_1 = row_2
        row_2 = row_3
        mask_1 = mask_2
        mask_gates_t = mask_gates_1
        saved = saved_1
        dy = dy_1
        c = c_1
        c_1 = c_2

    tl.store(dc0_ptr + offs_state, dc.to(dtype), mask=mask)
