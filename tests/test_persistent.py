"""The persistent kernels with all their programs at once: right, race-free, and each fault of the barrier is seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from barriers import MUTANTS, WAITS_FOR_TOO_MANY, replaced
from recurrence import FORWARD, Run
from scheduler import HangError, scheduled
from shadow_memory import RaceError

from fastlstm.dispatch import interpreting
from fastlstm.kernels import backward_persistent, forward_persistent, launch
from fastlstm.plans import Plan

pytestmark = pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")

CPU = torch.device("cpu")
# small enough for the interpreter
PLAN = Plan("persistent", BLOCK_H=8, BLOCK_B=4, BLOCK_K=16, num_warps=1, TAIL_K=16, KEPT=2, AHEAD=1)


def plan_for(H: int, **changes: int) -> Plan:
    """PLAN with changes; a W_hh of more than KEPT chunks and a tail is read again each step (here from H = 49 on)."""
    plan = dataclasses.replace(PLAN, **changes)
    KEPT = min(plan.KEPT, (H - 1) // plan.BLOCK_K)
    regime = "persistent" if H - KEPT * plan.BLOCK_K <= plan.TAIL_K else "streaming"
    return dataclasses.replace(plan, regime=regime, KEPT=KEPT)


def run_all(run: Run, seed: int = 0, **changes: int) -> dict[str, Tensor]:
    """Run forward and backward, all programs at once in an order drawn from `seed`."""
    with scheduled(seed=seed):
        return run.by_kernels(plan_for(run.c0.shape[2], **changes), CPU)


def check(run: Run, **changes: int) -> None:
    with scheduled():
        run.check(plan_for(run.c0.shape[2], **changes), CPU)


# rows of one tile and of two, in falling length
LENGTHS = (5, 4, 4, 2, 1, 1)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(("H", "B", "D"), [(9, 2, 1), (16, 6, 2), (40, 3, 2), (64, 2, 1)], ids=lambda value: str(value))
def test_against_float64(H, B, D, packed):
    """From 2 to 8 programs in a group, from 1 to 4 groups."""
    check(Run(H, LENGTHS[:B], torch.float32, D, packed=packed))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits(dtype):
    check(Run(33, LENGTHS, dtype, D=2, packed=True))


@pytest.mark.parametrize("scale", [1e-4, 0.2])
def test_small_numbers_keep_their_digits(scale):
    with scheduled():
        Run(33, LENGTHS[:2], torch.float32).check_digits(scale, plan_for(33), CPU)


def test_more_parts_than_a_tile_holds():
    """With 17 programs, dh is added up from two tiles of parts."""
    check(Run(136, LENGTHS[:2], torch.float32, D=1, packed=True), BLOCK_K=64, TAIL_K=64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_split_as_on_a_gpu(dtype):
    """Each of two warps loads h by vectors of 16 bytes, more than one from a chunk, for more than eight rows."""
    lengths = (3, 2, 2, 2, 2, 1, 1, 1, 1, 1)
    layout = {"BLOCK_H": 16, "BLOCK_B": 16, "BLOCK_K": 128, "TAIL_K": 16, "SPLIT": 2}
    for H in (140, 180):  # of the second W_hh is streamed
        check(Run(H, lengths, dtype, D=1, packed=True), **layout)


def test_projection():
    check(Run(24, LENGTHS[:3], torch.float32, D=2, P=5, packed=True))


@pytest.mark.parametrize(
    "layout",
    [
        {"KEPT": 0},
        {"KEPT": 1, "AHEAD": 2},
        {"TAIL_K": 8, "AHEAD": 2},
        {"SPLIT": 2},
        {"KEPT": 1, "SPLIT": 2},
        {"BLOCK_H": 16, "BLOCK_B": 2},
    ],
    ids=["streamed", "some kept", "small tail", "split", "split and streamed", "blocks"],
)
def test_other_layouts(layout):
    check(Run(40, LENGTHS[:3], torch.float32, D=1, packed=True), **layout)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_what_is_not_on_the_chip_at_once_follows_in_further_launches(packed):
    """Two tiles of rows in two directions; the buffers of one launch serve the next."""
    run = Run(16, LENGTHS, torch.float32, D=2, packed=packed)
    expected = run_all(run)
    for groups, grids in ((1, [1, 1, 1, 1]), (3, [3, 1]), (9, [4])):
        plan = plan_for(16, groups=groups)
        assert [grid for grid, _ in launch.meetings(plan, run.c0)] == [(2, at_once) for at_once in grids]
        for name, tensor in run_all(run, groups=groups).items():
            assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_result_depends_neither_on_interleaving_nor_on_save(packed):
    run = Run(24, LENGTHS[:3], torch.float16, D=2, packed=packed)
    first, other = run_all(run, seed=1), run_all(run, seed=2)
    for name, tensor in first.items():
        assert torch.equal(tensor, other[name]), name
    inputs, _ = run.to(CPU)
    with scheduled(seed=3):
        results = launch.lstm_forward(*inputs, run.batch_sizes, False, plan_for(24))  # pyright: ignore
    for name, tensor in zip(FORWARD[:3], results, strict=False):
        assert torch.equal(tensor, first[name]), name


def under_seeds(run: Run, seeds: Iterable[int]) -> None:
    for seed in seeds:
        run_all(run, seed)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("module", [forward_persistent, backward_persistent], ids=["forward", "backward"])
def test_every_mutant_is_a_race(module, mutant, packed):
    """Two programs in each of two groups, and eight in one, which stream. By chance every program may be in time."""
    for H, D in ((16, 2), (64, 1)):
        run = Run(H, (4, 3, 2), torch.float32, D, packed=packed)
        with replaced(module, MUTANTS[mutant]), pytest.raises(RaceError, match=r"(exchange|partials|counters)_ptr\["):
            under_seeds(run, range(4))


@pytest.mark.parametrize("module", [forward_persistent, backward_persistent], ids=["forward", "backward"])
def test_waiting_for_too_many_hangs(module):
    with replaced(module, WAITS_FOR_TOO_MANY), pytest.raises(HangError, match="counters_ptr"):
        run_all(Run(16, LENGTHS[:3], torch.float32, D=1))
