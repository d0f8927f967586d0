"""`scripts/set_repository.py`, run on a copy of the files that it changes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
LINK = r"\]\(([^)#\s]+)"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for folder in ("docs", "tutorials", "benchmarks", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "reports"))
    for path in ROOT.glob("[!.]*"):
        if path.is_file():
            shutil.copy(path, tmp_path)
    return tmp_path


def settle(project: Path, url: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(project / "scripts" / "set_repository.py"), url]
    return subprocess.run(command, capture_output=True, text=True)


def contents(project: Path) -> dict[str, bytes]:
    return {str(path.relative_to(project)): path.read_bytes() for path in project.rglob("*") if path.is_file()}


def test_every_file_links_to_the_repository(project: Path) -> None:
    wanted = [link for link in re.findall(LINK, (project / "README.md").read_text()) if (ROOT / link).is_file()]
    cells = {path.name: json.loads(path.read_text())["cells"] for path in (project / "tutorials").glob("*.ipynb")}
    assert settle(project, "https://github.com/someone/lens.git").returncode == 0

    url = "https://github.com/someone/lens"
    links = re.findall(LINK, (project / "README.md").read_text())
    assert all(link.startswith("https://") for link in links)
    for file in wanted:
        raw = f"https://raw.githubusercontent.com/someone/lens/main/{file}"
        assert (raw if file.endswith(".png") else f"{url}/blob/main/{file}") in links
    assert "https://github.com/decoderesearch/SAELens" in links, "other projects' links stay"

    urls = tomllib.loads((project / "pyproject.toml").read_text())["project"]["urls"]
    assert urls["Repository"] == url and all(place.startswith(url) for place in urls.values())
    assert yaml.safe_load((project / "CITATION.cff").read_text())["repository-code"] == url
    assert f"\nrepo_url: {url}\nrepo_name: someone/lens\n" in (project / "mkdocs.yml").read_text()
    for path in (project / "tutorials").glob("*.ipynb"):
        first, *rest = json.loads(path.read_text())["cells"]
        assert rest == cells[path.name][1:]
        assert f"(https://colab.research.google.com/github/someone/lens/blob/main/tutorials/{path.name})" in "".join(
            first["source"]
        )


def test_another_address_takes_the_place_of_the_first(project: Path) -> None:
    settle(project, "https://github.com/someone/lens")
    first = contents(project)
    settle(project, "https://github.com/other/glass")
    assert not [name for name, content in contents(project).items() if b"someone/lens" in content]
    settle(project, "https://github.com/someone/lens/")
    assert contents(project) == first


@pytest.mark.parametrize("url", ["git@github.com:someone/lens.git", "https://github.com/someone", "lens"])
def test_other_addresses_are_refused_before_anything_is_written(project: Path, url: str) -> None:
    before = contents(project)
    found = settle(project, url)
    assert found.returncode == 1 and found.stderr == f"{url!r} is not like https://github.com/OWNER/NAME\n"
    assert contents(project) == before
