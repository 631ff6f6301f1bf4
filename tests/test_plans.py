"""Layouts of the kernels for a table of devices, none of which is needed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from devices import GPUS

from fastlstm.plans import Plan, candidates, choose, every_plan
from fastlstm.problem import Problem

LARGEST_RESIDENT = {  # H in 16 bit, H in float32
    "RTX 3090": (64, 64),
    "A100": (128, 64),
    "L4": (64, 64),
    "RTX 4090": (64, 64),
    "H100": (128, 64),
    "H200": (128, 64),
    "B200": (128, 64),
    "RTX 5090": (64, 64),
    "MI300X": (64, 64),
    "RX 7900 XTX": (64, 32),
}
LARGEST_RESIDENT_BACKWARD = {**LARGEST_RESIDENT, "RX 7900 XTX": (32, 32)}


def problem(**given) -> Problem:
    return Problem(**{"T": 100, "B": 16, "I": 64, "H": 64, **given})


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("gpu", GPUS)
def test_resident_as_far_as_it_fits(gpu, backward):
    largest_resident = (LARGEST_RESIDENT_BACKWARD if backward else LARGEST_RESIDENT)[gpu]
    for dtype, largest in zip((torch.bfloat16, torch.float32), largest_resident, strict=True):
        for H in (1, 16, 17, 32, 33, 64, 65, 100, 128, 129, 1024):
            plan = choose(problem(H=H, dtype=dtype), GPUS[gpu], backward)
            assert (plan.regime == "resident") == (largest >= H), (H, dtype)
            if plan.regime == "resident":
                assert max(H, 16) <= plan.BLOCK_H < 2 * max(H, 16)


def test_rows_that_are_not_aligned_have_registers():
    """As found by compiling: more warps, or another regime, where addresses of single numbers would spill."""

    def plan(H: int, backward: bool = False, **given) -> Plan:
        return next(
            plan
            for plan in candidates(problem(H=H, **{"dtype": torch.bfloat16, **given}), GPUS["H100"], backward)
            if H < 128 or plan.regime == "stepwise"
        )

    assert [plan(H).num_warps for H in (100, 113, 114, 120, 126)] == [16, 16, 8, 16, 8]
    on_a100 = [choose(problem(H=H, dtype=torch.bfloat16), GPUS["A100"]).num_warps for H in (62, 66, 108, 109, 110)]
    assert on_a100 == [8, 8, 16, 16, 8]
    assert {plan(H, backward).regime for H in (115, 127) for backward in (False, True)} == {"persistent"}
    assert plan(113, backward=True).regime == plan(126, backward=True).regime == "resident"
    full = {"dtype": torch.float32, "tf32": False}
    assert [plan(H, **full).num_warps for H in (15, 16, 31, 32, 63, 64)] == [8, 4, 8, 4, 16, 8]
    assert [plan(H, True, **full).num_warps for H in (15, 31, 32, 63)] == [2, 8, 4, 4]
    assert [plan(H, dtype=torch.float32).num_warps for H in (31, 63)] == [4, 8]
    assert [plan(H, True, dtype=torch.float32).num_warps for H in (15, 31, 32, 63)] == [2, 8, 4, 4]
    stepwise = (plan(1001, B=64), plan(1001, B=17), plan(1000, B=64), plan(1001), plan(1001, True, B=64))
    assert [wide.num_warps for wide in stepwise] == [8, 8, 4, 4, 4]
    assert [plan(H, B=64, **full).BLOCK_B for H in (1001, 1000)] == [32, 64]


@pytest.mark.parametrize(
    ("gpu", "dtype", "resident", "stepwise"),
    [
        ("MI300X", torch.float16, [(16, 4), (16, 4)], [(16, 4), (32, 8), (32, 4), (32, 4)]),
        ("MI300X", torch.float32, [(16, 4), (16, 4)], [(16, 4), (32, 8), (32, 4), (32, 4)]),
        ("RX 7900 XTX", torch.float16, [(16, 8), (16, 16)], [(16, 4), (32, 4), (32, 4), (32, 4)]),
        ("RX 7900 XTX", torch.float32, [(16, 16), (16, 16)], [(16, 8), (32, 8), (32, 8), (32, 8)]),
    ],
    ids=str,
)
def test_rows_and_warps_on_amd(gpu, dtype, resident, stepwise):
    """As found by compiling; in each, (BLOCK_B, num_warps)."""

    def plan(H: int, B: int, backward: bool) -> Plan:
        return candidates(problem(H=H, B=B, dtype=dtype), GPUS[gpu], backward)[-1]

    for H in (31, 32):
        plans = [plan(H, 16, backward) for backward in (False, True)]
        assert [(found.BLOCK_B, found.num_warps) for found in plans] == resident
    plans = [plan(2049, 16, False), plan(2049, 17, False), plan(2056, 64, False), plan(2049, 64, True)]
    assert {found.num_stages for found in plans} == {2}
    assert [(found.BLOCK_B, found.num_warps) for found in plans] == stepwise


@pytest.mark.parametrize("gpu", GPUS)
def test_plans_enumerates_what_choose_returns(gpu):
    device = GPUS[gpu]
    for dtype, tf32 in ((torch.float16, True), (torch.bfloat16, True), (torch.float32, True), (torch.float32, False)):
        enumerated = {(backward, plan) for _, backward, plan in every_plan(dtype, device.target, tf32)}
        chosen = {
            (backward, dataclasses.replace(plan, groups=0))
            for H in (*range(1, 130), *range(130, 1600, 35), 512, 1024, 1536, 4096)
            for B in (1, 16, 17, 1000)
            for L, D in ((1, 1), (1, 2), (2, 1))
            for backward in (False, True)
            for plan in candidates(problem(H=H, B=B, L=L, D=D, dtype=dtype, tf32=tf32), device, backward)
        }
        assert chosen <= enumerated
        # only those persistent plans whose programs this very card can hold
        assert all(plan.kernel == "persistent" for _, plan in enumerated - chosen)


def test_plans_enumerates_every_alignment_of_rows():
    served = {min(H & -H, 8) for H, _, plan in every_plan(torch.float16, "sm_90") if plan.regime == "persistent"}
    assert served == {1, 2, 4, 8}


def columns(plan: Plan, H: int) -> int:
    """How many columns of W_hh the chunks of a plan cover."""
    kept = plan.KEPT * plan.BLOCK_K
    return kept + -(-(H - kept) // plan.TAIL_K) * plan.TAIL_K


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("gpu", GPUS)
def test_programs_that_meet_are_on_the_chip_at_once(gpu, backward):
    device = GPUS[gpu]
    for H in (256, 300, 512, 768, 1024, 1500, 1700, 2048, 4096):
        for B in (1, 16, 17, 64, 128, 1000):
            for dtype in (torch.bfloat16, torch.float32):
                for plan in candidates(problem(H=H, B=B, D=2, dtype=dtype), device, backward):
                    if plan.kernel != "persistent":
                        continue
                    assert plan.groups >= 1
                    assert device.processors >= -(-H // plan.BLOCK_H) * plan.groups
                    assert plan.KEPT * plan.BLOCK_K < H <= columns(plan, H) < 2 * H
                    if plan.regime == "persistent":
                        assert columns(plan, H) == plan.KEPT * plan.BLOCK_K + plan.TAIL_K


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("gpu", GPUS)
def test_what_keeps_programs_from_meeting(gpu, backward):
    device = GPUS[gpu]
    regime = "stepwise" if gpu == "RX 7900 XTX" else "persistent"
    assert choose(problem(H=512, dtype=torch.float16), device, backward).regime == regime
    # a share of the card too small for one group
    share = dataclasses.replace(device, processors=15)
    plans = candidates(problem(H=512, dtype=torch.float16), share, backward)
    assert [plan.regime for plan in plans] == ["stepwise"]
    if device.kind == "cuda":  # no matrix instructions
        plan = choose(problem(H=512, tf32=False), device, backward)
        assert plan.regime == "stepwise"


def test_what_does_not_fit_the_chip_streams():
    for H, regime in ((1536, "persistent"), (1537, "streaming"), (2048, "streaming"), (2049, "stepwise")):
        for backward in (False, True):
            assert choose(problem(H=H, dtype=torch.float16), GPUS["H100"], backward).regime == regime
    # an A100 has fewer multiprocessors than H = 2048 has programs
    assert choose(problem(H=2048, dtype=torch.float16), GPUS["A100"]).regime == "stepwise"


def test_more_rows_take_wider_tiles_then_more_launches_then_steps():
    def plans(B: int) -> list[tuple[str, int]]:
        found = candidates(problem(H=1024, B=B, dtype=torch.float16), GPUS["H100"])
        return [(plan.regime, plan.BLOCK_B) for plan in found]

    # two groups of 64 programs at once
    assert plans(16) == [("persistent", 16), ("stepwise", 16)]
    assert plans(32) == [("persistent", 16), ("persistent", 32), ("stepwise", 64)]
    assert plans(128) == [("persistent", 32), ("persistent", 16), ("stepwise", 64)]
    assert plans(1024) == [("stepwise", 64), ("persistent", 32), ("persistent", 16)]


def test_odd_sizes_do_not_pay_for_the_next_power_of_two():
    # (H, columns forward, columns backward): backward one chunk of up to 1024 is faster than two
    for H, *most in ((650, 768, 1024), (768, 768, 1024), (1100, 1152, 1152), (1500, 1536, 1536), (1600, 1792, 1792)):
        for backward in (False, True):
            plan = choose(problem(H=H, dtype=torch.float16), GPUS["H100"], backward)
            assert most[backward] >= columns(plan, H)


def test_kin_have_the_same_plans():
    kin = {"sm_87": "sm_80", "sm_89": "sm_86", "sm_103": "sm_100", "sm_121": "sm_120", "gfx1201": "gfx1100"}
    for target, other in kin.items():
        for dtype in (torch.float16, torch.float32):
            plans = [*every_plan(dtype, target)]
            assert plans == [*every_plan(dtype, other)]
            regimes = {"resident", "persistent", "stepwise"} - ({"persistent"} if other == "gfx1100" else set())
            assert regimes <= {plan.regime for _, _, plan in plans}


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("given", "groups"),
    [
        ({}, 4),
        ({"B": 32}, 4),
        ({"B": 33}, 0),  # one layer after the other holds all rows at once
        ({"L": 4}, 4),
        ({"L": 4, "B": 32}, 4),  # two launches, of all layers each
        ({"L": 3}, 3),
        ({"L": 5}, 0),
        ({"H": 768}, 2),
        ({"H": 769}, 0),  # W_ih and W_hh do not fit
        ({"H": 128}, 0),  # resident
        ({"H": 512, "dtype": torch.float32}, 2),
        ({"L": 1}, 0),
        ({"D": 2}, 0),
        ({"P": 64}, 0),
        ({"apart": True}, 0),
    ],
    ids=str,
)
def test_layers_run_together_where_it_should_pay(given, groups, backward):
    plans = candidates(problem(**{"H": 512, "L": 2, "dtype": torch.float16, **given}), GPUS["H100"], backward)
    assert ([plan.groups for plan in plans if plan.regime == "wavefront"] or [0]) == [groups]
    assert (plans[0].regime == "wavefront") == (groups > 0)
    assert len({plan.name for plan in plans}) == len(plans)


def test_length_never_matters_to_a_plan():
    for T in (1, 16, 1000, 70_000):
        assert choose(problem(T=T), GPUS["H100"]) == choose(problem(), GPUS["H100"])
