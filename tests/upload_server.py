"""A Hugging Face hub on 127.0.0.1 with repositories in memory; it implements what huggingface_hub needs for commits.

The tokens "writer" and "reader" have those rights; any other token is refused like an expired one.
Uploads of large files to repositories in `broken` fail: "refuse" with a status, "cut" by closing the connection.
"""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        whole = {**self.commits.get(self.refs.get(branch, ""), {}), **files}
        text = json.dumps(sorted((name, hashlib.sha256(data).hexdigest()) for name, data in whole.items()))
        sha = hashlib.sha1(f"{len(self.commits)} {text}".encode()).hexdigest()
        self.commits[sha] = whole
        self.refs[branch] = sha
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        sha = self.refs.get(revision, revision)
        return (sha, self.commits[sha]) if sha in self.commits else None


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.broken: dict[str, str] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that hang up, as some tests do."""


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    # ------------------------------------------------------------------ answers
    def answer(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, message: str, code: str = "") -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.answer(status, {"error": message}, headers)

    def may(self, write: bool) -> bool:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in ("writer", "reader") and (write or token):
            self.refuse(401, "Invalid credentials in Authorization header")
        elif write and token != "writer":
            self.refuse(403, "You don't have the rights to write to this repository")
        else:
            return True
        return False

    # ------------------------------------------------------------------ requests
    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if not self.may(write=False):
            return
        if parts[:2] == ["api", "models"]:
            self.describe("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
        elif len(parts) > 4 and parts[2] == "resolve":
            self.download("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self.refuse(404, "no such page")

    def find(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repository = self.server.repositories.get(name)
        if repository is None:
            self.refuse(404, "Repository not found", "RepoNotFound")
            return None
        if (found := repository.at(revision)) is None:
            self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def describe(self, name: str, revision: str) -> None:
        repository = self.server.repositories.get(name)
        about = {"id": name, "modelId": name, "private": repository is not None and repository.private}
        if repository is not None and not repository.commits:
            self.answer(200, {**about, "siblings": []})
        elif (found := self.find(name, revision)) is not None:
            self.answer(200, {**about, "sha": found[0], "siblings": [{"rfilename": path} for path in found[1]]})

    def download(self, name: str, revision: str, path: str) -> None:
        if (found := self.find(name, revision)) is None:
            return
        sha, files = found
        if path not in files:
            self.answer(404, {"error": "no entry"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return
        etag = f'"{hashlib.sha256(files[path]).hexdigest()}"'
        self.answer(200, files[path], {"ETag": etag, "X-Repo-Commit": sha})

    def do_POST(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self.may(write=True):
            return
        if parts[:3] == ["api", "repos", "create"]:
            self.create(json.loads(body))
        elif parts[-1] == "validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif parts[-1] == "batch":
            self.large_files("/".join(parts[:2]).removesuffix(".git"), json.loads(body))
        elif len(parts) == 6 and parts[4] == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            files = [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]
            self.answer(200, {"files": files})
        elif len(parts) == 6 and parts[4] == "commit":
            self.commit("/".join(parts[2:4]), parts[5], body)
        else:
            self.refuse(404, "no such page")

    def create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted.get('organization') or 'someone'}/{wanted['name']}"
        private = bool(wanted.get("private") or wanted.get("visibility") == "private")
        known = name in self.server.repositories
        self.server.repositories.setdefault(name, Repository(private))
        self.answer(409 if known else 200, {"url": f"{self.server.url}/{name}", "name": name, "id": name})

    def large_files(self, name: str, wanted: dict[str, Any]) -> None:
        where = f"{self.server.url}/large/{self.server.broken.get(name, 'whole')}"
        objects = [
            {**entry, "actions": {"upload": {"href": f"{where}/{entry['oid']}", "header": {}}}}
            for entry in wanted["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def do_PUT(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if "/cut/" in self.path:
            self.rfile.read(min(length, 100))
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        data = self.rfile.read(length)
        if "/refuse/" in self.path:
            self.refuse(400, "The provided token has expired")
            return
        self.server.large[hashlib.sha256(data).hexdigest()] = data
        self.answer(200, b"")

    def commit(self, name: str, branch: str, body: bytes) -> None:
        files: dict[str, bytes] = {}
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                files[entry["value"]["path"]] = self.server.large[entry["value"]["oid"]]
        sha = self.server.repositories[name].commit(files, branch)
        url = f"{self.server.url}/{name}/commit/{sha}"
        self.answer(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})


@contextmanager
def serve() -> Any:
    """Run a hub."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
