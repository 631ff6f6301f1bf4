"""Timing the candidates: what is timed, when, once for whom, and that nothing of the caller's is disturbed.

No GPU is needed: a device is injected, and trials and the stopwatch too. test_trials.py has real ones.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from fastlstm import __main__ as command
from fastlstm import dispatch, functional, tuning
from fastlstm.dispatch import decide
from fastlstm.problem import Device, Problem
from fastlstm.timings import timings

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("may_time")

CPU = torch.device("cpu")
H100 = Device("cuda", "sm_90", "NVIDIA H100 80GB HBM3", 132)
BOTH = ("torch", "triton")
ALL = ("torch", "triton persistent-16", "triton stepwise-16")  # of `problem`
FOUND = (("triton persistent-16", 0.5), ("torch", 2.0), ("triton stepwise-16", 3.0))


def problem(**given) -> Problem:
    return Problem(**{"T": 100, "B": 16, "I": 64, "H": 512, "dtype": torch.bfloat16, **given})


def new_process(monkeypatch) -> None:
    """Forget what is in memory."""
    timings.cache_clear()
    monkeypatch.setattr(tuning, "_spent", 0.0)


class Trials:
    """A trial that counts what it is asked for, and a stopwatch that reads what it is told."""

    def __init__(self, monkeypatch):
        self.made: list[tuple[Problem, str]] = []
        self.milliseconds = dict(FOUND)
        self.backends = {}
        monkeypatch.setattr(tuning, "stopwatch", lambda on: lambda run: self.milliseconds[self.backends[run]])
        monkeypatch.setattr(tuning, "device_of", lambda on: H100)

    def __call__(self, problem: Problem, on: torch.device, backend: str) -> tuning.Run:
        def run():
            return [torch.zeros(1)]

        self.made.append((problem, backend))
        self.backends[run] = backend
        return run

    def times(self, problem: Problem, device: Device = H100, on: torch.device = CPU, **given) -> dispatch.Times:
        return tuning.times(problem, device, on, self, **given)


@pytest.fixture
def trials(monkeypatch) -> Trials:
    return Trials(monkeypatch)


def run_of(*values: float) -> tuning.Run:
    return lambda: [torch.tensor(values)]


def fail(*_):
    raise torch.OutOfMemoryError("out of memory")


# the competition itself


def test_the_best_round_counts_and_rounds_take_turns():
    asked = []

    def timer(run):
        asked.append(run()[0].item())
        return (3.0 if asked[-1] == 1.0 else 5.0) - 0.1 * len(asked)

    runs = {"torch": run_of(1.0), "triton": run_of(1.01)}
    found = tuning.tune(BOTH, runs.__getitem__, timer)
    assert len(asked) == 2 * tuning.ROUNDS
    assert asked[::2] == [asked[0]] * tuning.ROUNDS
    assert asked[1::2] == [asked[1]] * tuning.ROUNDS
    assert found == (("torch", pytest.approx(2.1)), ("triton", pytest.approx(4.0)))


def test_it_ends_when_it_has_taken_long_enough(monkeypatch):
    monkeypatch.setattr(tuning, "ENOUGH", 0.0)
    asked = []
    tuning.tune(("torch",), lambda _: run_of(1.0), lambda run: asked.append(run) or 1.0)
    assert len(asked) == 1


@pytest.mark.parametrize("when", ["made", "run", "timed"])
def test_a_candidate_that_raises_is_out(when, caplog):
    runs = {"torch": run_of(1.0), "triton": fail if when == "run" else run_of(1.0)}
    found = tuning.tune(
        BOTH,
        lambda backend: fail() if (when, backend) == ("made", "triton") else runs[backend],
        lambda run: fail() if run is runs["triton"] else 7.0,
    )
    assert found == (("torch", 7.0), ("triton", math.inf))
    assert "triton is out of the running: OutOfMemoryError: out of memory" in caplog.text
    assert decide(problem(), H100, times=found).backend == "torch"


def test_where_all_fail_the_rule_decides():
    found = tuning.tune(BOTH, fail, lambda run: 1.0)
    assert dict(found) == {"torch": math.inf, "triton": math.inf}
    assert decide(problem(H=64), H100, times=found).regime == "resident"
    assert decide(problem(H=64, dtype=torch.float16), H100, times=found).backend == "torch"


@pytest.mark.parametrize("wrong", [1.5, -2.0, math.nan, math.inf])
def test_a_candidate_that_disagrees_is_out(wrong):
    runs = {"torch": run_of(1.0, 2.0), "triton": run_of(1.0, wrong)}
    assert tuning.tune(BOTH, runs.__getitem__, lambda run: 1.0)[1] == ("triton", math.inf)
    runs["triton"] = run_of(1.02, 1.98)
    assert tuning.tune(BOTH, runs.__getitem__, lambda run: 1.0)[1] == ("triton", 1.0)


# once for each kind of call


def test_the_first_call_of_a_kind_times_and_later_ones_look_up(trials, monkeypatch):
    first = trials.times(problem())
    assert first == FOUND
    assert trials.made == [(problem(), backend) for backend in ALL]
    assert trials.times(problem()) == first
    new_process(monkeypatch)
    assert trials.times(problem()) == first
    assert tuning.known(problem(), H100) == first
    assert len(trials.made) == 3


def test_trials_of_long_sequences_are_short(trials):
    trials.times(problem(T=5000, runs=7))
    assert {made.T for made, _ in trials.made} == {tuning.LONGEST}
    assert tuning.known(problem(T=400, runs=3), H100)


@pytest.mark.parametrize(
    "changed",
    [{"T": 33}, {"T": 70_000}, {"B": 9, "T": 99}, {"tf32": False}, {"runs": 0}],
    ids=str,
)
def test_calls_of_one_kind(changed, trials):
    given = {"B": 15} if changed.get("B") else {}
    trials.times(problem(**given))
    assert trials.times(problem(**given | changed))
    assert len(trials.made) == 3


@pytest.mark.parametrize(
    "changed",
    [
        {"T": 32},
        {"T": 4},
        {"B": 17},
        {"B": 8},
        {"B": 15},  # no multiple of 8
        {"I": 65},
        {"H": 513},
        {"P": 64},
        {"L": 2},
        {"D": 2},
        {"dtype": torch.float16},
        {"training": True},
        {"runs": 3},
    ],
    ids=str,
)
def test_calls_of_another_kind(changed, trials):
    trials.times(problem())
    assert not tuning.known(problem(**changed), H100)
    assert trials.times(problem(**changed))
    assert len(trials.made) > 3


def test_tf32_is_another_kind_in_float32(trials):
    trials.times(problem(dtype=torch.float32))
    assert not tuning.known(problem(dtype=torch.float32, tf32=False), H100)


def test_another_card_or_version_is_another_kind(trials, monkeypatch):
    trials.times(problem())
    for device in (
        dataclasses.replace(H100, processors=66),
        dataclasses.replace(H100, name="NVIDIA H200"),
        Device("cuda", "sm_80", "NVIDIA A100", 108),
    ):
        assert not tuning.known(problem(), device)
    tuning.key.cache_clear()
    monkeypatch.setattr(tuning, "_versions", lambda: "torch 2.14")
    assert not tuning.known(problem(), H100)
    tuning.key.cache_clear()


def test_a_key_names_all_versions():
    text = tuning.key(problem(), H100)
    for part in ("fastlstm", "torch", "triton", "cuda", "cudnn", "driver", "sm_90", "132 processors"):
        assert part in text


# when nothing is timed


def test_what_has_one_candidate_is_not_timed(trials):
    for given in ({"dtype": torch.float64}, {"B": 0}):
        assert trials.times(problem(**given)) == ()
    for device in (Device("cpu", "cpu"), Device("mps", "mps"), Device("cuda", "sm_75", "Tesla T4", 40)):
        assert trials.times(problem(), device) == ()
    assert not trials.made


def test_without_triton_nothing_is_imported(trials, monkeypatch):
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    monkeypatch.setattr(tuning, "_versions", fail)
    tuning.key.cache_clear()
    assert trials.times(problem()) == ()


@pytest.mark.parametrize("value", ["0", "false", "OFF"])
def test_turned_off_by_the_environment(value, trials, monkeypatch):
    trials.times(problem())
    monkeypatch.setenv("FASTLSTM_AUTOTUNE", value)
    assert trials.times(problem(H=1024)) == ()
    assert len(trials.made) == 3
    assert trials.times(problem()) == FOUND  # what is known counts
    assert trials.times(problem(H=1024), asked=True)


def test_the_budget(trials, monkeypatch):
    monkeypatch.setenv("FASTLSTM_AUTOTUNE_MS", "0")
    assert trials.times(problem()) == ()
    monkeypatch.setenv("FASTLSTM_AUTOTUNE_MS", "1e-6")
    assert trials.times(problem())  # what was begun is finished
    assert trials.times(problem(H=1024)) == ()
    assert "has spent its 1e-06 ms" in tuning.obstacle()
    monkeypatch.setenv("FASTLSTM_AUTOTUNE_MS", "nan")
    assert "has spent its nan ms" in tuning.obstacle()
    monkeypatch.setenv("FASTLSTM_AUTOTUNE_MS", "2s")
    with pytest.raises(ValueError, match="FASTLSTM_AUTOTUNE_MS must be a number of milliseconds, got '2s'"):
        trials.times(problem(H=1024))


@pytest.mark.parametrize("mode", ["torch", "cudnn"])
def test_in_deterministic_mode_not_even_what_is_known_counts(mode, trials, monkeypatch):
    trials.times(problem())
    if mode == "torch":
        torch.use_deterministic_algorithms(True)  # conftest's fixture turns it off
    else:
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    assert trials.times(problem()) == tuning.known(problem(), H100) == ()
    assert trials.times(problem(H=1024), asked=True) == ()
    assert len(trials.made) == 3


def test_while_a_graph_is_captured(trials, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert trials.times(problem(), on=torch.device("cuda"), asked=True) == ()


def test_while_cudnn_is_off(trials, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    assert trials.times(problem()) == ()


def test_while_another_thread_times(trials):
    with tuning._timing:
        assert trials.times(problem()) == ()
    assert trials.times(problem())


def test_a_failure_counts_in_this_process_only(trials, monkeypatch):
    del trials.milliseconds["triton persistent-16"]  # so the stopwatch raises
    failed = (("torch", 2.0), ("triton stepwise-16", 3.0), ("triton persistent-16", math.inf))
    assert trials.times(problem()) == failed
    assert trials.times(problem()) == failed
    assert len(trials.made) == 3
    new_process(monkeypatch)
    trials.milliseconds = dict(FOUND)
    assert trials.times(problem()) == FOUND


def test_a_card_that_turns_out_smaller_is_timed_again(trials, monkeypatch):
    smaller = dataclasses.replace(H100, processors=40)
    monkeypatch.setattr(tuning, "device_of", lambda on: smaller)
    assert trials.times(problem()) == ()
    assert not timings().entries
    assert trials.times(problem(), smaller)


# the command line


def test_tune_ahead(trials, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(command, "device_of", lambda on: H100)
    monkeypatch.setattr(functional, "trial", trials)
    monkeypatch.setattr(tuning, "_aside", lambda on, work: work())
    monkeypatch.setattr(tuning, "capturing", lambda on: False)
    monkeypatch.setenv("FASTLSTM_AUTOTUNE", "0")
    arguments = ["tune", "--shapes", "100,16,64,512", "4,8,32,32,2,2", "--dtype", "bfloat16", "float16"]
    assert command.main(arguments) is None
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 2 * 2
    assert lines[0].startswith("triton (persistent) on NVIDIA H100")
    assert "triton persistent-16 0.5 ms, torch 2 ms" in lines[0]
    assert tuning.known(problem(T=60), H100)
    assert len(timings().entries) == 8
    assert command.main([*arguments[:3], "--dtype", "float32", "--training"]) is None
    assert len(timings().entries) == 9

    assert command.main(["tune", "--clear"]) is None
    assert not timings().entries
    assert not timings().path.exists()


def test_tune_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "There is no GPU here" in (command.main(["tune"]) or "")
    assert command.main(["tune", "--clear"]) is None


@pytest.mark.parametrize("shape", ["1,2,3", "1,2,3,4,5,6,7", "1,2,3,x", "0,1,1,1", "1,1,1,1,1,3", ""])
def test_tune_refuses_a_shape_that_is_none(shape, capsys):
    with pytest.raises(SystemExit) as exit:
        command.main(["tune", "--shapes", shape])
    assert exit.value.code == 2
    assert f"got {shape!r}" in capsys.readouterr().err
