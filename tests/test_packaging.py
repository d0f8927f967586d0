"""What pyproject.toml, the workflow, the changelog and CITATION.cff say agrees with the code and with each other."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOW: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())

DISTRIBUTIONS = {"sklearn": "scikit-learn", "yaml": "pyyaml"}  # of modules of another name


def names(requirements: list[str]) -> set[str]:
    """Names of requirements, in small letters with hyphens."""
    return {re.split(r"[\[<>=;, ]", each)[0].lower().replace("_", "-") for each in requirements}


def imported() -> set[str]:
    """Distributions that modules of the package import, inside functions too."""
    found: set[str] = set()
    for path in (ROOT / "crosslens").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module).split(".")[0])
    found -= {"crosslens", *sys.stdlib_module_names}
    return {DISTRIBUTIONS.get(name, name.replace("_", "-")) for name in found}


def test_what_is_imported_is_required_and_the_other_way_round() -> None:
    required, labels = names(PROJECT["dependencies"]), names(PROJECT["optional-dependencies"]["labels"])
    # torch for CUDA brings triton, and Python from 3.11 on tomllib
    assert imported() - {"triton", "tomllib"} == required
    assert labels <= names(PROJECT["optional-dependencies"]["dev"])
    assert all(">=" in each for each in PROJECT["dependencies"])


def test_the_supported_pythons_are_those_of_the_workflow() -> None:
    low, high = map(int, re.findall(r"3\.(\d+)", PROJECT["requires-python"]))
    pythons = [f"3.{minor}" for minor in range(low, high)]
    classifiers = [c.removeprefix("Programming Language :: Python :: ") for c in PROJECT["classifiers"]]
    assert [c for c in classifiers if c.startswith("3.")] == pythons
    checks = WORKFLOW["jobs"]["checks"]
    assert checks["strategy"]["matrix"]["python-version"] == pythons
    assert "bash .ci/run" in [step.get("run") for step in checks["steps"]]
    assert WORKFLOW["jobs"]["distributions"]["strategy"]["matrix"]["python-version"] == pythons
    assert "make test-lowest" in [step.get("run") for step in WORKFLOW["jobs"]["lowest"]["steps"]]
    lowest = (ROOT / "Makefile").read_text().partition("\ntest-lowest:")[2].partition("\n\n")[0]
    assert f"--python {pythons[0]} " in lowest and "--resolution lowest-direct" in lowest


def test_version_and_papers_stand_everywhere_alike() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert headings[0] == str(cited["version"]) == PROJECT["version"]
    assert cited["license"] == PROJECT["license"] and cited["keywords"] == PROJECT["keywords"]
    papers = {identifier["value"] for each in cited["references"] for identifier in each["identifiers"]}
    linked = re.findall(r"arxiv\.org/abs/(\S+?)\)", (ROOT / "README.md").read_text())
    assert papers == {f"arXiv:{number}" for number in linked} and len(papers) == 2


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the source distribution has no list of files")
def test_the_source_distribution_leaves_no_file_out() -> None:
    """setuptools adds the package with its data, and the files in `always` (the README, for instance)."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    always = {"pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"}
    commands = [line.split() for line in (ROOT / "MANIFEST.in").read_text().splitlines() if line[:1] not in ("", "#")]
    folders = {name for command, *given in commands if command == "graft" for name in given} | {"crosslens"}
    files = {name for command, *given in commands if command == "include" for name in given} | always
    assert [path for path in listed if path.partition("/")[0] not in folders and path not in files] == []
    assert all((ROOT / name).exists() for name in folders | files)


def test_a_clone_beside_a_script_does_not_hide_an_editable_install(tmp_path: Path) -> None:
    """A folder called crosslens is a namespace to Python, which the finder of setuptools' default would come after."""
    pytest.importorskip("setuptools", minversion="77")
    source, wheel = tmp_path / "source", tmp_path / "wheel"
    wheel.mkdir()
    (source / "crosslens").mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    (source / "crosslens" / "__init__.py").write_text("found = True\n")
    build = f"import setuptools.build_meta as build; build.build_editable({str(wheel)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, check=True)
    (packed,) = wheel.iterdir()
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "work" / "crosslens").mkdir(parents=True)  # a clone: the package is a level further down
    script = f"import site; site.addsitedir({str(tmp_path / 'site')!r}); import crosslens; print(crosslens.found)"
    done = subprocess.run(
        [sys.executable, "-E", "-S", "-c", script], cwd=tmp_path / "work", capture_output=True, text=True, check=False
    )
    assert done.stdout == "True\n", done.stderr
