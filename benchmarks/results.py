"""The result file: its schema, how it is read and written, and the table a README shows.

`python -m benchmarks.results FILE` prints that table as Markdown.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Literal, TypedDict

SCHEMA = 1
FOLDER = Path(__file__).parent / "results"
README = FOLDER.parent.parent / "README.md"

# what the README shows of a result file, and where: between two comments, of which the first names the file
README_ROWS = r"^(b|c|f)/(dense|packed)/fp32|^b/packed/bf16|^b/packed-(bidir|2layer)|^b/dense-proj|^b/.*/fp64|^charlm"
README_TABLE = re.compile(r"(?P<begin><!-- results: (?P<file>\S+) -->)\n.*?(?P<end><!-- end of results -->)", re.DOTALL)


class Spread(TypedDict):
    """A median with the 20th and 80th percentiles."""

    median: float
    p20: float
    p80: float


class Column(TypedDict):
    """One implementation on one workload.

    `status` is "ok", or what the correctness check found, and then nothing was timed. `error` is the largest
    relative error of any compared tensor against float64. `ms` is per call; a sample averages `calls` calls, and
    there are `rounds` samples. `ratio` is stock's time / this column's, paired by round: above 1 is faster.
    """

    status: str
    error: float | None
    rounds: int
    calls: int
    ms: Spread | None
    ratio: Spread | None
    peak_bytes: int | None


class Row(TypedDict):
    """One workload. `route` is what fastlstm.explain answers: backend and regime."""

    name: str
    shape: dict[str, int]
    kind: str
    dtype: str
    training: bool
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
    """A whole run, with everything needed to judge it and to run it again."""

    schema: int
    command: str
    date: str
    commit: str | None
    dirty: bool | None
    machine: dict[str, str | int | float | None]
    versions: dict[str, str | None]
    settings: dict[str, str | int | float | bool | None]
    columns: list[str]
    rows: list[Row]
    jobs: list[Job]


def save(result: Result, path: Path) -> None:
    """Write a result file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def load(path: Path) -> Result:
    """Read a result file.

    Raises:
        ValueError: the file has another schema.
    """
    result = json.loads(path.read_text())
    if result.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema {result.get('schema')}, expected {SCHEMA}")
    return result


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


def label(row: Row) -> str:
    """A row's shape letter, sizes, kind and dtype, for people."""
    sizes = " ".join(f"{size}={value}" for size, value in row["shape"].items())
    return f"{row['name'].split('/')[0]} ({sizes}) {row['kind'].replace('-', ' ')} {row['dtype']}"


def cell(row: Row | None, column: str) -> str:
    """`2.50x (8.1 to 3.2 ms)`, from stock's median to the column's, or why there is no figure."""
    if row is None or column not in row["columns"]:
        return ""
    found, stock = row["columns"][column], next(iter(row["columns"].values()))
    if not found["ms"] or not found["ratio"] or not stock["ms"]:
        return "refused: " + found["status"].split(",")[0]
    text = f"{found['ratio']['median']:.2f}x ({milliseconds(stock['ms'])} to {milliseconds(found['ms'])} ms)"
    return f"**{text}**" if verdict(found["ratio"]) == "slower" else text


def milliseconds(spread: Spread) -> str:
    """The median to three significant figures."""
    value = spread["median"]
    return f"{value:.0f}" if value >= 100 else f"{value:.{2 if value < 10 else 1}f}" if value >= 1 else f"{value:.3f}"


def markdown(result: Result, pattern: str = "", column: str = "fastlstm") -> str:
    """Render rows whose name matches `pattern` as a Markdown table, forward and training side by side.

    Figures that show a loss are set in bold, so that none hides.
    """
    pairs: dict[str, dict[bool, Row]] = {}
    for row in result["rows"]:
        if re.search(pattern, row["name"]):
            pairs.setdefault(label(row), {})[row["training"]] = row
    lines = [
        "| workload | forward, no_grad | forward and backward | tensor bytes at the peak, training |",
        "|---|---|---|---|",
    ]
    for name, modes in pairs.items():
        training = modes.get(True)
        cells = [name, cell(modes.get(False), column), cell(training, column), memory(training, column)]
        lines.append("| " + " | ".join(cells) + " |")
    for job in result["jobs"]:
        if re.search(pattern, job["name"]):
            found = job["columns"][column]
            stock = next(iter(job["columns"].values()))
            lines.append(
                f"| {job['name'].split('/')[0]}: {job['steps']} training steps on real text, "
                f"{found['bits_per_character']:.3f} bits per character (stock {stock['bits_per_character']:.3f}) "
                f"| | {found['ratio']['median']:.2f}x ({stock['seconds']:.1f} to {found['seconds']:.1f} s) | |"
            )
    return "\n".join(lines) + "\n"


def fill_readme(readme: str) -> str:
    """Return the README with the table between its markers made again from the result file that they name."""

    def table(match: re.Match[str]) -> str:
        result = load(README.parent / match["file"])
        body = f"{markdown(result, README_ROWS)}\n{provenance(result)}; `{result['command']}`"
        return f"{match['begin']}\n{body}\n{match['end']}"

    return README_TABLE.sub(table, readme)


def memory(row: Row | None, column: str) -> str:
    """The column's peak memory over stock's."""
    if row is None or column not in row["columns"]:
        return ""
    own, stock = row["columns"][column]["peak_bytes"], next(iter(row["columns"].values()))["peak_bytes"]
    return f"{own / stock:.2f}x" if own and stock else ""


def provenance(result: Result) -> str:
    """One line: machine, threads, versions, commit and date."""
    machine, versions = result["machine"], result["versions"]
    threads = result["settings"]["threads"]
    device = machine["gpu"] or f"{machine['cpu']}, {threads} thread{'s' * (threads != 1)}"
    commit = (result["commit"] or "no commit")[:10] + (" (dirty)" if result["dirty"] else "")
    return f"{device}; torch {versions['torch']}; commit {commit}; {result['date'][:10]}"


def main() -> None:
    """Print the Markdown table of a result file."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--filter", default="", metavar="REGEX", help="only workloads whose name matches")
    arguments = parser.parse_args()
    result = load(arguments.file)
    print(markdown(result, arguments.filter) + "\n" + provenance(result))


if __name__ == "__main__":
    main()
