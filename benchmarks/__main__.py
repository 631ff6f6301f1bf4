"""Compare fastlstm with torch.nn.LSTM on this machine: check, time, print a table, write a page, JSON and a plot.

`python -m benchmarks compare OLD.json NEW.json` says what became faster or slower between two result files.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
import warnings
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import charlm, compare
from benchmarks.machine import command, commit, find_device, machine, now, source, versions
from benchmarks.measure import run_workload
from benchmarks.memory import Meter, way
from benchmarks.page import write_page
from benchmarks.peers import INPUT_PRODUCT, OURS, PEERS, STOCK, Peer
from benchmarks.plot import draw
from benchmarks.probe import probe
from benchmarks.report import make_console, print_report, refusals
from benchmarks.results import FOLDER, SCHEMA, Result, add, has, provenance, save, taken_up
from benchmarks.suites import SUITES, in_dtypes, quick_workloads
from benchmarks.workloads import DTYPES, Workload

JOB_STEPS = {True: 50, False: 300}  # by --quick
BUDGET_S = {True: 0.7, False: 2.0}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    suites = ", ".join(SUITES)
    parser.add_argument("--suite", action="append", choices=SUITES, metavar="NAME", help=f"repeatable; {suites}")
    parser.add_argument(
        "--peer", action="append", choices=PEERS, metavar="NAME", help=f"repeatable; {', '.join(PEERS)}"
    )
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="repeatable; only these")
    parser.add_argument("--filter", default="", metavar="REGEX", help="only workloads whose name matches")
    parser.add_argument("--quick", action="store_true", help="a handful of the default suite, under 90 s on two cores")
    parser.add_argument("--list", action="store_true", help="print the names of workloads and of columns, and stop")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument("--threads", type=int, metavar="N", help="torch.set_num_threads; default: torch's own choice")
    parser.add_argument("--budget", type=float, metavar="S", help="seconds of timing per workload")
    parser.add_argument("--minutes", type=float, metavar="M", help="per suite; run again to go on; default: 15")
    parser.add_argument("--steps", type=int, metavar="N", help="training steps of the character model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: benchmarks/results/local-DEVICE.json")
    parser.add_argument("--fresh", action="store_true", help="measure again what the file already holds")
    options = parser.parse_args(arguments)
    try:
        re.compile(options.filter)
    except re.error as problem:
        parser.error(f"--filter {options.filter!r}: {problem}")
    if options.json and options.json.suffix != ".json":
        parser.error("--json: FILE ends in .json; its tables, picture and page differ from it by what they end in")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run; the exit status is 1 when fastlstm failed a correctness check, 2 when nothing was selected or measured."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["compare"]:
        return compare.main(given[1:])
    options = parse(given)
    device = find_device(options.device)
    suites = dict.fromkeys(options.suite or ["default"])
    selected = {suite: select(suite, options, device) for suite in suites}
    wants_job = "default" in suites and bool(re.search(options.filter, charlm.NAME))
    wants_job = wants_job and (not options.dtype or "fp32" in options.dtype)
    names = [workload.name for workloads in selected.values() for workload in workloads] + [charlm.NAME] * wants_job
    if options.list:
        print("\n".join(names))
        for name, peer in PEERS.items():
            print(f"column {name}: {peer.missing(device) or peer.about}")
        return 0
    if not names:
        print(f"no workload matches {options.filter!r}; --list prints the names", file=sys.stderr)
        return 2

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    # stock says so on its projection rows, on every run
    warnings.filterwarnings("ignore", message="LSTM with projections is not supported with oneDNN")
    console = make_console()
    path = options.json or FOLDER / f"local-{device.type}.json"
    try:
        result = describe(device) if options.fresh else taken_up(describe(device), path)
    except ValueError as problem:
        print(f"{problem}; --fresh replaces it", file=sys.stderr)
        return 2
    console.print(f"[bold]fastlstm[/] against [bold]torch.nn.LSTM[/] on {escape(provenance(result))}\n")
    if kept := len(result["rows"]):
        console.out(f"{kept} rows of {path} come from the same code and machine and are kept; --fresh measures again\n")

    begin = time.perf_counter()
    try:
        with Meter(device) as meter:
            run(result, path, selected, wants_job, options, console, meter)
    except KeyboardInterrupt:
        console.print("[bold]interrupted[/]: what was measured so far follows; the same command goes on from here\n")
    finally:  # an error loses nothing of it either
        if measured := bool(result["rows"] or result["jobs"]):
            print_report(result, console)
            files = write(result, path)
            console.out(f"\n{time.perf_counter() - begin:.0f} s. {files}", highlight=False)
    if not measured:
        console.out(f"nothing was measured, so {path} is not written")
        return 2
    return int(any(name == OURS for name, _ in refusals(result)))


def write(result: Result, path: Path) -> str:
    """Write the figures, their tables, picture and page; return a sentence that names the files."""
    save(result, path)
    picture = draw(result, path.with_suffix(".png"))
    page = write_page(result, path.with_suffix(".html"))
    files = " ".join(str(file) for file in (path, path.with_suffix(".md"), picture) if file)
    return f"Figures: {files}\nPage: {page.resolve().as_uri()}"


def select(suite: str, options: argparse.Namespace, device: torch.device) -> list[Workload]:
    """The workloads of a suite that the command line asks for."""
    quick = options.quick and suite == "default"
    listed = quick_workloads(device.type) if quick else SUITES[suite].workloads(device.type)
    if options.dtype:
        listed = in_dtypes(listed, options.dtype)
    return [workload for workload in listed if re.search(options.filter, workload.name)]


def columns(suite: str, options: argparse.Namespace, result: Result, device: torch.device) -> dict[str, Peer]:
    """The columns of a suite that can run here, stock and fastlstm always; the others are entered as absent."""
    found = {}
    for name in dict.fromkeys((STOCK, OURS, *(options.peer or SUITES[suite].peers))):
        if reason := PEERS[name].missing(device):
            result["absent"][name] = reason
        else:
            found[name] = PEERS[name]
            result["absent"].pop(name, None)  # it may have come since the file was begun
    if "flashrnn" not in found and not options.peer:
        found.pop(INPUT_PRODUCT, None)  # there only to be fair to that one
    result["columns"] |= {name: peer.about for name, peer in found.items()}
    return found


def run(
    result: Result,
    path: Path,
    selected: dict[str, list[Workload]],
    wants_job: bool,
    options: argparse.Namespace,
    console: Console,
    meter: Meter,
) -> None:
    """Fill `result` and its file row by row, under a progress bar or, where there is no terminal, a line for each."""
    device = meter.device
    budget_s = BUDGET_S[options.quick] if options.budget is None else options.budget
    steps = JOB_STEPS[options.quick] if options.steps is None else options.steps
    listed = [workload for workloads in selected.values() for workload in workloads]
    if dtypes := {workload.dtype for workload in listed} - result["probe"].keys():
        result["probe"] |= probe(device, dtypes)
    shown = TextColumn("{task.description:<36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    count = 0
    with Progress(*shown, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(listed))
        for suite, workloads in selected.items():
            peers, begin, left_out = columns(suite, options, result, device), time.perf_counter(), 0
            minutes = SUITES[suite].minutes if options.minutes is None else options.minutes
            for workload in workloads:
                count += 1
                progress.update(task, description=workload.name, completed=count - 1)
                if has(result, suite, workload.name, peers, budget_s):
                    continue
                if time.perf_counter() - begin > 60 * minutes:
                    left_out += 1
                    continue
                try:
                    row = run_workload(workload, device, budget_s=budget_s, suite=suite, peers=peers)
                except torch.OutOfMemoryError as problem:  # of the check in float64, or of the input
                    console.out(f"{workload.name} is left out: {str(problem).splitlines()[0]}", highlight=False)
                    continue
                if SUITES[suite].measure == "speed":
                    for name, column in row["columns"].items():
                        column["peak_bytes"] = meter(workload, name) if column["ms"] else None
                add(result, row)
                save(result, path)
                if not console.is_terminal:
                    console.out(f"{count}/{len(listed)} {suite} {workload.name}", highlight=False)
            if left_out:
                console.print(f"{suite}: {left_out} workloads left out for want of time; the same command goes on\n")
        if wants_job and steps > max((job["steps"] for job in result["jobs"]), default=0):
            task = progress.add_task("character model, training steps", total=steps)
            result["jobs"] = [charlm.train(steps, device, advance=lambda: progress.advance(task))]


def describe(device: torch.device) -> Result:
    """An empty result that says where and how it was made."""
    head, dirty = commit()
    return {
        "schema": SCHEMA,
        "command": command(),
        "date": now(),
        "commit": head,
        "dirty": dirty,
        "source": source(),
        "machine": machine(device),
        "versions": versions(),
        "settings": {
            "device": device.type,
            "threads": torch.get_num_threads(),
            "tf32_cudnn": torch.backends.cudnn.allow_tf32,
            "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
            "memory": way(device),
        },
        "probe": {},
        "columns": {},
        "absent": {},
        "rows": [],
        "jobs": [],
    }


if __name__ == "__main__":
    # a run meets more kinds of calls than a program does, and each is to be timed as it is after its trials
    os.environ.setdefault("FASTLSTM_AUTOTUNE_MS", "inf")
    sys.exit(main())
