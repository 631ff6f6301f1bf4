"""Result files are taken up, compared, and shown as tables, plot and page."""

from __future__ import annotations

import json
import math
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmark_helpers import make_column, make_result, make_row

from benchmarks import __main__, charlm, machine, plot, results
from benchmarks.charts import SECTIONS, sections
from benchmarks.compare import compare
from benchmarks.page import write_page
from benchmarks.peers import OURS, STOCK
from benchmarks.readme import README, README_TABLE, fill_readme, readme_table
from benchmarks.suites import SUITES
from benchmarks.tables import markdown, tables

ROOT = Path(__file__).parents[1]


def test_result_file_round_trip(tmp_path):
    result = make_result()
    results.save(result, tmp_path / "new" / "result.json")
    assert results.load(tmp_path / "new" / "result.json") == result
    results.save({**result, "schema": 0}, tmp_path / "old.json")
    with pytest.raises(ValueError, match="schema 0"):
        results.load(tmp_path / "old.json")
    (tmp_path / "cut.json").write_text('{"schema": 2')
    with pytest.raises(ValueError, match="not a result file"):
        results.load(tmp_path / "cut.json")


def test_a_file_of_schema_1_is_brought_up_to_date(tmp_path):
    result: Any = make_result()
    for key in ("source", "probe", "absent"):
        result.pop(key)
    for row in result["rows"]:
        for key in ("suite", "budget_s", "flops", "weight_bytes"):
            row.pop(key)
        for column in row["columns"].values():
            column.pop("errors")
            column.pop("samples")
    result |= {"schema": 1, "columns": list(result["columns"])}
    (tmp_path / "old.json").write_text(json.dumps(result))
    loaded = results.load(tmp_path / "old.json")
    assert loaded.keys() == results.Result.__annotations__.keys()
    assert loaded["rows"][0].keys() == results.Row.__annotations__.keys()
    assert loaded["rows"][0]["columns"][OURS].keys() == results.Column.__annotations__.keys()
    header, same = "tensor bytes at the peak", "memory at the peak"
    assert readme_table(loaded) == readme_table(make_result()).replace(same, header)


def test_finished_rows_are_taken_up(tmp_path):
    path = tmp_path / "result.json"
    results.save(make_result(), path)
    empty: Any = {**make_result(), "rows": [], "command": "another"}
    empty["machine"] = {**empty["machine"], "load_1min": 7.0}
    taken = results.taken_up(empty, path)
    assert taken["rows"] == make_result()["rows"]
    assert taken["command"] == "python -m benchmarks; another"
    for key, value in (("source", "0"), ("settings", {"threads": 2}), ("versions", {}), ("machine", {"cpu": "other"})):
        other: Any = {**empty, key: value}
        assert results.taken_up(other, path)["rows"] == []
    assert results.taken_up(empty, tmp_path / "none.json")["rows"] == []

    assert results.has(taken, "default", "b/packed/fp32/train", [STOCK, OURS], 2.0)
    assert not results.has(taken, "default", "b/packed/fp32/train", [STOCK, OURS], 3.0)
    assert not results.has(taken, "default", "b/packed/fp32/train", [STOCK, "haste"], 2.0)
    assert not results.has(taken, "varlen", "b/packed/fp32/train", [STOCK], 2.0)
    results.add(taken, make_row("packed", True, 9.0))
    assert len(taken["rows"]) == 3
    assert taken["rows"][-1] == make_row("packed", True, 9.0)


def test_markdown_shows_losers_in_bold():
    table = readme_table(make_result())
    assert table.splitlines()[2:] == [
        "| b (T=100 B=16 I=64 H=128) packed fp32 | **0.80x (12.0 to 15.0 ms)** | 3.00x (12.0 to 4.00 ms) | 0.33x |",
        "| b (T=100 B=16 I=64 H=128) dense fp32 |  | refused: wrong result |  |",
    ]
    assert "packed" not in readme_table(make_result(), "dense")
    assert "| b/packed/fp32 | forward | **0.80** | 0.76-0.84 | 12.0 | 15.0 |" in markdown(make_result())
    source = results.provenance(make_result())
    assert source == "a processor (AVX2), 1 thread; torch 2.13.0; commit 0123456789; 2026-01-02"


def test_committed_results_are_readable():
    for result in map(results.load, results.committed()):
        assert result["commit"]
        assert markdown(result)


def test_plot_of_winner_loser_and_refusal(tmp_path):
    plot.draw(make_result(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    labels = [line.label for line in plot.lines(make_result())]
    assert labels[::2][:2] == ["dense input", "packed input (variable lengths)"]


@pytest.mark.parametrize("status", ["ok", "loss curve is off"])
def test_a_job_that_went_astray_shows_no_speed(status):
    ratio = {"median": 1.5, "p20": 1.4, "p80": 1.6}
    column = {"bits_per_character": 2.0, "seconds": 1.0, "ratio": ratio, "losses": []}
    job = {"name": charlm.NAME, "steps": 3, "status": status, "columns": {STOCK: column, OURS: column}}
    result: Any = {**make_result(), "jobs": [job]}
    (shown,) = plot.lines(result)[-1].modes.values()
    assert shown[OURS] == (ratio if status == "ok" else None)
    assert ("1.50x" if status == "ok" else "refused | |") in readme_table(result)


def test_plot_names_what_it_has_drawn(tmp_path, monkeypatch, capsys):
    for name, suite in (("drawn", "default"), ("empty", "sweep")):
        rows: Any = [{**make_row("dense", True, 2.0), "suite": suite}]
        results.save({**make_result(), "rows": rows}, tmp_path / f"{name}.json")
    monkeypatch.setattr(sys, "argv", ["-", *(str(tmp_path / f"{name}.json") for name in ("drawn", "empty"))])
    plot.main()
    drawn, empty = capsys.readouterr().out.splitlines()
    assert drawn == str(tmp_path / "drawn.png")
    assert Path(drawn).exists()
    assert empty == f"{tmp_path / 'empty.json'} holds nothing of the default suite"
    assert not (tmp_path / "empty.png").exists()


@pytest.mark.parametrize(
    ("p20", "median", "p80", "expected"),
    [
        (1.01, 1.1, 1.2, "faster"),
        (0.99, 1.1, 1.2, "even"),
        (1.01, 1.02, 1.03, "even"),
        (0.97, 0.98, 0.99, "even"),
        (0.8, 0.9, 1.01, "even"),
        (0.8, 0.9, 0.99, "slower"),
    ],
)
def test_verdict(p20, median, p80, expected):
    assert results.verdict({"p20": p20, "median": median, "p80": p80}) == expected


def noisy_result(slowdown: float, seed: int, rows: int = 40, rounds: int = 60) -> results.Result:
    """Rounds with the noise of a shared machine: it drifts, hits all columns alike, and each a little by itself."""
    generator = np.random.default_rng(seed)
    result = make_result()
    result["rows"] = []
    for index in range(rows):
        row: Any = make_row("packed", True, 2.0)
        row["name"] = f"{index}/packed/fp32/train"
        drift = np.exp(0.15 * np.cumsum(generator.normal(size=rounds)) / rounds**0.5)
        for name, ms in ((STOCK, 12.0), (OURS, 6.0 * (slowdown if index == 7 else 1.0))):
            row["columns"][name]["samples"] = list(ms * drift * np.exp(0.05 * generator.normal(size=rounds)))
        result["rows"].append(row)
    return result


def test_gate_sees_one_slower_row_and_nothing_else(tmp_path, capsys):
    for seed in range(5):
        alike = compare(noisy_result(1.0, seed), noisy_result(1.0, seed + 100))
        assert {verdict.word for verdict in alike} <= {"even", "unclear"}
    changed = list(compare(noisy_result(1.0, 0), noisy_result(1.2, 1)))
    assert [verdict.name for verdict in changed if verdict.word == "slower"] == ["7/packed/fp32/train"]
    verdict = changed[7]
    assert verdict.low
    assert verdict.high
    assert verdict.low < 1 / 1.2 < verdict.high < 1
    paths = [str(tmp_path / name) for name in ("old.json", "new.json", "other.json")]
    for path, slowdown in zip(paths, (1.0, 1.2, 1.0), strict=True):
        results.save(noisy_result(slowdown, 0), Path(path))
    assert __main__.main(["compare", paths[0], paths[1]]) == 1
    assert "7/packed/fp32/train slower" in " ".join(capsys.readouterr().out.split())
    assert __main__.main(["compare", paths[1], paths[0]]) == 0  # faster
    assert __main__.main(["compare", paths[0], paths[2]]) == 0
    results.save({**make_result(), "rows": []}, Path(paths[2]))
    assert __main__.main(["compare", paths[0], paths[2]]) == 2
    Path(paths[2]).write_text("[]")
    for path in (paths[2], str(tmp_path / "none.json")):
        with pytest.raises(SystemExit, match="2"):
            __main__.main(["compare", paths[0], path])


def test_gate_says_unclear_where_noise_hides_the_answer():
    old: Any = noisy_result(1.0, 0, rows=40)
    new: Any = noisy_result(1.0, 1, rows=40)
    generator = np.random.default_rng(2)
    for row in old["rows"] + new["rows"]:
        own = row["columns"][OURS]
        own["samples"] = [sample * math.exp(0.6 * generator.normal()) for sample in own["samples"]]
    verdicts = list(compare(old, new))
    assert {verdict.word for verdict in verdicts} == {"unclear"}
    assert any(verdict.change and verdict.change < 0.9 for verdict in verdicts)


def test_gate_sees_refusals_memory_and_missing_samples():
    old: Any = noisy_result(1.0, 0, rows=4)
    new: Any = noisy_result(1.0, 0, rows=4)
    new["rows"][0]["columns"][OURS] = make_column(None)
    new["rows"][1]["columns"][OURS]["peak_bytes"] *= 2
    new["rows"][3]["columns"][OURS]["peak_bytes"] *= 1.09
    new["rows"][2]["columns"][OURS]["samples"] = new["rows"][2]["columns"][STOCK]["samples"] = []
    new["rows"][3]["route"] = "elsewhere"
    verdicts = list(compare(old, new))
    assert [verdict.word for verdict in verdicts] == ["refused", "more memory", "unclear", "even"]
    assert "2.00x the bytes" in verdicts[1].note
    assert "route" in verdicts[3].note
    assert [verdict.word for verdict in compare(new, old)][:2] == ["unclear", "even"]
    old["settings"] = {**old["settings"], "memory": results.TENSORS}
    assert [verdict.word for verdict in compare(old, new)] == ["refused", "even", "unclear", "even"]


def test_gate_judges_a_suite_that_times_nothing_by_its_checks():
    old = make_result()
    row: Any = {**make_row("dense", True, 1.0), "suite": "accuracy", "columns": {}}
    row["columns"] = {STOCK: results.untimed("ok"), OURS: results.untimed("ok")}
    old["rows"] = [row]
    assert [verdict.word for verdict in compare(old, old)] == ["even"]
    new: Any = {**old, "rows": [{**row, "columns": {**row["columns"], OURS: results.untimed("wrong result: dx")}}]}
    assert [verdict.word for verdict in compare(old, new)] == ["refused"]
    assert [verdict.word for verdict in compare(new, new)] == ["even"]


def make_full_result() -> Any:
    """Rows of every suite, so that the page has every chart and table."""
    result = make_result()
    result["absent"]["<peer>"] = "not <there>"
    for suite in SUITES:
        for T in (16, 64, 256):
            row: Any = make_row("dense", True, 0.5 if T == 64 else 2.0)
            row |= {"suite": suite, "name": f"{suite}-{T}/dense/fp32/train", "shape": {**row["shape"], "T": T}}
            row["columns"][OURS]["errors"] = {"output": 1e-7, "dx": 1e-6, "dweight_hh_l0": None}
            result["rows"].append(row)
    return result


def test_page_stands_alone_and_shows_everything(tmp_path):
    result = make_full_result()
    found = sections(result)
    assert [section.title for section in found] == [title for _, title, _ in SECTIONS]
    drawn = [chart for section in found for chart in section.charts]
    page = write_page(result, tmp_path / "page.html").read_text()
    parser = HTMLParser()
    seen = []
    parser.handle_starttag = lambda tag, attrs: seen.append((tag, dict(attrs)))
    parser.feed(page)
    assert sum(tag == "svg" for tag, _ in seen) == len(drawn) + 1 == sum(tag == "figure" for tag, _ in seen)
    assert not [attrs for tag, attrs in seen if tag in ("script", "link", "img", "iframe")]
    resources = [attrs[key] for _, attrs in seen for key in ("src", "href", "xlink:href") if key in attrs]
    assert all(address.startswith("#") for address in resources)
    assert "@import" not in page
    assert "url(http" not in page
    assert page.count(results.provenance(result)) >= len(drawn) + len(list(tables(result)))  # under each of them
    assert "not &lt;there&gt;" in page
    assert any("slower" in (attrs.get("class") or "") for tag, attrs in seen if tag == "td")
    assert (tmp_path / "page.md").read_text() == markdown(result)
    again = write_page(result, tmp_path / "again.html").read_text()
    assert again == page


def test_commit_outside_git(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.commit() == (None, None)


def test_readme_shows_the_committed_figures():
    readme = README.read_text()
    assert README_TABLE.search(readme)
    assert fill_readme(readme) == readme, "run `make plot`"
