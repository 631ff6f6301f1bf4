"""What every kernel shares: activations, the order of gate rows, one cell step and its adjoint, the dot.

Tiles are transposed, [hidden unit, batch row]: one dot W_rows [4*BLOCK_H, K] @ h^T [K, BLOCK_B] yields all four
gates, and `gate_rows` orders its rows so that a thread of the matrix unit ends up with the four gates of the same
unit in its registers. `split_gates` is then free, where the plain order needs a trip through shared memory.
The equations are in README.md.
"""

import triton
import triton.language as tl

from ..dispatch import interpreting

# the interpreter multiplies bf16 operands of a dot as raw integers, so they are widened there
INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def sigmoid(x):
    """Exact at both ends: exp overflows to inf for x << 0, and 1 / inf is 0."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """By sigmoid, which never divides inf by inf; near 0, where that cancels, by the polynomial of Cephes' tanhf."""
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    return tl.where(tl.abs(x) < 0.625, p * z * x + x, 2.0 * sigmoid(2.0 * x) - 1.0)


@triton.jit
def rounded(x, PRECISION: tl.constexpr):
    """Round an operand of a dot to the nearest TF32, where that is its precision.

    The matrix unit cuts off what TF32 does not keep. What is always too small adds up over a sequence: so the gradient
    of a bias had twice cuDNN's error. Backward one operand of two is enough, the one that leaves the more registers.
    """
    if PRECISION == "tf32" and not INTERPRETED:
        bits = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,f", [x], dtype=tl.int32, is_pure=True, pack=1)
        x = bits.to(tl.float32, bitcast=True)
    return x


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """Return a @ b, accumulated in float32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def dot_apart(a, b, PRECISION: tl.constexpr):
    """`dot`, for a sum over many chunks, which in full float32 loses fewer digits than one sum of all.

    What a dot is added to becomes its accumulator, as the compiler has it, but for one with this option, which means
    nothing where operands are not float8.
    """
    if PRECISION != "ieee" or a.dtype != tl.float32:
        return dot(a, b, PRECISION)
    return tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=1)


@triton.jit
def gate_rows(H: tl.constexpr, BLOCK_H: tl.constexpr, RUN: tl.constexpr = 8):
    """Return (gate, unit) of each of a tile's 4 * BLOCK_H rows, unit counted from the tile's first.

    Bits of the row index from the top: gate's high bit, unit's high bits, gate's low bit, unit's low bits. A run of
    RUN consecutive units is what an accumulator tile of the matrix unit spreads over lanes.
    """
    r = tl.arange(0, 4 * BLOCK_H)
    gate = r // (2 * BLOCK_H) * 2 + r // RUN % 2
    unit = r % (2 * BLOCK_H) // (2 * RUN) * RUN + r % RUN
    # lets loads and stores along a run be vectors, as long as rows of H elements are aligned to
    VECTOR: tl.constexpr = min(RUN, H & -H)
    unit = tl.max_contiguous(tl.multiple_of(unit, VECTOR), VECTOR)
    return gate, unit


@triton.jit
def split_gates(a, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, RUN: tl.constexpr = 8):
    """[4 * BLOCK_H, BLOCK_B] in the order of `gate_rows` -> i, f, g, o, each [BLOCK_H, BLOCK_B]."""
    a = tl.reshape(a, (2, BLOCK_H // RUN, 2, RUN, BLOCK_B))
    a = tl.reshape(tl.permute(a, (1, 3, 4, 0, 2)), (BLOCK_H, BLOCK_B, 2, 2))
    even, odd = tl.split(a)
    i, g = tl.split(even)
    f, o = tl.split(odd)
    return i, f, g, o


@triton.jit
def join_gates(i, f, g, o, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, RUN: tl.constexpr = 8):
    """Undo `split_gates`."""
    a = tl.join(tl.join(i, g), tl.join(f, o))
    a = tl.reshape(a, (BLOCK_H // RUN, RUN, BLOCK_B, 2, 2))
    return tl.reshape(tl.permute(a, (3, 0, 4, 1, 2)), (4 * BLOCK_H, BLOCK_B))


@triton.jit
def activate(a, gate):
    """Activate [4 * BLOCK_H, BLOCK_B] where it lies: tanh where `gate` (of each row) is 2, else sigmoid."""
    return tl.where((gate == 2)[:, None], tanh(a), sigmoid(a))


@triton.jit
def cell_forward(a, c, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr):
    """Pre-activations [4 * BLOCK_H, BLOCK_B] and c_{t-1} -> i, f, g, o, c_t, h_t, all in float32."""
    i, f, g, o = split_gates(a, BLOCK_H, BLOCK_B)
    i = sigmoid(i)
    f = sigmoid(f)
    g = tanh(g)
    o = sigmoid(o)
    c = f * c + i * g
    return i, f, g, o, c, o * tanh(c)


@triton.jit
def cell_backward(dh, dc, i, f, g, o, c_prev, c):
    """Adjoint of `cell_forward`: gradients of the four pre-activations and of c_{t-1}."""
    tanh_c = tanh(c)
    dc += dh * o * (1.0 - tanh_c * tanh_c)
    di = dc * g * i * (1.0 - i)
    df = dc * c_prev * f * (1.0 - f)
    dg = dc * i * (1.0 - g * g)
    do = dh * tanh_c * o * (1.0 - o)
    return di, df, dg, do, dc * f


@triton.jit
def first_row(t, B, offsets_ptr, VARLEN: tl.constexpr):
    """Return the row at which time t begins: t * B, or where a packed batch says. int64: N * D * 4H may pass 2^31."""
    return tl.load(offsets_ptr + t) if VARLEN else t.to(tl.int64) * B


@triton.jit
def load_gates(ptrs, mask, H: tl.constexpr):
    """Four tiles H apart: i, f, g, o, each of the shape of `ptrs`, 0 where masked."""
    i = tl.load(ptrs, mask=mask, other=0.0)
    f = tl.load(ptrs + H, mask=mask, other=0.0)
    g = tl.load(ptrs + 2 * H, mask=mask, other=0.0)
    o = tl.load(ptrs + 3 * H, mask=mask, other=0.0)
    return i, f, g, o


@triton.jit
def store_gates(ptrs, i, f, g, o, mask, H: tl.constexpr):
    """Undo `load_gates`, in the dtype of `ptrs`."""
    dtype = ptrs.dtype.element_ty
    tl.store(ptrs, i.to(dtype), mask=mask)
    tl.store(ptrs + H, f.to(dtype), mask=mask)
    tl.store(ptrs + 2 * H, g.to(dtype), mask=mask)
    tl.store(ptrs + 3 * H, o.to(dtype), mask=mask)
