"""The package map; everything else is in pyproject.toml.

`kernels/` stands at the top of the tree and is imported as `fastlstm.kernels`. The mapping serves wheels and
sdists; the committed symlink `fastlstm/kernels` serves a bare checkout and type checkers.
"""

from setuptools import setup

setup(
    packages=["fastlstm", "fastlstm.kernels"],
    package_dir={"fastlstm": "fastlstm", "fastlstm.kernels": "kernels"},
    package_data={"fastlstm": ["py.typed"], "fastlstm.kernels": ["README.md"]},
)
