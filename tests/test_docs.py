"""The pages under docs/ build without a warning, no link between pages is broken, and the two comparisons agree."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    *ROOT.glob("*.md"),
    *(page for folder in ("docs", "kernels", "benchmarks", "examples") for page in (ROOT / folder).glob("*.md")),
]


def test_docs_build_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_parser")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", ROOT / "docs", tmp_path]
    built = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert built.returncode == 0, built.stderr
    api = (tmp_path / "api.html").read_text()
    for name in ("fastlstm.LSTM", "fastlstm.LSTMCell", "fastlstm.lstm", "fastlstm.convert", "fastlstm.explain"):
        assert f'id="{name}"' in api, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def table_rows(page: Path) -> list[str]:
    """The rows of a page's table of features, from its head on, without footnotes."""
    lines = [re.sub(r"\[\^\w+\]", "", line) for line in page.read_text().splitlines()]
    begin = next(number for number, line in enumerate(lines) if line.startswith("| | fastlstm |"))
    return list(itertools.takewhile(lambda line: line.startswith("|"), lines[begin:]))


def test_readme_compares_as_the_comparison_does() -> None:
    short, full = table_rows(ROOT / "README.md"), table_rows(ROOT / "docs" / "comparison.md")
    assert len(short) > 10
    assert [row for row in full if row in short] == short  # the same rows, in the same order


def test_facts_of_the_comparison_have_sources() -> None:
    page = (ROOT / "docs" / "comparison.md").read_text()
    notes = re.findall(r"^\[\^(\w+)\]: ", page, re.MULTILINE)
    used = re.findall(r"\[\^(\w+)\](?!:)", page)
    assert sorted(notes) == sorted(set(used))
    for path in re.findall(r"`((?:tests|kernels)/[\w.]+)`", page):
        assert (ROOT / path).exists(), path
