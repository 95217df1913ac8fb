# SPDX-License-Identifier: Apache-2.0
"""What README prints works when it is typed: its commands, its snippet, its links."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_evaluate import folder, workdir  # noqa: F401, fixtures

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Appended so that a run of ten minutes takes one: the command before it is README's own.
SHORT = {
    "train": "--config.train.steps=2 --config.assistant.warmup_steps=1 --config.eval.num_prompts=4 "
    "--config.eval.samples=2 --config.eval.batch_size=8 --config.data.batch_size=4",
    "evaluate": "--num_prompts=4 --samples=2 --batch_size=8",
    "sample": "",
    "convert": "",
}
ELSEWHERE = ("pip install", "venv", "benchmark", "mixture", "optimum", "ablation", "pretrain")
WEIGHTS = re.compile(r"=(sdxl_lora|runs/sdxl_lora)(?!.*dry_run)|^export ")  # needs SDXL's, or a GPU


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    """Every command line of README's bash blocks, its continued lines joined."""
    return [
        line.split(" #")[0].strip()
        for block in blocks("bash")
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip()
    ]


def ours():
    return [line for line in commands() if line.startswith("di-star ") and not WEIGHTS.search(line)]


def test_the_readme_is_a_page_of_two_hundred_lines_at_most():
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]
            assert anchor in slugs, link


def test_every_command_is_run_here_or_known_to_be_run_elsewhere():
    for line in commands():
        kind = line.split()[1] if line.startswith("di-star ") else line
        known = kind in SHORT or any(word in line for word in ELSEWHERE) or WEIGHTS.search(line)
        assert known or re.match(r"[A-Z_]+=", line), line


def environment(place):
    """For commands in a folder that has what README's have. Returns: their variables."""
    for name in ("di_star_jax", "configs"):
        (place / name).symlink_to(ROOT / name)
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(place)}
    # One device, and programs that are compiled in half the time, for each runs once or twice.
    env["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    return env | dict(line.split("=", 1) for line in commands() if re.match(r"[A-Z_]+=", line))


def run(line, place, env):
    line = line.replace("di-star ", f"{shlex.quote(sys.executable)} -m di_star_jax ", 1)
    done = subprocess.run(
        ["bash", "-c", line], cwd=place, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, line + "\n" + done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_the_readmes_commands_work_on_small_networks(folder, workdir, tmp_path):  # noqa: F811
    """The run is planned; what follows takes another's, and its reference for the teacher.

    `di-star sample` alone is in test_wheel.py, SDXL's dry runs are in test_main.py and others.
    """
    env = environment(tmp_path)
    env["METRICS"] = env["METRICS"].replace("oracle,", "")  # which reads larger pictures
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "shapes").symlink_to(workdir)
    ran = []
    for line in ours():
        kind = line.split()[1]
        if kind not in SHORT or line == "di-star sample" or "dry_run" in line:
            continue
        line = line.replace("=di_star_jax/shapes/checkpoint ", f"={folder} ")
        run(f"{line} {SHORT[kind] if kind != 'train' else '--config.dry_run=True'}", tmp_path, env)
        ran.append(kind)
    assert set(ran) == set(SHORT)
    pictures = ["out/0000.png", "teacher/0000.png", "runs/evals/after/page.html"]
    assert all((tmp_path / name).exists() for name in pictures)
    assert (tmp_path / "exported" / "model_index.json").exists()


@pytest.mark.long
def test_the_readmes_commands_and_snippet_work_in_their_order(tmp_path):
    env = environment(tmp_path)
    ran = []
    for line in ours():
        kind = line.split()[1]
        if kind not in SHORT:
            continue
        run(f"{line} {SHORT[kind] if 'dry_run' not in line else ''}", tmp_path, env)
        ran.append(kind)
    assert set(ran) == set(SHORT)
    (snippet,) = [block for block in blocks("python") if "from_pretrained" in block]
    done = subprocess.run(
        [sys.executable, "-c", snippet], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "circles.png").stat().st_size > 1000
