# SPDX-License-Identifier: Apache-2.0
"""
What users install: the wheel that is built from the sdist, in an environment of its own, away from the repository.

Nothing is downloaded: the environment borrows the libraries of the one that runs the tests.
"""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from endotrl import __version__


pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
ALONE = {"PYTHONPATH": "", "COLUMNS": "80"}


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, env={**os.environ, **env})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        file.extractall(folder, filter="data")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=folder / f"endotrl-{__version__}")
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scripts of an environment with the wheel, and with the libraries, but not the endotrl, of this one."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    # Files of that folder that name further ones, such as an editable endotrl, are not read.
    (site_packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "--disable-pip-version-check")
    run(*pip, "install", "-qq", "--no-deps", "--no-index", wheel, cwd=folder)
    return folder / "bin"


def test_wheel_and_sdist_are_whole(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = run("git", "ls-files", "endotrl", "recipes/*/*", "accelerate_configs", cwd=ROOT).splitlines()
    shipped = {path if path.startswith("endotrl/") else f"endotrl/_shipped/{path}" for path in tracked}
    assert len(shipped) > 200 and shipped <= names
    metadata = message_from_bytes(zipfile.ZipFile(wheel).read(f"endotrl-{__version__}.dist-info/METADATA"))
    assert metadata["Version"] == __version__ and f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
    (sdist,) = wheel.parent.glob("*.tar.gz")
    inside = {name.partition("/")[2] for name in tarfile.open(sdist).getnames()}
    assert {"Makefile", "RELEASE.md", "constraints/cpu.txt", "tests/conftest.py", "studies/collapse.py"} <= inside
    assert not any(name.startswith((".ci", ".github", "dist")) for name in inside)


def test_commands(installed: Path, tmp_path: Path) -> None:
    endotrl = installed / "endotrl"
    assert run(endotrl, "--version", cwd=tmp_path, **ALONE) == f"endotrl {__version__}\n"
    assert "qwen2.5-math-7b/grpo.yaml" in run(endotrl, "recipes", cwd=tmp_path, **ALONE)
    config = Path(run(endotrl, "recipes", "zero3.yaml", cwd=tmp_path, **ALONE).strip())
    assert "zero_stage: 3" in config.read_text() and config.is_relative_to(installed.parent)
    run(endotrl, "recipes", "smollm2-135m", "--copy", tmp_path, cwd=tmp_path, **ALONE)
    assert (tmp_path / "smollm2-135m" / "pairs.jsonl").is_file()


USE = """
import sys
from pathlib import Path

import endotrl
from endotrl.demo.parts import LOOK, look
from endotrl.demo.progress import Progress
from endotrl.launch import make_parser
from endotrl.launch.data import load_prompts
from endotrl.trainers.dense_grpo_config import DenseGRPOConfig
from rich.console import Console

environment, folder = map(Path, sys.argv[1:])
assert Path(endotrl.__file__).is_relative_to(environment), endotrl.__file__
words = ["--config", "endotrl://smollm2-135m/grpo.yaml", "--output_dir", str(folder), "--use_cpu", "true"]
parsed = make_parser(DenseGRPOConfig).parse_args_and_config(words)
rows, _ = load_prompts(parsed[0], parsed[1], parsed[-1])
assert parsed[-2].model_name_or_path == "quickstart" and len(rows) > 100
console, progress = Console(width=80), Progress({LOOK: 1.0})
look(progress, console.print)
progress.close()
"""


def test_recipe_and_demo(installed: Path, tmp_path: Path, smollm2_path: str) -> None:
    """A recipe by its name, with its data; and what the demo shows first, with the real model."""
    shown = run(installed / "python", "-c", USE, installed.parent, tmp_path, cwd=tmp_path, **ALONE)
    paris, lyon = (
        float(line.split("reward ")[1].split()[0].replace("−", "-")) for line in shown.splitlines() if "nats" in line
    )
    assert lyon < paris < 0
