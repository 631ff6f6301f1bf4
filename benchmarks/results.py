"""The result file: its schema, how it is read, written and taken up again, and what a ratio shows."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, TypedDict

SCHEMA = 3
RESIDENT, TENSORS, ALLOCATED = "resident set", "tensor bytes", "torch's allocator"
SMALLEST_PEAK = 1 << 19  # bytes; the system counts pages, to about a hundred kilobytes
FOLDER = Path(__file__).parent / "results"


class Spread(TypedDict):
    """A median with the 20th and 80th percentiles."""

    median: float
    p20: float
    p80: float


class Column(TypedDict):
    """One implementation on one workload.

    `status` is "ok"; "rough: ...", less accurate than the tests allow, but timed; or why nothing was timed. `error` is
    the largest of `errors`, relative ones against float64 by tensor. `ms` is per call; a sample averages `calls` calls,
    there are `rounds` of them, and `samples` holds all, so that entries of one round are one round in every column.
    `ratio` is stock's time / this column's, paired by round: above 1 is faster. `peak_bytes` is what a call needs at
    its peak beyond what is held before it, in the sense of `settings["memory"]`.
    """

    status: str
    error: float | None
    errors: dict[str, float | None]
    rounds: int
    calls: int
    ms: Spread | None
    ratio: Spread | None
    samples: list[float]
    peak_bytes: int | None


def untimed(status: str, error: float | None = None, errors: dict[str, float | None] | None = None) -> Column:
    """A column of which nothing but the check is known."""
    return {
        "status": status,
        "error": error,
        "errors": errors or {},
        "rounds": 0,
        "calls": 0,
        "ms": None,
        "ratio": None,
        "samples": [],
        "peak_bytes": None,
    }


def outcome(column: Column) -> str:
    """The first word of the status: "ok", "rough", "wrong result", "failed" or "not supported"."""
    return column["status"].split(":")[0]


class Row(TypedDict):
    """One workload. `route` is what fastlstm.explain answers: backend and regime."""

    name: str
    suite: str
    shape: dict[str, int]
    kind: str
    dtype: str
    training: bool
    budget_s: float
    flops: float
    weight_bytes: int
    route: str
    columns: dict[str, Column]


class JobColumn(TypedDict):
    """One implementation on the real job. `ratio` is paired by training step."""

    bits_per_character: float
    seconds: float
    ratio: Spread
    losses: list[float]


class Job(TypedDict):
    """The real job: what was trained, on what, and whether the loss curves agree.

    `error` and `allowed` are relative errors of fastlstm's curve against the float64 curve: what was found, and
    what the table of tolerances allows. `text_sha256` is of the training text, which differs between Pythons.
    """

    name: str
    dtype: str
    steps: int
    batch: int
    parameters: int
    text_sha256: str
    untrained_bits: float
    status: str
    error: float
    allowed: float
    route: str
    columns: dict[str, JobColumn]


class Result(TypedDict):
    """A whole run, with everything needed to judge it and to run it again.

    `source` is a digest of the code that was measured. `probe` is what the machine can do: GFLOP/s of matrix products
    by dtype, GB/s of a copy. `columns` says what each column is, `absent` why one that was asked for could not run.
    `settings["memory"]` says what `peak_bytes` counts: RESIDENT, pages that the operating system gave a process for one
    call; TENSORS, what torch's profiler counts, touched or not; ALLOCATED, what the allocator of a GPU counts.
    """

    schema: int
    command: str
    date: str
    commit: str | None
    dirty: bool | None
    source: str
    machine: dict[str, str | int | float | None]
    versions: dict[str, str | None]
    settings: dict[str, str | int | float | bool | None]
    probe: dict[str, float]
    columns: dict[str, str]
    absent: dict[str, str]
    rows: list[Row]
    jobs: list[Job]


def save(result: Result, path: Path) -> None:
    """Write a result file, a row a line, so that an interruption leaves either the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lists = {"rows": result["rows"], "jobs": result["jobs"]}
    text = json.dumps({key: value for key, value in result.items() if key not in lists}, indent=1)[:-2]
    for key, items in lists.items():
        lines = ",\n".join(json.dumps(item, allow_nan=False) for item in items)
        text += f',\n "{key}": [\n{lines}\n ]' if items else f',\n "{key}": []'
    part = path.with_name(path.name + ".part")
    part.write_text(text + "\n}\n")
    part.replace(path)


def load(path: Path) -> Result:
    """Read a result file; older ones are brought up to date.

    Raises:
        ValueError: the file has another schema, or is no result file.
    """
    try:
        result = json.loads(path.read_text())
        schema = result.get("schema")
    except (json.JSONDecodeError, AttributeError) as problem:
        raise ValueError(f"{path} is not a result file") from problem
    if schema == 1:
        result |= {"source": "", "probe": {}, "absent": {}}
        result["columns"] = dict.fromkeys(result["columns"], "")
        for row in result["rows"]:
            row |= {"suite": "default", "budget_s": 0.0, "flops": 0.0, "weight_bytes": 0}
            for column in row["columns"].values():
                column |= {"errors": {}, "samples": []}
    if schema in (1, 2):  # the first kept no samples; both counted tensors on a CPU
        result["schema"] = SCHEMA
        result["settings"]["memory"] = ALLOCATED if result["machine"]["gpu"] else TENSORS
    elif schema != SCHEMA:
        raise ValueError(f"{path}: schema {schema}, expected {SCHEMA}")
    return result


def taken_up(result: Result, path: Path) -> Result:
    """Return `result` with the rows that a file holds, if they come from the same code on the same machine."""
    if not path.exists():
        return result
    old = load(path)
    if _identity(old) != _identity(result):
        return result
    commands = dict.fromkeys([*old["command"].split("; "), result["command"]])
    kept = {key: old[key] for key in ("probe", "columns", "absent", "rows", "jobs")}
    return {**result, **kept, "command": "; ".join(commands)}  # type: ignore[typeddict-item]


def _identity(result: Result) -> tuple[object, ...]:
    """What must be equal for two runs to be one: not the load that the machine happened to have."""
    machine = {**result["machine"], "load_1min": None}
    return machine, result["source"], result["versions"], result["settings"]


def has(result: Result, suite: str, name: str, columns: Iterable[str], budget_s: float) -> bool:
    """Whether a workload was measured for a suite, in all these columns and at least as long."""
    return any(
        (row["suite"], row["name"]) == (suite, name)
        and row["budget_s"] >= budget_s
        and row["columns"].keys() >= set(columns)
        for row in result["rows"]
    )


def add(result: Result, row: Row) -> None:
    """Add a row; the same workload of the same suite is replaced."""
    result["rows"] = [old for old in result["rows"] if (old["suite"], old["name"]) != (row["suite"], row["name"])]
    result["rows"].append(row)


def rounded(value: float) -> float:
    """Four significant figures: what a clock is worth, and short in a file."""
    return float(f"{value:.4g}")


def percentile(values: Sequence[float], percent: int) -> float:
    """Interpolated between the samples, 1 <= percent <= 99."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


def committed() -> list[Path]:
    """The result files that the repository carries, without those of local runs."""
    return sorted(path for path in FOLDER.glob("*.json") if not path.name.startswith("local-"))


def verdict(ratio: Spread) -> Literal["faster", "even", "slower"]:
    """What a ratio shows: a difference only when it exceeds 3 % and p20 and p80 lie on its side of 1."""
    if ratio["median"] >= 1.03 and ratio["p20"] > 1:
        return "faster"
    if ratio["median"] <= 0.97 and ratio["p80"] < 1:
        return "slower"
    return "even"


def provenance(result: Result) -> str:
    """One line: machine, threads, versions, commit and date."""
    machine, versions = result["machine"], result["versions"]
    threads = result["settings"]["threads"]
    cpu = f"{machine['cpu']} ({machine['capability']}), {threads} thread{'s' * (threads != 1)}"
    device = machine["gpu"] or cpu
    commit = (result["commit"] or "no commit")[:10] + (" (dirty)" if result["dirty"] else "")
    return f"{device}; torch {versions['torch']}; commit {commit}; {result['date'][:10]}"
