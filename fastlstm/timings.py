"""What was timed, by kind of call: in memory, and in one JSON file that processes and environments share."""

from __future__ import annotations

import functools
import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

from fastlstm.dispatch import Times, is_implementation


@functools.cache
def timings() -> Timings:
    """Return those of this process: in FASTLSTM_CACHE_DIR, or where the system keeps a user's caches."""
    import platformdirs

    folder = os.environ.get("FASTLSTM_CACHE_DIR") or platformdirs.user_cache_dir("fastlstm", appauthor=False)
    return Timings(Path(folder))


class Timings:
    """Times by key, read once and written at each `add`. What is wrong with the file is one warning, no error.

    Attributes:
        path: the file; beside it lies its lock.
        entries: key -> (backend, milliseconds) of each candidate, infinite for one that failed. What has one that
            failed is not written: another process may have better luck.
    """

    def __init__(self, folder: Path):
        self.path = folder / "times.json"
        self.entries: dict[str, Times] = {}
        self._warned = False
        self.read()

    def read(self) -> None:
        """Take in what the file holds; where it and the memory differ it is right, unless something failed here."""
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            found = {key: _entry(entry) for key, entry in stored.items()}
            self.entries |= {key: entry for key, entry in found.items() if not _failed(self.entries.get(key, ()))}
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            self._warn(f"cannot be read ({error})")
        except (ValueError, TypeError, AttributeError):
            self._warn("is not of this package's making; it is ignored, and replaced when something is timed")

    def add(self, key: str, times: Times) -> Times:
        """Remember an entry, and return the one that stands: another process may have written it first."""
        from filelock import FileLock

        self.entries[key] = times
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock", timeout=10):
                self.read()
                kept = {key: dict(times) for key, times in sorted(self.entries.items()) if not _failed(times)}
                new = self.path.with_suffix(".new")
                new.write_text(json.dumps(kept, indent=1), encoding="utf-8")
                os.replace(new, self.path)  # a reader sees the old file or the new one
        except (OSError, NotImplementedError) as error:  # a lock that times out is an OSError
            self._warn(f"cannot be written ({error}); what is timed lasts as long as this process")
        return self.entries[key]

    def clear(self) -> None:
        """Forget everything, in the file too.

        Raises:
            OSError: the file cannot be removed.
        """
        self.entries.clear()
        self.path.unlink(missing_ok=True)

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            message = f"{self.path}, where fastlstm keeps timings, {what}. FASTLSTM_CACHE_DIR names another folder."
            warnings.warn(message, stacklevel=3)


def _failed(times: Times) -> bool:
    return any(ms == math.inf for _, ms in times)


def _entry(stored: Any) -> Times:
    """Return an entry of the file as it is kept in memory, or raise ValueError, TypeError or AttributeError."""
    times = tuple(sorted(((backend, float(ms)) for backend, ms in stored.items()), key=lambda pair: pair[1]))
    if not times or not all(is_implementation(backend) and 0 < ms < math.inf for backend, ms in times):
        raise ValueError
    return times
