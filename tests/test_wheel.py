# SPDX-License-Identifier: Apache-2.0
"""The wheel, built, installed in an environment of its own, and run from an empty folder."""

import os
import shutil
import subprocess
import sys
import venv

import pytest
from test_config import ROOT


def ran(*arguments, cwd, env):
    done = subprocess.run(
        list(map(str, arguments)), cwd=cwd, env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.case("first hour 11", "first hour 28")
def test_the_wheel_has_all_that_its_commands_need(tmp_path):
    """Its dependencies are those of this environment: what is tried is what the wheel holds."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "XLA_", "JAX_"))}
    env = plain | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    source = tmp_path / "source"  # for a build leaves folders in it
    for name in ("di_star_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.py", source)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps"]
    ran(*build, "-w", tmp_path, source, cwd=tmp_path, env=env)
    (wheel,) = tmp_path.glob("di_star_jax-*.whl")
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    ran(home / "bin" / "pip", "install", "-q", "--no-deps", wheel, cwd=tmp_path, env=env)
    (site,) = home.glob("lib/python*/site-packages")
    (of_ours,) = {path for path in sys.path if os.path.isdir(os.path.join(path, "jax"))}
    # A .pth file would bring in an editable installation of this package as well.
    env["PYTHONPATH"] = os.pathsep.join([str(site), of_ours])
    empty = tmp_path / "empty"
    empty.mkdir()
    di_star = home / "bin" / "di-star"
    where = "import di_star_jax; print(di_star_jax.__file__)"
    assert str(home) in ran(home / "bin" / "python", "-c", where, cwd=empty, env=env)
    assert "train" in ran(di_star, cwd=empty, env=env)
    assert (site / "di_star_jax" / "rewards" / "collect.html").exists()
    dry = ran(di_star, "train", "--config=shapes", "--config.dry_run=True", cwd=empty, env=env)
    assert "parameters:" in dry
    assert "sdxl" in ran(di_star, "train", "--config=sdxl:sim", "--help", cwd=empty, env=env)
    ran(di_star, "sample", "--num=1", cwd=empty, env=env)
    assert (empty / "samples" / "grid.png").stat().st_size > 1000
