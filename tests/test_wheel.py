"""The built wheel, installed away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT, TINY


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", directory, ROOT],
        check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = directory.glob("repnet-*.whl")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
         "--target", directory / "site", wheel],
        check=True, capture_output=True,
    )  # fmt: skip
    return directory / "site"


def installed(site: Path, command: str, *arguments: str, cwd: Path) -> str:
    """Run a console script; only the installed package is on the path, not the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [site / "bin" / command, *arguments],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_commands_work_from_any_directory(site: Path, tmp_path: Path) -> None:
    output = installed(site, "repnet-train", *TINY, "hydra.run.dir=run", cwd=tmp_path)
    command = output.strip().splitlines()[-1].split()
    assert command[0] == "repnet-deploy"
    installed(site, *command, cwd=tmp_path)
    assert (tmp_path / "run" / "deploy" / "model.safetensors").exists()
    script = "import repnet; print(repnet.__file__, len(repnet.list_models()))"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    path, models = result.stdout.split()
    assert Path(path).is_relative_to(site)
    assert int(models) == len(list((ROOT / "configs" / "model").glob("*.yaml")))
