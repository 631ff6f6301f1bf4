"""Compare fastlstm with torch.nn.LSTM on this machine: check, time, print a table, write JSON and a plot."""

from __future__ import annotations

import argparse
import re
import sys
import time
import warnings
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import charlm
from benchmarks.machine import command, commit, find_device, machine, now, versions
from benchmarks.measure import run_workload
from benchmarks.peers import COLUMNS, OURS
from benchmarks.plot import draw
from benchmarks.report import print_report, refusals
from benchmarks.results import FOLDER, SCHEMA, Result, provenance, save
from benchmarks.workloads import Workload, default_workloads, quick_workloads

JOB_STEPS = {True: 50, False: 300}  # by --quick
BUDGET_S = {True: 0.7, False: 2.0}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer workloads, under 90 seconds on two cores")
    parser.add_argument("--filter", default="", metavar="REGEX", help="only workloads whose name matches")
    parser.add_argument("--list", action="store_true", help="print the names of the workloads and stop")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument("--threads", type=int, metavar="N", help="torch.set_num_threads; default: torch's own choice")
    parser.add_argument("--budget", type=float, metavar="S", help="seconds of timing per workload")
    parser.add_argument("--steps", type=int, metavar="N", help="training steps of the character model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: benchmarks/results/local-DEVICE.json")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="default: the JSON file's name with .png")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run; the exit status is 1 when fastlstm failed a correctness check, 2 when nothing was selected."""
    options = parse(arguments)
    device = find_device(options.device)
    listed = quick_workloads(device.type) if options.quick else default_workloads(device.type)
    workloads = [workload for workload in listed if re.search(options.filter, workload.name)]
    wants_job = bool(re.search(options.filter, charlm.NAME))
    if options.list:
        print("\n".join([workload.name for workload in workloads] + [charlm.NAME] * wants_job))
        return 0
    if not workloads and not wants_job:
        print(f"no workload matches {options.filter!r}; --list prints the names", file=sys.stderr)
        return 2

    if options.threads:
        torch.set_num_threads(options.threads)
    # stock says so on its projection rows, on every run
    warnings.filterwarnings("ignore", message="LSTM with projections is not supported with oneDNN")
    console = Console()
    if not console.is_terminal:
        console = Console(width=132)
    result = describe(device, options.quick, options.budget or BUDGET_S[options.quick])
    steps = (options.steps or JOB_STEPS[options.quick]) * wants_job
    console.print(f"[bold]fastlstm[/] against [bold]torch.nn.LSTM[/] on {escape(provenance(result))}\n")

    begin = time.perf_counter()
    try:
        run(result, workloads, steps, device, console)
    except KeyboardInterrupt:
        console.print("[bold]interrupted[/]: what was measured so far follows\n")
    print_report(result, console)
    json_path = options.json or FOLDER / f"local-{device.type}.json"
    plot_path = options.plot or json_path.with_suffix(".png")
    save(result, json_path)
    draw(result, plot_path)
    seconds = time.perf_counter() - begin
    console.print(f"\n{seconds:.0f} s. Figures: {json_path}  Plot: {plot_path}", soft_wrap=True, highlight=False)
    return int(any(name == OURS for name, _ in refusals(result)))


def run(result: Result, workloads: list[Workload], steps: int, device: torch.device, console: Console) -> None:
    """Fill `result` row by row, under a progress bar or, where there is no terminal, a line for each."""
    columns = TextColumn("{task.description:<36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    budget_s = result["settings"]["budget_s"]
    assert isinstance(budget_s, float)
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(workloads))
        for count, workload in enumerate(workloads, 1):
            progress.update(task, description=workload.name)
            result["rows"].append(run_workload(workload, device, budget_s=budget_s))
            progress.advance(task)
            if not console.is_terminal:
                console.print(f"{count}/{len(workloads)} {workload.name}", highlight=False)
        if steps:
            task = progress.add_task("character model, training steps", total=steps)
            result["jobs"].append(charlm.train(steps, device, advance=lambda: progress.advance(task)))


def describe(device: torch.device, quick: bool, budget_s: float) -> Result:
    """An empty result that says where and how it was made."""
    head, dirty = commit()
    return {
        "schema": SCHEMA,
        "command": command(),
        "date": now(),
        "commit": head,
        "dirty": dirty,
        "machine": machine(device),
        "versions": versions(),
        "settings": {
            "device": device.type,
            "threads": torch.get_num_threads(),
            "quick": quick,
            "budget_s": budget_s,
            "tf32_cudnn": torch.backends.cudnn.allow_tf32,
            "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        },
        "columns": list(COLUMNS),
        "rows": [],
        "jobs": [],
    }


if __name__ == "__main__":
    sys.exit(main())
