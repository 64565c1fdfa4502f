"""A hub on 127.0.0.1 for the real huggingface_hub client: the routes that it calls, and faults.

Repositories lie in a directory tree ``root/<repo id>/<commit>/<files>``; ``publish`` adds a commit
and moves a branch to it. Served are

    GET       /api/models/<id>[/revision/<revision>]     commit and files, with sizes and hashes
    HEAD, GET /<id>/resolve/<revision>/<file>            ETag, X-Repo-Commit, X-Linked-*, Range

A ``Fault`` on a repository makes some of its requests fail as the hub makes them fail.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".pth")


@dataclass
class Fault:
    """What goes wrong, for requests ``on`` the "api", on "resolve", or on both (None).

    With a ``status``, the answer is an error. Otherwise the file is served, but the connection
    ends after ``drop_after`` bytes of a body, or the body is ``corrupt`` (right size, wrong bytes),
    or the headers announce ``extra_size`` bytes more than there are. ``file`` confines a fault
    to one file, ``times`` to that many requests.
    """

    on: str | None = None
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    drop_after: int | None = None
    corrupt: bool = False
    extra_size: int = 0
    file: str | None = None
    times: int | None = None

    def strikes(self, on: str, file: str | None = None) -> bool:
        if self.on not in (None, on) or self.file not in (None, file) or self.times == 0:
            return False
        if self.times is not None:
            self.times -= 1
        return True


@dataclass
class Repository:
    directory: Path
    refs: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    """The one token that may read it; without one it is public."""
    fault: Fault | None = None
    after_listing: Callable[[], None] | None = None
    """Called between listing the files and answering: the moment when somebody else pushes."""

    def commit_of(self, revision: str) -> str | None:
        if (self.directory / revision).is_dir():
            return revision
        return self.refs.get(revision)


class HubServer:
    """``with HubServer(root) as hub``: serves until the block ends. ``hub.url`` is the endpoint,
    ``hub.requests`` what was asked, as (method, path)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}
        )
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def publish(self, repo_id: str, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Commit ``files`` (all of them, not a difference) and return the commit's hash."""
        repository = self.repositories.setdefault(repo_id, Repository(self.root / repo_id))
        content = b"".join(
            name.encode() + hashlib.sha1(files[name]).digest() for name in sorted(files)
        )
        commit = hashlib.sha1(repo_id.encode() + content).hexdigest()
        for name, data in files.items():
            path = repository.directory / commit / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        repository.refs[branch] = commit
        return commit

    def downloads(self) -> list[str]:
        """The files whose bytes were asked for, in order."""
        return [
            path.split("/resolve/")[1].split("/", 1)[1]
            for method, path in self.requests
            if method == "GET" and "/resolve/" in path
        ]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path))
        if path.startswith("/api/models/"):
            repo_id, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            on, file = "api", None
        else:
            repo_id, _, rest = path[1:].partition("/resolve/")
            revision, _, file = rest.partition("/")
            on = "resolve"
        repository = self.hub.repositories.get(repo_id)
        if repository is None or not self._may_read(repository):
            self._fail(401, {"X-Error-Code": "RepoNotFound"})
            return
        fault = repository.fault
        # A fault of bodies waits for one, so that `times` counts what was spoiled.
        if fault and not fault.status and self.command == "HEAD" and not fault.extra_size:
            fault = None
        if fault and not fault.strikes(on, file):
            fault = None
        if fault and fault.status:
            self._fail(fault.status, fault.headers)
            return
        commit = repository.commit_of(unquote(revision) or "main")
        if commit is None:
            self._fail(404, {"X-Error-Code": "RevisionNotFound"})
        elif file is None:
            self._list(repo_id, repository, commit)
        elif not (repository.directory / commit / unquote(file)).is_file():
            self._fail(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        else:
            data = (repository.directory / commit / unquote(file)).read_bytes()
            self._serve(data, commit, _etag(file, data), fault or Fault())

    def _may_read(self, repository: Repository) -> bool:
        sent = self.headers.get("Authorization")
        return repository.token is None or sent == f"Bearer {repository.token}"

    def _fail(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _list(self, repo_id: str, repository: Repository, commit: str) -> None:
        root = repository.directory / commit
        siblings = []
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            data = path.read_bytes()
            entry: dict[str, object] = {
                "rfilename": path.relative_to(root).as_posix(),
                "size": len(data),
                "blobId": _git_sha1(data),
            }
            if path.name.endswith(LFS_SUFFIXES):
                sha256 = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        if repository.after_listing is not None:
            repository.after_listing()
        body = json.dumps({"id": repo_id, "sha": commit, "siblings": siblings}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _serve(self, data: bytes, commit: str, etag: str, fault: Fault) -> None:
        start, end = 0, len(data)
        wanted = self.headers.get("Range")
        if wanted is not None:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1, end) if last else end
        self.send_response(200 if wanted is None else 206)
        if wanted is not None:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        self.send_header("Content-Length", str(end - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("X-Linked-Etag", f'"{etag}"')
        self.send_header("X-Linked-Size", str(len(data) + fault.extra_size))
        self.end_headers()
        if self.command == "GET":
            if fault.corrupt:
                data = bytes(byte ^ 1 for byte in data)
            if fault.drop_after is not None:
                end = min(end, start + fault.drop_after)
            self.wfile.write(data[start:end])


def _etag(name: str, data: bytes) -> str:
    if name.endswith(LFS_SUFFIXES):
        return hashlib.sha256(data).hexdigest()
    return _git_sha1(data)


def _git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
