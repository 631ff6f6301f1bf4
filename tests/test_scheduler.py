"""The scheduler reports every fault that was put there, and nothing where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import barriers
import triton
import triton.language as tl
from scheduler import HangError, launch, scheduled
from shadow_memory import BoundsError, RaceError
from triton.runtime import interpreter

from fastlstm.dispatch import interpreting

pytestmark = pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")

SEEDS = range(4)


def exchange(N: int, groups: int, T: int = 6, BLOCK: int = 16, seed: int = 0) -> None:
    """Run barriers.exchange and compare with what it computes."""
    result = torch.empty(groups, N, BLOCK, dtype=torch.int32)
    launch(
        barriers.exchange,
        (N, groups),
        seed=seed,
        values_ptr=torch.empty(2, groups, N, BLOCK, dtype=torch.int32),
        counters_ptr=torch.zeros(groups, dtype=torch.int32),
        result_ptr=result,
        T=T,
        BLOCK=BLOCK,
        N=triton.next_power_of_2(N),
    )
    n = torch.arange(N)[:, None]
    x = n + torch.arange(BLOCK)
    for _ in range(T):
        x = (x.sum(0, keepdim=True) + n) % 997
    assert torch.equal(result, x.int().expand(groups, N, BLOCK))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("N", "groups"), [(2, 1), (4, 2), (8, 1)])
def test_right_protocol_passes(N, groups, seed):
    exchange(N, groups, seed=seed)


@pytest.mark.parametrize("N", [2, 8])
@pytest.mark.parametrize("mutant", barriers.MUTANTS)
def test_every_mutant_is_a_race_under_every_seed(mutant, N):
    for seed in SEEDS:
        with barriers.replaced(barriers, barriers.MUTANTS[mutant]), pytest.raises(RaceError, match=r"_ptr\[\d+\]"):
            exchange(N, groups=1, seed=seed)


def test_waiting_for_too_many_hangs():
    with (
        barriers.replaced(barriers, barriers.WAITS_FOR_TOO_MANY),
        pytest.raises(HangError, match=r"program \(0, 0, 0\) for counters_ptr\[0\] of 1; program \(1, 0, 0\)"),
    ):
        exchange(N=2, groups=1)


def test_a_mutant_must_change_something():
    with pytest.raises(LookupError, match="does not use arrive"), barriers.replaced(interpreter, {"arrive": None}):
        pass


@triton.jit
def forever(counter_ptr):
    while tl.atomic_add(counter_ptr, 1) >= 0:
        pass


def test_busy_without_end_hangs():
    with pytest.raises(HangError, match="not done after 200 memory operations"):
        launch(forever, (2,), counter_ptr=torch.zeros(1, dtype=torch.int32), limit=200)


@triton.jit
def shift(x_ptr, y_ptr, n, read_from, write_to, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    tl.store(y_ptr + write_to + offs, tl.load(x_ptr + read_from + offs, mask=mask, other=0), mask=mask)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_masked_access_inside_passes(dtype):
    x = torch.arange(21).to(dtype)
    y = torch.zeros(21, dtype=dtype)
    launch(shift, (2,), x_ptr=x, y_ptr=y[1:], n=20, read_from=1, write_to=0, BLOCK=16, num_warps=1)
    assert torch.equal(y[1:], x[1:])
    assert y[0] == 0


@pytest.mark.parametrize(
    ("read_from", "write_to", "message"),
    [
        (1, 0, r"load of x_ptr\[20\] of 20 by program \(1, 0, 0\)"),
        (-1, 0, r"load of x_ptr\[-1\] of 20 by program \(0, 0, 0\)"),
        (0, 1, r"store of y_ptr\[20\] of 20 by program \(1, 0, 0\)"),
        (0, -1, r"store of y_ptr\[-1\] of 20 by program \(0, 0, 0\)"),
        (1 << 40, 0, "load of address 0x"),
    ],
)
def test_out_of_bounds(read_from, write_to, message):
    # both lie inside larger storages, where a wrong index would go unseen
    x, y = torch.arange(40.0)[10:30], torch.zeros(40)[10:30]
    with pytest.raises(BoundsError, match=message):
        launch(shift, (2,), x_ptr=x, y_ptr=y, n=20, read_from=read_from, write_to=write_to, BLOCK=16)
    assert not y.any(), "a failed launch must not write"


def test_empty_tensor_has_no_inside():
    with pytest.raises(BoundsError, match=r"load of x_ptr\[0\] of 0"):
        launch(shift, (1,), x_ptr=torch.empty(0), y_ptr=torch.zeros(4), n=4, read_from=0, write_to=0, BLOCK=4)


@triton.jit
def store_id(x_ptr, stride, unused_ptr):
    program = tl.program_id(0) + tl.num_programs(0) * tl.program_id(1) + 6 * tl.program_id(2)
    if unused_ptr is None:
        tl.store(x_ptr + program * stride, program)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int64])
def test_programs_that_share_no_element_do_not_race(dtype):
    x = torch.zeros(12, dtype=dtype)
    launch(store_id, (2, 3, 2), x_ptr=x, stride=1, unused_ptr=None)
    assert torch.equal(x, torch.arange(12, dtype=dtype))


def test_two_plain_stores_race():
    with pytest.raises(RaceError, match=r"store of x_ptr\[0\] of 12 by .* not ordered after the store by"):
        launch(store_id, (2, 3, 2), x_ptr=torch.zeros(12), stride=0, unused_ptr=None)


def test_race_through_two_views_of_one_storage():
    x = torch.zeros(20)
    # program 1 writes what program 0 reads
    with pytest.raises(RaceError):
        launch(shift, (2,), x_ptr=x[4:], y_ptr=x[:16], n=16, read_from=0, write_to=0, BLOCK=8)
    launch(shift, (2,), x_ptr=x[:8], y_ptr=x[8:16], n=8, read_from=0, write_to=0, BLOCK=4)


@triton.jit
def take_tickets(counter_ptr, order_ptr):
    tl.store(order_ptr + tl.program_id(0), tl.atomic_add(counter_ptr, 1, sem="relaxed"))


def tickets(seed: int) -> tuple[int, ...]:
    order = torch.empty(6, dtype=torch.int32)
    launch(take_tickets, (6,), seed=seed, counter_ptr=torch.zeros(1, dtype=torch.int32), order_ptr=order)
    return tuple(order.tolist())


def test_seed_decides_the_interleaving():
    assert sorted(tickets(0)) == list(range(6)), "atomics are atomic, and do not race with one another"
    assert tickets(1) == tickets(1)
    assert len({tickets(seed) for seed in range(8)}) > 4


@triton.jit
def signal(flag_ptr):
    if tl.program_id(0) == 0:
        # its own plain store, and its own atomic
        tl.store(flag_ptr + 1, 0)
        tl.atomic_add(flag_ptr + 1, 1)
        tl.atomic_add(flag_ptr, 1, sem="relaxed")
    else:
        while tl.load(flag_ptr, volatile=True) == 0:
            pass


@pytest.mark.parametrize("seed", SEEDS)
def test_volatile_poll_of_an_atomic_is_no_race_by_itself(seed):
    flag = torch.zeros(2, dtype=torch.int32)
    launch(signal, (3,), seed=seed, flag_ptr=flag)
    assert flag.tolist() == [1, 1]


@triton.jit
def compare_and_swap(x_ptr):
    tl.atomic_cas(x_ptr, 0, 1)


def test_other_atomics_are_refused():
    with pytest.raises(NotImplementedError):
        launch(compare_and_swap, (1,), x_ptr=torch.zeros(1, dtype=torch.int32))


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="shift has no argument length"):
        launch(shift, (1,), length=3)
    with pytest.raises(TypeError, match=r"expected a @triton\.jit function"):
        launch(print, (1,))
    with pytest.raises(TypeError, match="x_ptr must be on the CPU, not on meta"):
        launch(store_id, (1,), x_ptr=torch.zeros(1, device="meta"), stride=0, unused_ptr=None)


def test_interpreter_is_left_as_found():
    places = (tl, tl.core, tl.tensor, tl.math, tl.dtype, interpreter)
    before = [dict(vars(place)) for place in places], dict(vars(interpreter.interpreter_builder))
    exchange(N=2, groups=1)
    with pytest.raises(RaceError):
        launch(store_id, (2,), x_ptr=torch.zeros(1), stride=0, unused_ptr=None)
    assert before == ([dict(vars(place)) for place in places], dict(vars(interpreter.interpreter_builder)))


def test_launches_inside_scheduled_are_checked():
    x, y = torch.zeros(8), torch.zeros(8)
    with scheduled(seed=1):
        sizes: dict[str, Any] = {"BLOCK": 4}
        shift[lambda meta: (triton.cdiv(8, meta["BLOCK"]),)](x, y, 8, 0, write_to=0, **sizes)
        with pytest.raises(RaceError):
            store_id[(2,)](x_ptr=x, stride=0, unused_ptr=None)
    store_id[(2,)](x_ptr=x, stride=0, unused_ptr=None)
    assert x[0] == 1, "after it, programs run one after another again"
