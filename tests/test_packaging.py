"""What a user installs: the wheel and the sdist hold the package, all of it and nothing else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fastlstm

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {f"fastlstm/{path.name}" for path in (ROOT / "fastlstm").glob("*.py")}
KERNELS = {path.name for path in (ROOT / "kernels").glob("*.py")}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Build an sdist, and a wheel from it, out of a copy of the tree; return (sdist, wheel)."""
    pytest.importorskip("build")
    tree = tmp_path_factory.mktemp("tree") / "fastlstm"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=ignored)
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def test_wheel_holds_the_package_and_nothing_else(distributions):
    _, wheel = distributions
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = SOURCES | {f"fastlstm/kernels/{name}" for name in KERNELS}
    assert names == expected | {"fastlstm/py.typed", "fastlstm/kernels/README.md"}


def test_wheel_works_by_itself(distributions, tmp_path):
    _, wheel = distributions
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    program = (
        "import fastlstm, torch; print(fastlstm.__file__); print(fastlstm.LSTM(3, 4)(torch.ones(2, 1, 3))[0].shape)"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert str(tmp_path) in result.stdout
    assert "torch.Size([2, 1, 4])" in result.stdout


def test_sdist_holds_what_it_takes_to_build_test_and_benchmark(distributions):
    sdist, _ = distributions
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= SOURCES | {f"kernels/{name}" for name in KERNELS}
    assert names >= {f"tests/{path.name}" for path in (ROOT / "tests").glob("*.py")}
    for folder in ("benchmarks", "examples"):
        assert names >= {f"{folder}/{path.name}" for path in (ROOT / folder).glob("*.py")}
    assert names >= {"LICENSE", "README.md", "Makefile", "constraints.txt", "pyproject.toml", "setup.py"}


@pytest.mark.skipif(sys.platform == "win32", reason="a link needs a privilege there")
def test_an_unpacked_sdist_gets_its_link(distributions, tmp_path):
    sdist, _ = distributions
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (root,) = tmp_path.iterdir()
    assert not (root / "fastlstm" / "kernels").exists()
    subprocess.run([sys.executable, "setup.py", "--name"], cwd=root, capture_output=True, check=True)
    assert (root / "fastlstm" / "kernels" / "launch.py").is_file()


def test_the_suite_is_collected_without_triton(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['triton'] = None\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:]
    assert "tests/test_kernels.py" in result.stdout  # skipped, for want of triton


def test_version_is_the_same_everywhere():
    pyproject = (ROOT / "pyproject.toml").read_text()
    match = re.search(r'^version = "(.+)"', pyproject, re.MULTILINE)
    assert match is not None
    version = match.group(1)
    assert fastlstm.__version__ == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_a_checkout_has_no_top_level_kernels_package():
    """With an __init__.py the folder would shadow the package `kernels` for whoever stands in the checkout."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
