"""One step of the forward recurrence, any size: the dot, the four gates and the cell update in one launch.

    gates_t = gates_x_t + h_{t-1} W_hh^T;  c_t, h_t = cell(gates_t, c_{t-1})        for one t a direction

For a W_hh that does not fit one program. T launches, each of which reads W_hh again: where launches cost more than
the arithmetic (small H) forward_resident.py is the tool.
"""

import triton
import triton.language as tl

from .cell import cell_forward, dot_apart, first_row, gate_rows, join_gates, rounded


@triton.jit(do_not_specialize=["s", "T", "B"])
def forward_stepwise(
    gates_x_ptr,  # [N, D*4H]
    w_hh_ptr,  # [D, 4H, H]
    h_in_ptr,  # [D, B, H], h before this step
    h_out_ptr,  # [D, B, H], h after it
    c_ptr,  # [D, B, H] float32, updated in place
    output_ptr,  # [N, D*H]
    gates_ptr,  # [N, D*4H], activated; not touched without SAVE
    cells_ptr,  # [N, D*H], float32; not touched without SAVE
    lengths_ptr,  # [B] int64, falling; not touched without VARLEN
    offsets_ptr,  # [T] int64; not touched without VARLEN
    s,
    T,
    B,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    SAVE: tl.constexpr,
    VARLEN: tl.constexpr,
):
    """One program advances BLOCK_H hidden units of BLOCK_B rows by step s. Grid: (units, rows, D), in blocks."""
    pid_h = tl.program_id(0)
    pid_b = tl.program_id(1)
    direction = tl.program_id(2)
    D = tl.num_programs(2)
    dtype = gates_x_ptr.dtype.element_ty

    b = tl.arange(0, BLOCK_B)
    k = tl.arange(0, BLOCK_K)
    j = pid_h * BLOCK_H + tl.arange(0, BLOCK_H)
    gate, unit = gate_rows(H, BLOCK_H)
    unit += pid_h * BLOCK_H
    mask_b = pid_b * BLOCK_B + b < B
    mask = (j < H)[:, None] & mask_b[None, :]
    mask_gates = (unit < H)[:, None] & mask_b[None, :]

    t = s + direction * (T - 1 - 2 * s)
    b0 = (pid_b * BLOCK_B).to(tl.int64)
    row = first_row(t, B, offsets_ptr, VARLEN) + b0
    mask_t = mask
    mask_gates_t = mask_gates
    if VARLEN:
        active = (t < tl.load(lengths_ptr + pid_b * BLOCK_B + b, mask=mask_b, other=0))[None, :]
        mask_t = mask & active
        mask_gates_t = mask_gates & active

    # first elements of this tile: of a state [D, B, H], of a row of h or c [D*H], of a row of gates [D*4H]
    state = (direction * B + b0) * H
    row_h = row * (D * H) + direction * H
    row_gates = row * (D * 4 * H) + direction * 4 * H
    offs_state = j[:, None] + b[None, :] * H
    offs_h = j[:, None] + b[None, :] * (D * H)
    offs_gates = (gate * H + unit)[:, None] + b[None, :] * (D * 4 * H)
    w_ptrs = w_hh_ptr + direction.to(tl.int64) * 4 * H * H + (gate * H + unit)[:, None] * H + k[None, :]
    h_ptrs = h_in_ptr + state + k[:, None] + b[None, :] * H

    # from zero, since float32 loses the fewer digits of a long sum the smaller it is on the way
    a = tl.zeros([4 * BLOCK_H, BLOCK_B], tl.float32)
    for k0 in range(0, H, BLOCK_K):
        w = tl.load(w_ptrs + k0, mask=(unit < H)[:, None] & (k0 + k < H)[None, :], other=0.0)
        h = tl.load(h_ptrs + k0, mask=(k0 + k < H)[:, None] & mask_b[None, :], other=0.0)
        a += dot_apart(rounded(w, PRECISION), rounded(h, PRECISION), PRECISION)
    a += tl.load(gates_x_ptr + row_gates + offs_gates, mask=mask_gates_t, other=0.0).to(tl.float32)

    c = tl.load(c_ptr + state + offs_state, mask=mask, other=0.0)
    i, f, g, o, c, h = cell_forward(a, c, BLOCK_H, BLOCK_B)
    h = h.to(dtype)

    tl.store(c_ptr + state + offs_state, c, mask=mask_t)
    tl.store(output_ptr + row_h + offs_h, h, mask=mask_t)
    if VARLEN:
        h = tl.where(active, h, tl.load(h_in_ptr + state + offs_state, mask=mask, other=0.0))
    tl.store(h_out_ptr + state + offs_state, h, mask=mask)
    if SAVE:
        activated = join_gates(i, f, g, o, BLOCK_H, BLOCK_B).to(dtype)
        tl.store(gates_ptr + row_gates + offs_gates, activated, mask=mask_gates_t)
        tl.store(cells_ptr + row_h + offs_h, c, mask=mask_t)
