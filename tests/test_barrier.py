"""The barrier as compiled: a release before each arrive, an acquire after each poll, the whole program behind both."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent

# what orders nothing, or not enough, and what is then found in the machine code
FAULTS = {
    "no barrier": {"no arrive", "no poll"},
    "relaxed arrive": {"arrive without release"},
    "no acquire": {"poll without acquire"},
    "volatile poll": {"no poll", "poll without acquire"},
    "cta scope": {"arrive without release", "poll without acquire"},
    "no block barrier before the arrive": {"arrive without block barrier"},
    "stores of other waves under way": {"arrive without the stores of other waves"},  # AMD
}


def events_nvidia(ptx: str) -> list[tuple[str, bool]]:
    """Return (kind, whether it orders memory between programs) of the PTX instructions that matter, as they stand."""
    kinds = (
        ("barrier", r"bar(rier)?\.sync"),
        ("poll", r"ld\.\S*(acquire|relaxed|volatile)|atom\.\S*acquire"),
        ("arrive", r"(atom|red)\."),
        ("load", r"ld\.global"),
        ("store", r"st\.global"),
    )
    # "@%p3 atom.global.gpu.release.add.u32 ..." or, without a predicate, "bar.sync 0;"
    instructions = re.findall(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.]+)\s", ptx, re.MULTILINE)
    events = []
    for instruction in instructions:
        kind = next((kind for kind, pattern in kinds if re.match(pattern, instruction)), None)
        semantics = {"arrive": r"\.(release|acq_rel)\b", "poll": r"\.(acquire|acq_rel)\b"}.get(kind or "", "")
        if kind is not None:
            wide = re.search(r"\.(gpu|sys)\b", instruction) is not None
            events.append((kind, wide and re.search(semantics, instruction) is not None))
    return events


def events_amd(assembly: str) -> list[tuple[str, bool]]:
    """The same of gfx9 assembly: sc1 reaches all of the GPU; wbl2 writes L2 back, inv empties L1 and, of several, L2.

    vmcnt(0) waits until the stores, too, of a wave have landed in the L2. Sequences: LLVM's user guide for the AMDGPU
    backend, "Memory Model GFX942".
    """
    kinds = (
        ("barrier", r"s_barrier"),
        ("landed", r"s_waitcnt .*\bvmcnt\(0\)"),
        ("poll", r"global_(load|atomic)\w* .*\bsc[01]"),
        ("arrive", r"global_atomic"),
        ("load", r"(global|buffer)_load"),
        ("store", r"(global|buffer)_store"),
    )
    instructions = [line.strip() for line in re.findall(r"^(\.LBB\w+:|\s+[a-z][^;\n]*)", assembly, re.MULTILINE)]
    found = [next((kind for kind, pattern in kinds if re.match(pattern, line)), None) for line in instructions]
    events = []
    for n, kind in enumerate(found):
        around = {"arrive": instructions[n - 2 : n], "poll": instructions[n + 1 : n + 3]}.get(kind or "")
        release, acquire = ["buffer_wbl2 sc1", "s_waitcnt vmcnt(0)"], ["s_waitcnt vmcnt(0)", "buffer_inv sc1"]
        if kind is not None:
            events.append((kind, around == (release if kind == "arrive" else acquire)))
        if kind == "poll" and (jump := re.match(r"s_branch (\S+)", instructions[n + 3])):
            # what stands after a jump is not what comes next
            ahead = found[instructions.index(f"{jump[1]}:") :]
            events.append((next(kind for kind in ahead if kind in ("barrier", "load", "store")), False))
    return events


def faults(text: str) -> set[str]:
    """Return what a kernel's machine code lacks to be ordered by its barrier."""
    events = (events_amd if "amdgcn" in text else events_nvidia)(text)
    found = {f"no {kind}" for kind in ("arrive", "poll") if kind not in dict(events)}
    for n, (kind, ordered) in enumerate(events):
        if kind == "arrive":
            if not ordered:
                found.add("arrive without release")
            before = (earlier for earlier, _ in reversed(events[:n]) if earlier in ("barrier", "store"))
            if next(before, "barrier") != "barrier":
                found.add("arrive without block barrier")
            elif "amdgcn" in text:  # each wave has to see its own stores into the L2 before the block barrier
                barrier = max((m for m, (earlier, _) in enumerate(events[:n]) if earlier == "barrier"), default=0)
                before = (earlier for earlier, _ in reversed(events[:barrier]) if earlier in ("landed", "store"))
                if next(before, "store") != "landed":
                    found.add("arrive without the stores of other waves")
        if kind == "poll":
            if not ordered:
                found.add("poll without acquire")
            after = (later for later, _ in events[n + 1 :] if later in ("barrier", "load", "store"))
            if next(after, "barrier") != "barrier":
                found.add("poll without block barrier")
    return found


def test_compiled_code_is_ordered_and_mutants_are_not():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), environment.get("PYTHONPATH")]))
    targets = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950")
    command = [sys.executable, str(HERE / "compile_barriers.py"), *targets]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    for target, texts in json.loads(process.stdout).items():
        check(target, {name: faults(text) for name, text in texts.items()})


def check(target: str, found: dict[str, set[str]]) -> None:
    """Assert that what is right has no fault, and each mutant its own."""
    right = {name for name in found if name.endswith(": ")}
    persistent = {f"{name}_persistent{stack}: " for name in ("forward", "backward") for stack in ("", " of a stack")}
    assert right == {"exchange: ", *persistent}
    assert not any(found[name] for name in right), found
    wrong = found.keys() - right
    visible = FAULTS.keys() if target.startswith("gfx") else list(FAULTS)[:-1]
    assert {name.split(": ")[1] for name in wrong} == set(visible)
    for name in wrong:
        expected = FAULTS[name.split(": ")[1]]
        assert found[name], f"{name} passes"
        assert found[name] <= expected, name
