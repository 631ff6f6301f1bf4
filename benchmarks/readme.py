"""The README's table of figures, made from the result file that the README names."""

from __future__ import annotations

import re

from benchmarks.peers import OURS, STOCK
from benchmarks.results import FOLDER, RESIDENT, Result, Row, load, outcome, provenance, verdict
from benchmarks.tables import milliseconds

README = FOLDER.parent.parent / "README.md"

# which rows of a result file the README shows, and where: between two comments, of which the first names the file
README_ROWS = {
    "cpu-intel.json": r"^c/(dense|packed)/fp32|^f/packed/fp32|^b/packed/bf16|^b/dense-proj64/fp32|^charlm",
    "cpu-avx2.json": r"^c/(dense|packed)/bf16|^(b|c)/packed/fp32",
    "gpu-h200.json": r"^(c|long-768|deepbench-(512x64|1024x16|2048x128))/dense/bf16|^(b|c)/packed/bf16"
    r"|^deepbench-512x64/dense-bidirectional/bf16|^deepbench-256x64/dense/fp|^deepbench-1024x16/dense/fp16",
}
README_TABLE = re.compile(r"(?P<begin><!-- results: (?P<file>\S+) -->)\n.*?(?P<end><!-- end of results -->)", re.DOTALL)


def label(row: Row) -> str:
    """A row's shape letter, sizes, kind and dtype, for people."""
    sizes = " ".join(f"{size}={value}" for size, value in row["shape"].items())
    return f"{row['name'].split('/')[0]} ({sizes}) {row['kind'].replace('-', ' ')} {row['dtype']}"


def cell(row: Row | None) -> str:
    """`2.50x (8.1 to 3.2 ms)`, from stock's median to fastlstm's, or why there is no figure."""
    if row is None:
        return ""
    found, stock = row["columns"][OURS], row["columns"][STOCK]
    if not found["ms"]:
        return f"refused: {outcome(found)}"
    if not found["ratio"] or not stock["ms"]:
        return ""
    text = f"{found['ratio']['median']:.2f}x ({milliseconds(stock['ms'])} to {milliseconds(found['ms'])} ms)"
    return f"**{text}**" if verdict(found["ratio"]) == "slower" else text


def memory(row: Row | None) -> str:
    """Fastlstm's peak memory over stock's."""
    if row is None:
        return ""
    own, stock = row["columns"][OURS]["peak_bytes"], row["columns"][STOCK]["peak_bytes"]
    return f"{own / stock:.2f}x" if own and stock else ""


def readme_table(result: Result, pattern: str = "") -> str:
    """Render the default suite's rows whose name matches `pattern`, forward and training side by side.

    Figures that show a loss are set in bold, so that none hides.
    """
    pairs: dict[str, dict[bool, Row]] = {}
    for row in result["rows"]:
        if row["suite"] == "default" and re.search(pattern, row["name"]):
            pairs.setdefault(label(row), {})[row["training"]] = row
    way = result["settings"]["memory"]
    counted = "memory" if way == RESIDENT else way
    lines = [
        f"| workload | forward, no_grad | forward and backward | {counted} at the peak, training |",
        "|---|---|---|---|",
    ]
    for name, modes in pairs.items():
        training = modes.get(True)
        cells = [name, cell(modes.get(False)), cell(training), memory(training)]
        lines.append("| " + " | ".join(cells) + " |")
    for job in result["jobs"]:
        if re.search(pattern, job["name"]):
            found, stock = job["columns"][OURS], job["columns"][STOCK]
            speed = f"{found['ratio']['median']:.2f}x ({stock['seconds']:.1f} to {found['seconds']:.1f} s)"
            lines.append(
                f"| {job['name'].split('/')[0]}: {job['steps']} training steps on real text, "
                f"{found['bits_per_character']:.3f} bits per character (stock {stock['bits_per_character']:.3f}) "
                f"| | {speed if job['status'] == 'ok' else 'refused'} | |"
            )
    return "\n".join(lines) + "\n"


def fill_readme(readme: str) -> str:
    """Return the README with the table between its markers made again from the result file that they name."""

    def table(match: re.Match[str]) -> str:
        file = README.parent / match["file"]
        result = load(file)
        rows = readme_table(result, README_ROWS[file.name])
        body = f"{rows}\n{provenance(result)}; `{result['command']}`"
        return f"{match['begin']}\n{body}\n{match['end']}"

    return README_TABLE.sub(table, readme)
