"""A small Hugging Face hub on 127.0.0.1 that serves a folder in the layout of the hub's cache, and fails on demand."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Fault = Callable[[str, str, str, int], str | None]
"""Fault of a request, given method, repository, file and the number of earlier requests like it: None, "drop" (half of
the file, then the connection is reset), "cut" (reset before the file), "short" (half of the file, declared as all of
it), "etag X" (X as its checksum), or a status code."""


def commit_of(revision: str) -> str:
    return hashlib.sha1(revision.encode()).hexdigest()


def revision_folder(hub: Path, repo: str, revision: str, commit: str | None = None) -> Path:
    """The folder of a revision in a hub cache; writes its ref but does not create the folder."""
    base = hub / f"models--{repo.replace('/', '--')}"
    (base / "refs").mkdir(parents=True, exist_ok=True)
    (base / "refs" / revision).write_text(commit or commit_of(revision))
    return base / "snapshots" / (commit or commit_of(revision))


def run_program(program: list[str], home: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python with its own Hugging Face home."""
    found = {**os.environ, "HF_HOME": str(home), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env}
    for key in ("HF_HUB_CACHE", "HF_TOKEN"):
        found.pop(key, None)
    command = [sys.executable, *program]
    return subprocess.run(command, env=found, capture_output=True, text=True, cwd=home, check=False)


class serve:
    """The parts of the hub that downloads and lists of revisions need; `asked` records every request.

    Repositories of the owner `gated` are gated.
    """

    def __init__(self, hub: Path, fault: Fault = lambda *_: None) -> None:
        asked: list[str] = []
        counts: Counter[tuple[str, str, str]] = Counter()

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                asked.append(f"{self.command} {self.path}")
                parts = self.path.strip("/").split("/")
                if parts[:2] == ["api", "models"]:
                    self.answer_api([unquote(part) for part in parts[2:]])
                elif parts[1].startswith("models?"):
                    self.answer_models(parse_qs(urlsplit(self.path).query))
                else:
                    self.answer_file(*parts[:2], parts[3], "/".join(parts[4:]))

            do_GET = do_HEAD

            def answer_file(self, owner: str, repo: str, revision: str, file: str) -> None:
                base = hub / f"models--{owner}--{repo}"
                ref = base / "refs" / revision
                commit = ref.read_text() if ref.is_file() else revision
                path = base / "snapshots" / commit / file
                if owner == "gated":
                    self.refuse(403, "GatedRepo")
                elif not base.is_dir():
                    self.refuse(404, "RepoNotFound")
                elif not (base / "snapshots" / commit).is_dir():
                    self.refuse(404, "RevisionNotFound")
                elif not path.is_file():
                    self.refuse(404, "EntryNotFound", commit)
                else:
                    self.send_file(f"{owner}/{repo}", path, commit)

            def send_file(self, repo: str, path: Path, commit: str) -> None:
                kind = self.command, repo, path.name
                found = fault(*kind, counts[kind])
                counts[kind] += 1
                if found is not None and found.isdecimal():
                    self.refuse(int(found), "")
                    return
                whole = path.read_bytes()
                begin = 0
                if (span := self.headers.get("Range")) is not None:
                    begin = int(span.removeprefix("bytes=").split("-")[0])
                data = whole[begin:]
                told = len(data) // 2 if found == "short" and self.command == "GET" else len(data)
                self.send_response(206 if span else 200)
                self.send_header("Content-Length", str(told))
                if span:
                    self.send_header("Content-Range", f"bytes {begin}-{len(whole) - 1}/{len(whole)}")
                etag = (found or "").removeprefix("etag ") if (found or "").startswith("etag ") else ""
                self.send_header("ETag", f'"{etag or hashlib.sha256(whole).hexdigest()}"')
                self.send_header("X-Repo-Commit", commit)
                self.end_headers()
                if self.command == "GET":
                    sent = {"drop": len(data) // 2, "short": told, "cut": 0}.get(found or "", len(data))
                    self.wfile.write(data[:sent])
                    if found in ("drop", "cut"):
                        self.wfile.flush()
                        # close with a reset, like a broken connection
                        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        self.connection.close()

            def answer_api(self, parts: list[str]) -> None:
                base = hub / f"models--{'--'.join(parts[:2])}"
                refs = base / "refs"
                revision = parts[3].split("?")[0] if parts[2:3] == ["tree"] else ""
                ref = refs / revision
                if not refs.is_dir() or parts[2] not in ("refs", "tree"):
                    self.refuse(404, "RepoNotFound")
                elif revision:
                    root = base / "snapshots" / (ref.read_text() if ref.is_file() else revision)
                    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
                    rows = [
                        {"type": "file", "path": f.relative_to(root).as_posix(), "size": 1, "oid": "0"} for f in files
                    ]
                    self.answer(rows)
                else:
                    branches = [{"name": r.name, "ref": r.name, "targetCommit": r.read_text()} for r in refs.iterdir()]
                    self.answer({"branches": branches, "converts": [], "tags": []})

            def answer_models(self, query: dict[str, list[str]]) -> None:
                names = [path.name.removeprefix("models--").replace("--", "/", 1) for path in hub.glob("models--*")]
                (owner,), (search,) = query["author"], query.get("search", [""])
                found = [name for name in sorted(names) if name.startswith(f"{owner}/") and search in name]
                self.answer([{"id": name, "modelId": name, "tags": []} for name in found])

            def answer(self, contents: Any) -> None:
                data = json.dumps(contents).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def refuse(self, status: int, code: str, commit: str = "") -> None:
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                if commit:
                    self.send_header("X-Repo-Commit", commit)
                self.end_headers()

            def log_message(self, *_: object, **__: object) -> None:
                """Do nothing: requests are recorded instead."""

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:
                """Do nothing: clients disconnect, and connections are broken on purpose."""

        self.asked = asked
        self.server = Server(("127.0.0.1", 0), Handler)

    def __enter__(self) -> tuple[str, list[str]]:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}", self.asked

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Datasets(BaseHTTPRequestHandler):
    """The part of the hub that `datasets` asks for: cards, trees and files of the folders below `root`."""

    root: Path
    commit = "c" * 40

    def do_GET(self) -> None:
        kind, *parts = urlsplit(self.path).path.strip("/").removeprefix("api/").split("/")
        folder = self.root / "/".join(parts[:2])
        what, rest = parts[2:3], "/".join(parts[4:])
        if kind != "datasets" or len(parts) < 2 or not folder.is_dir():
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif what == ["resolve"] and (folder / rest).is_file():
            data = (folder / rest).read_bytes()
            self.answer(200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": self.commit})
        elif what == ["tree"] and (folder / rest).is_dir():
            self.answer(200, json.dumps([self.entry(folder, each) for each in (folder / rest).iterdir()]).encode())
        elif what in (["resolve"], ["tree"]):
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.commit})
        else:
            self.answer(200, json.dumps({"id": "/".join(parts[:2]), "sha": self.commit, "siblings": []}).encode())

    do_HEAD = do_GET

    def entry(self, folder: Path, path: Path) -> dict[str, Any]:
        kind = "file" if path.is_file() else "directory"
        return {"type": kind, "path": str(path.relative_to(folder)), "size": path.stat().st_size, "oid": "0"}

    def answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: object, **__: object) -> None:
        """Nothing."""


@contextmanager
def serve_datasets(root: Path) -> Generator[str, None, None]:
    """The part of the hub that `datasets` needs, for the folders owner/name below `root`; yields its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Served", (_Datasets,), {"root": root}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
