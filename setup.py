"""The package map; everything else is in pyproject.toml.

`kernels/` stands at the top of the tree and is imported as `fastlstm.kernels`. The mapping serves wheels and
sdists; the committed symlink `fastlstm/kernels` serves a bare checkout, an editable install and type checkers. An
unpacked sdist has none, and gets it here.
"""

from contextlib import suppress
from pathlib import Path

from setuptools import setup

link = Path(__file__).parent / "fastlstm" / "kernels"
if not link.exists():
    with suppress(OSError):  # Windows asks for a privilege; what it lacks there, it has no triton for
        link.symlink_to(Path("..", "kernels"), target_is_directory=True)

setup(
    packages=["fastlstm", "fastlstm.kernels"],
    package_dir={"fastlstm": "fastlstm", "fastlstm.kernels": "kernels"},
    package_data={"fastlstm": ["py.typed"], "fastlstm.kernels": ["README.md"]},
)
