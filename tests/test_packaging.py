"""settings.ini is the one place for metadata: whatever repeats it must agree with it."""

import importlib
import os
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import circuit_generalization

ROOT = Path(__file__).parents[1]
MIB = 2**20


def read_settings():
    config = ConfigParser(interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def lines(text):
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


SETTINGS = read_settings()
REQUIREMENTS = [Requirement(r) for key in ("requirements", "dev_requirements") for r in lines(SETTINGS[key])]
CONSTRAINTS = [Requirement(r) for r in lines((ROOT / "constraints.txt").read_text(encoding="utf-8"))]


def only_pin(name):
    """The one exact version that constraints.txt gives a package."""
    (found,) = [c for c in CONSTRAINTS if canonicalize_name(c.name) == canonicalize_name(name)]
    (specifier,) = found.specifier
    assert specifier.operator == "==", f"{found} is not an exact pin"
    return Version(specifier.version)


def test_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    installed = metadata.version(SETTINGS["lib_name"])
    assert [circuit_generalization.__version__, citation["version"], installed] == [SETTINGS["version"]] * 3


def test_licence_and_author_are_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["license"] == SETTINGS["license"] == "Apache-2.0"
    assert citation["authors"] == [{"name": SETTINGS["author"]}]
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_pyproject_repeats_no_metadata():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "project" not in pyproject
    assert pyproject["tool"]["nbdev"]["lib_path"] == SETTINGS["lib_path"]
    assert pyproject["tool"]["ruff"]["target-version"] == "py" + SETTINGS["min_python"].replace(".", "")


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda r: r.name)
def test_every_requirement_has_a_tested_version_in_its_range(requirement):
    assert len(requirement.specifier) == 2, "a range: >= what is needed, < the next major version"
    assert only_pin(requirement.name) in requirement.specifier


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=lambda c: c.name)
def test_every_constraint_is_one_exact_pin(constraint):
    assert only_pin(constraint.name)


def test_conda_environment_installs_the_same():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    *conda, pip = environment["dependencies"]
    assert environment["name"] == "circuit-gen"
    assert conda == [f"python={SETTINGS['min_python']}", "pip"]
    assert pip == {"pip": ["-c constraints.txt", "-e .[dev]"]}


def test_command_starts_a_function_that_exists():
    command, target = SETTINGS["console_scripts"].split("=")
    module, function = target.split(":")
    (installed,) = metadata.entry_points(group="console_scripts", name=command)
    assert installed.value == target
    assert callable(getattr(importlib.import_module(module), function))


def test_an_installation_holds_every_data_file(tmp_path):
    data = ROOT / SETTINGS["lib_path"] / "data"
    expected = {p.relative_to(data): p.stat().st_size for p in data.rglob("*") if p.is_file()}
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)],
        cwd=ROOT, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}, check=True, capture_output=True,
    )
    built = tmp_path / SETTINGS["lib_path"] / "data"
    assert expected
    assert {p.relative_to(built): p.stat().st_size for p in built.rglob("*") if p.is_file()} == expected
    assert sum(expected.values()) <= 30 * MIB
