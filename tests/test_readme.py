"""What the README prints must run as printed."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from circuit_generalization.cli import build_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def commands():
    joined = "\n".join(blocks("bash")).replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.startswith("circuit-gen ")]


@pytest.mark.slow
def test_the_python_lines_run(tmp_path):
    (code,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "active" in done.stdout


@pytest.mark.parametrize("command", commands())
def test_a_command_line_is_understood(command):
    build_parser().parse_args(shlex.split(command, comments=True)[1:])


def test_there_are_commands():
    assert {"measure", "score"} <= {shlex.split(c)[1] for c in commands()}


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#]+)\)", README))
def test_a_link_or_picture_is_there(target):
    assert target.startswith("https://") or (ROOT / target).exists()


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"`?make ([a-z]+)`?", "\n".join(blocks("bash")) + " ".join(re.findall(r"`make [a-z]+`", README)))):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
