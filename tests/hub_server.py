"""The part of the Hugging Face Hub that relays and datasets need, as an HTTP server of this process."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_writer"


@dataclass
class Repository:
    """Commits with all their files, and what branches and tags point to."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        content = repr((len(self.commits), sorted(files.items()))).encode()
        sha = hashlib.sha1(content).hexdigest()
        self.commits[sha], self.refs[branch] = dict(files), sha
        return sha

    def find(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)


class FakeHub:
    """Repositories by USER/NAME. requests: (method, path) of each request."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.url = ""
        self.failing: str | None = None  # pattern of paths that are answered by 403

    def downloaded(self) -> list[str]:
        return [
            path.partition("/resolve/")[2].partition("/")[2]
            for verb, path in self.requests
            if verb == "GET" and "/resolve/" in path
        ]


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, content: Any = b"", status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str = "", message: str = "refused") -> None:
        headers = {"X_Error_Code": code} if code else {}
        self.answer(b"", status, X_Error_Message=message, **headers)

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.requests.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.hub.failing is not None and re.search(self.hub.failing, path):
            return self.refuse(403, message="no permission")
        writer = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if path == "api/whoami-v2":
            return (
                self.answer({"name": "user", "type": "user"}) if writer else self.refuse(401, message="Invalid token")
            )
        if path == "api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "api/repos/create":
            return self.create(json.loads(body))
        api = re.fullmatch(r"api/(?:models|datasets)/([^/]+/[^/]+)(?:/(\w+)/(.+))?", path)
        file = re.fullmatch(r"(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = api or file
        repository = self.hub.repositories.get(match[1]) if match else None
        if match is None or repository is None or (repository.private and not writer):
            return self.refuse(404 if writer else 401, "RepoNotFound")
        if file is not None:
            return self.file(repository, file[2], file[3])
        assert api is not None
        return self.model(repository, api[1], api[2] or "revision", api[3] or "main", body)

    do_GET = do_HEAD = do_POST = handle_request  # noqa: N815

    def file(self, repository: Repository, revision: str, name: str) -> None:
        sha = repository.find(revision)
        if repository.gated:
            return self.refuse(403, "GatedRepo")
        if sha is None:
            return self.refuse(404, "RevisionNotFound")
        if name not in repository.commits[sha]:
            return self.answer(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        content = repository.commits[sha][name]
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        return self.answer(content, ETag=etag, X_Repo_Commit=sha)

    def create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.hub.repositories:
            return self.answer({"error": "exists", "url": f"{self.hub.url}/{name}"}, 409)
        private = wanted.get("visibility") == "private" or wanted.get("private") is True
        self.hub.repositories[name] = Repository(private)
        self.hub.repositories[name].commit({".gitattributes": b""})
        return self.answer({"url": f"{self.hub.url}/{name}", "name": name})

    def model(self, repository: Repository, name: str, what: str, revision: str, body: bytes) -> None:
        sha = repository.find(revision)
        if what == "branch":
            if revision in repository.refs:
                return self.answer({"error": "exists"}, 409)
            repository.refs[revision] = repository.refs["main"]
            return self.answer({})
        if sha is None:
            return self.refuse(404, "RevisionNotFound")
        if what == "revision":
            files = [{"rfilename": file} for file in repository.commits[sha]]
            return self.answer({"id": name, "sha": sha, "private": repository.private, "siblings": files})
        if what == "tree":
            content = repository.commits[sha]
            oids = {file: hashlib.sha1(data).hexdigest() for file, data in content.items()}
            return self.answer(
                [{"type": "file", "path": file, "size": len(content[file]), "oid": oid} for file, oid in oids.items()]
            )
        if what == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            return self.answer({"files": modes})
        assert what == "commit"
        files = dict(repository.commits[sha])
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del files[line["value"]["path"]]
        commit = repository.commit(files, revision)
        return self.answer({"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    """Start the server; yields its content."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
