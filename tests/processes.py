"""How the tests start a process: forked from one that has imported what takes seconds, where the system can do that."""

from __future__ import annotations

import multiprocessing
from typing import Any

FRESH: Any = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
if FRESH == "forkserver":
    multiprocessing.set_forkserver_preload(["torch._dynamo", "matplotlib.pyplot", "rich.progress", "fastlstm"])
