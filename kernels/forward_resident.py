"""Forward recurrence with the whole W_hh inside one program.

    gates_t = gates_x_t + h_{t-1} W_hh^T;  c_t, h_t = cell(gates_t, c_{t-1})        for all t

W_hh is read once; h and c never leave the chip; no program waits for another. This is the regime for small H, where
the wait for memory would be longer than the arithmetic. A larger W_hh does not fit: see forward_stepwise.py.
"""

import triton
import triton.language as tl

from .cell import cell_forward, dot, first_row, gate_rows, join_gates, rounded


@triton.jit(do_not_specialize=["T", "B"])
def forward_resident(
    gates_x_ptr,  # [N, D*4H]
    w_hh_ptr,  # [D, 4H, H]
    h0_ptr,  # [D, B, H]
    c0_ptr,  # [D, B, H]
    output_ptr,  # [N, D*H]
    h_n_ptr,  # [D, B, H]
    c_n_ptr,  # [D, B, H]
    gates_ptr,  # [N, D*4H], activated; not touched without SAVE
    cells_ptr,  # [N, D*H], float32; not touched without SAVE
    lengths_ptr,  # [B] int64, falling; not touched without VARLEN
    offsets_ptr,  # [T] int64; not touched without VARLEN
    T,
    B,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PRECISION: tl.constexpr,
    SAVE: tl.constexpr,
    VARLEN: tl.constexpr,
):
    """One program runs BLOCK_B rows of one direction through all T steps. Grid: (ceil(B / BLOCK_B), D)."""
    pid_b = tl.program_id(0)
    direction = tl.program_id(1)
    D = tl.num_programs(1)
    dtype = gates_x_ptr.dtype.element_ty

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

    w = tl.load(
        w_hh_ptr + direction * 4 * H * H + (gate * H + unit)[:, None] * H + k[None, :],
        mask=(unit < H)[:, None] & (k < H)[None, :],
        other=0.0,
    )
    w = rounded(w, PRECISION)
    h = tl.load(h0_ptr + offs_state, mask=mask, other=0.0)
    c = tl.load(c0_ptr + offs_state, mask=mask, other=0.0).to(tl.float32)

    if VARLEN:
        lengths = tl.load(lengths_ptr + pid_b * BLOCK_B + b, mask=mask_b, other=0).to(tl.int32)
        T = tl.load(lengths_ptr + pid_b * BLOCK_B).to(tl.int32)  # lengths fall: no row of this tile is longer
    t = direction * (T - 1)
    step = 1 - 2 * direction
    t_next = tl.minimum(tl.maximum(t + step, 0), T - 1)
    row = first_row(t, B, offsets_ptr, VARLEN) + b0
    row_next = first_row(t_next, B, offsets_ptr, VARLEN) + b0
    mask_x = mask_gates & (t < lengths)[None, :] if VARLEN else mask_gates
    x = tl.load(gates_x_ptr + row * (D * 4 * H) + offs_gates, mask=mask_x, other=0.0)

    for _ in range(T):
        # gates_x arrives one step ahead of its use, its row number two; past the end the last row is read again
        t_after = tl.minimum(tl.maximum(t_next + step, 0), T - 1)
        row_after = first_row(t_after, B, offsets_ptr, VARLEN) + b0
        mask_x = mask_gates & (t_next < lengths)[None, :] if VARLEN else mask_gates
        x_next = tl.load(gates_x_ptr + row_next * (D * 4 * H) + offs_gates, mask=mask_x, other=0.0)

        a = dot(w, rounded(h, PRECISION), PRECISION) + x.to(tl.float32)
        i, f, g, o, c_new, h_new = cell_forward(a, c, BLOCK_H, BLOCK_B)
        mask_t = mask & (t < lengths)[None, :] if VARLEN else mask
        mask_gates_t = mask_gates & (t < lengths)[None, :] if VARLEN else mask_gates
        c = tl.where((t < lengths)[None, :], c_new, c) if VARLEN else c_new
        h = tl.where((t < lengths)[None, :], h_new.to(dtype), h) if VARLEN else h_new.to(dtype)

        tl.store(output_ptr + row * (D * H) + offs_h, h, mask=mask_t)
        if SAVE:
            activated = join_gates(i, f, g, o, BLOCK_H, BLOCK_B).to(dtype)
            tl.store(gates_ptr + row * (D * 4 * H) + offs_gates, activated, mask=mask_gates_t)
            tl.store(cells_ptr + row * (D * H) + offs_h, c, mask=mask_t)
        t = t_next
        t_next = t_after
        row = row_next
        row_next = row_after
        x = x_next

    tl.store(h_n_ptr + offs_state, h, mask=mask)
    tl.store(c_n_ptr + offs_state, c.to(dtype), mask=mask)
