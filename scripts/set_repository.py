"""Say where the project lives: the links that need the address of its repository.

    python scripts/set_repository.py https://github.com/OWNER/crosslens

- pyproject.toml: the URLs that PyPI shows.
- README.md: links to files become absolute, so that they work on PyPI.
- mkdocs.yml and CITATION.cff: the repository.
- Tutorials: a link that opens them in Colab.

Run with another address, and all links move there.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINK = r"(?P<open>!?\[[^\]]*\]\()(?:https://(?:raw\.githubusercontent|github)\.com/[\w.-]+/[\w.-]+/(?:blob/)?main/)?"
COLAB = "[Open in Colab]"


def set_repository(url: str, root: Path = ROOT) -> None:
    """Write the address into every file that links to the repository.

    Args:
        url: address of the repository on GitHub.
        root: folder of the project.

    Raises:
        SystemExit: the address is not that of a repository on GitHub.
    """
    found = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git|/)?", url)
    if not found:
        raise SystemExit(f"{url!r} is not like https://github.com/OWNER/NAME")
    name = found[1]
    url = f"https://github.com/{name}"
    put(root / "pyproject.toml", r"\[project\.urls\]\n(?:.+\n)+\n", "[project.scripts]", urls(url))
    put(root / "mkdocs.yml", r"repo_url: .*\nrepo_name: .*\n", "site_dir:", f"repo_url: {url}\nrepo_name: {name}\n")
    put(root / "CITATION.cff", r"repository-code: .*\n", "keywords:", f"repository-code: {url}\n")
    readme = root / "README.md"
    readme.write_text(absolute(readme.read_text(encoding="utf-8"), name, root), encoding="utf-8")
    for path in sorted((root / "tutorials").glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        title, *rest = "".join(notebook["cells"][0]["source"]).split("\n\n")
        link = f"{COLAB}(https://colab.research.google.com/github/{name}/blob/main/tutorials/{path.name})"
        parts = [title, link, *(part for part in rest if not part.startswith(COLAB))]
        notebook["cells"][0]["source"] = "\n\n".join(parts).splitlines(keepends=True)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def urls(url: str) -> str:
    """The table of `pyproject.toml`."""
    places = {
        "Repository": url,
        "Documentation": f"{url}/tree/main/docs",
        "Issues": f"{url}/issues",
        "Changelog": f"{url}/blob/main/CHANGELOG.md",
    }
    return "[project.urls]\n" + "".join(f'{name} = "{place}"\n' for name, place in places.items()) + "\n"


def put(path: Path, earlier: str, before: str, text: str) -> None:
    """Put text before the line that starts with `before`, in place of what an earlier run put there."""
    content = re.sub(earlier, "", path.read_text(encoding="utf-8"))
    head, line, tail = content.partition(f"\n{before}")
    if not line:
        raise SystemExit(f"{path} has no line {before}")
    path.write_text(f"{head}\n{text}{line[1:]}{tail}", encoding="utf-8")


def absolute(page: str, name: str, root: Path) -> str:
    """A Markdown page of the repository whose links to files are absolute; pictures are linked raw."""

    def link(found: re.Match[str]) -> str:
        if not (root / found["file"]).is_file():
            return found[0]
        picture = found["open"].startswith("!")
        place = f"https://raw.githubusercontent.com/{name}/main" if picture else f"https://github.com/{name}/blob/main"
        return f"{found['open']}{place}/{found['file']}{found['rest']}"

    return re.sub(LINK + r"(?P<file>[\w./-]+)(?P<rest>(?:#[^)]*)?\))", link, page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="such as https://github.com/OWNER/crosslens")
    set_repository(parser.parse_args().url)


if __name__ == "__main__":
    main()
