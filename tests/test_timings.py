"""The file that timings are kept in: shared by processes, versions and accidents."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from fastlstm.timings import Timings, timings

TIMES = (("triton persistent-16", 0.5), ("torch", 2.0))


def test_what_is_added_is_there_in_the_next_process(tmp_path):
    first = Timings(tmp_path / "new" / "folder")
    assert first.add("a", TIMES) == TIMES
    assert first.entries == Timings(tmp_path / "new" / "folder").entries == {"a": TIMES}
    first.clear()
    assert not first.entries
    assert not Timings(tmp_path / "new" / "folder").entries
    first.clear()  # nothing left is no error


def test_entries_are_sorted_by_time(tmp_path):
    (tmp_path / "times.json").write_text('{"a": {"torch": 2, "triton persistent-16": 0.5}}')
    assert Timings(tmp_path).entries == {"a": TIMES}


def test_other_processes_entries_are_kept_and_the_first_to_write_is_right(tmp_path):
    one, other = Timings(tmp_path), Timings(tmp_path)
    one.add("a", TIMES)
    assert other.add("b", TIMES) == TIMES
    assert other.add("a", TIMES[::-1]) == TIMES
    assert set(json.loads(one.path.read_text())) == {"a", "b"}


def test_failures_stay_in_memory(tmp_path):
    failed = (("torch", 2.0), ("triton", math.inf))
    one = Timings(tmp_path)
    assert one.add("a", failed) == failed
    one.add("b", TIMES)
    assert one.entries == {"a": failed, "b": TIMES}
    assert Timings(tmp_path).entries == {"b": TIMES}
    Timings(tmp_path).add("a", TIMES)
    one.read()
    assert one.entries["a"] == failed


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"a": {"triton": 0.5, "to',
        b"\xff\xfe\x00",
        b"[1, 2]",
        b"7",
        b'{"a": 1}',
        b'{"a": {}}',
        b'{"a": {"triton": "fast"}}',
        b'{"a": {"triton": -1}}',
        b'{"a": {"triton": NaN}}',
        b'{"a": {"cutlass": 0.1, "torch": 2}}',
        b'{"a": {"triton warp-specialised": 0.1, "torch": 2}}',
    ],
)
def test_a_file_of_something_else_is_one_warning(content, tmp_path):
    path = tmp_path / "times.json"
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"times\.json, where fastlstm keeps timings, is not of .* FASTLSTM_CACHE_DIR"):
        found = Timings(tmp_path)
    assert not found.entries
    found.read()  # a second warning would be an error
    found.add("a", TIMES)
    assert json.loads(path.read_text()) == {"a": dict(TIMES)}


def test_where_nothing_can_be_written_memory_serves(tmp_path):
    (tmp_path / "file").touch()
    found = Timings(tmp_path / "file" / "folder")
    with pytest.warns(UserWarning, match="cannot be written"):
        found.add("a", TIMES)
    assert found.add("b", TIMES) == TIMES  # a second warning would be an error
    assert found.entries == {"a": TIMES, "b": TIMES}


def test_what_cannot_be_read_is_one_warning(tmp_path):
    (tmp_path / "times.json").mkdir()
    with pytest.warns(UserWarning, match="cannot be read"):
        found = Timings(tmp_path)
    assert found.add("a", TIMES) == TIMES


def test_a_writer_that_died_leaves_the_old_file(tmp_path, monkeypatch):
    found = Timings(tmp_path)
    found.add("a", TIMES)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", interrupted)
        with pytest.raises(KeyboardInterrupt):
            found.add("b", TIMES)
    assert Timings(tmp_path).entries == {"a": TIMES}
    found.add("c", TIMES)
    assert set(Timings(tmp_path).entries) == {"a", "b", "c"}


def interrupted(path, text, **_):
    path.write_bytes(text.encode()[:5])
    raise KeyboardInterrupt


WRITER = """
import sys
from pathlib import Path
from fastlstm.timings import Timings
number = int(sys.argv[2])
found = Timings(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for i in range(40):
    found.add(f"{number}.{i}", (("torch", 1.0 + number),))
    found.add(f"shared {i}", (("torch", 1.0 + number),))
print(sorted((key, times) for key, times in found.entries.items() if key.startswith("shared")))
"""


def test_many_processes_at_once(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    shared = {process.communicate(timeout=120)[0] for process in processes}
    assert [process.returncode for process in processes] == [0] * 4
    entries = Timings(tmp_path).entries
    assert set(entries) == {f"{n}.{i}" for n in range(4) for i in range(40)} | {f"shared {i}" for i in range(40)}
    # all took the same for right, whoever wrote it
    assert shared == {str(sorted((key, times) for key, times in entries.items() if key.startswith("shared"))) + "\n"}


def test_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTLSTM_CACHE_DIR", str(tmp_path))
    timings.cache_clear()
    assert timings().path == tmp_path / "times.json"
    assert timings() is timings()
    monkeypatch.delenv("FASTLSTM_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    timings.cache_clear()
    assert "fastlstm" in timings().path.parts
    timings.cache_clear()


def test_importing_fastlstm_imports_neither_triton_nor_what_the_file_needs():
    program = "import sys, torch; before = set(sys.modules); import fastlstm; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    added = {name.partition(".")[0] for name in done.stdout.split()}
    assert "fastlstm" in added
    assert not added & {"triton", "filelock", "platformdirs"}
