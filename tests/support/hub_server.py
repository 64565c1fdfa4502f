"""A hub on 127.0.0.1 for the real huggingface_hub client: the routes that it calls, and faults.

Repositories lie in a directory tree ``root/<repo id>/<commit>/<files>``; ``publish`` adds a commit
and moves a branch to it. Served are

    GET       /api/models/<id>[/revision/<revision>]     commit and files, with sizes and hashes
    GET       /api/models/<id>/refs                      branches, tags, pull requests
    HEAD, GET /<id>/resolve/<revision>/<file>            ETag, X-Repo-Commit, X-Linked-*, Range
    uploads                                              see hub_uploads.py

A ``Fault`` on a repository makes some of its requests fail as the hub makes them fail.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from time import sleep as pause  # itself, whatever tests put in its place
from types import TracebackType
from urllib.parse import unquote, urlsplit

from tests.support.hub_uploads import Uploads

LFS_SUFFIXES = (".safetensors", ".bin", ".pth")


@dataclass
class Fault:
    """What goes wrong, for requests ``on`` the "api", on "resolve" (whole files), on "range" (the
    beginning of one), or on all of them (None).

    With a ``status``, the answer is an error. Otherwise the file is served, but the connection
    ends after ``drop_after`` bytes of a body, or the body is ``corrupt`` (right size, wrong bytes),
    or the headers announce ``extra_size`` bytes more than there are, or a range that was asked for
    is ignored (``whole``), or there is a pause of ``delay`` seconds between two thousandths of
    the body. ``file`` confines a fault to one file, ``times`` to that many requests.
    """

    on: str | None = None
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    drop_after: int | None = None
    corrupt: bool = False
    extra_size: int = 0
    whole: bool = False
    delay: float = 0
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
    private: bool = False
    after_listing: Callable[[], object] | None = None
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
        self.objects: dict[str, bytes] = {}
        """Large files that were uploaded, by sha256."""
        self.writer: str | None = None
        """The one token that may write; without one any may."""
        self.refuse: dict[str, list[int]] = {}
        """{part of a path: statuses} of uploads that fail, each once."""
        self.regular = True
        """Whether all files are uploaded within their commit, or those with LFS_SUFFIXES first."""
        self.ranges: list[str] = []
        """The files of which the beginning was asked for, in order."""
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

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a repository holds."""
        repository = self.repositories[repo_id]
        commit = repository.commit_of(revision)
        assert commit is not None
        root = repository.directory / commit
        paths = [path for path in sorted(root.rglob("*")) if path.is_file()]
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}

    def downloads(self) -> list[str]:
        """The files that were asked for whole, or from some byte to their end, in order."""
        return [
            path.split("/resolve/")[1].split("/", 1)[1]
            for method, path in self.requests
            if method == "GET" and "/resolve/" in path
        ]


class _Handler(Uploads):
    hub: HubServer

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        if "/tree/" in path:
            repo_id, _, revision = path.removeprefix("/api/models/").partition("/tree/")
            self.send_tree(repo_id, unquote(revision))
            return
        if path.startswith("/api/models/"):
            repo_id, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            on, file = "api", None
        else:
            repo_id, _, rest = path[1:].partition("/resolve/")
            revision, _, file = rest.partition("/")
            on = "range" if self._wants_beginning() else "resolve"
        if on == "range":
            self.hub.ranges.append(str(file))
        else:
            self.hub.requests.append((self.command, path))
        refs = repo_id.endswith("/refs")
        repository = self.hub.repositories.get(repo_id.removesuffix("/refs"))
        if repository is None or not self._may_read(repository):
            self.fail(401, {"X-Error-Code": "RepoNotFound"})
            return
        fault = repository.fault
        # A fault of bodies waits for one, so that `times` counts what was spoiled.
        if fault and not fault.status and self.command == "HEAD" and not fault.extra_size:
            fault = None
        if fault and not fault.strikes(on, file):
            fault = None
        if fault and fault.status:
            self.fail(fault.status, fault.headers)
            return
        if refs:
            self._list_refs(repository)
            return
        commit = repository.commit_of(unquote(revision) or "main")
        if commit is None:
            self.fail(404, {"X-Error-Code": "RevisionNotFound"})
        elif file is None:
            self._list(repo_id, repository, commit)
        elif not (repository.directory / commit / unquote(file)).is_file():
            self.fail(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        else:
            self._serve(repository.directory / commit / unquote(file), commit, fault or Fault())

    def _wants_beginning(self) -> bool:
        return not self.headers.get("Range", "-").endswith("-")

    def _may_read(self, repository: Repository) -> bool:
        sent = self.headers.get("Authorization")
        return repository.token is None or sent == f"Bearer {repository.token}"

    def _list(self, repo_id: str, repository: Repository, commit: str) -> None:
        root = repository.directory / commit
        siblings = []
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            size = path.stat().st_size
            entry: dict[str, object] = {
                "rfilename": path.relative_to(root).as_posix(),
                "size": size,
                "blobId": _git_sha1(path),
            }
            if path.name.endswith(LFS_SUFFIXES):
                entry["lfs"] = {"sha256": _sha256(path), "size": size, "pointerSize": 134}
            siblings.append(entry)
        if repository.after_listing is not None:
            repository.after_listing()
        self.send_json(
            {"id": repo_id, "sha": commit, "siblings": siblings, "private": repository.private}
        )

    def _list_refs(self, repository: Repository) -> None:
        found: dict[str, list[dict[str, str]]] = {"branches": [], "converts": [], "tags": []}
        found["pullRequests"] = []
        for name, commit in repository.refs.items():
            kind = "pullRequests" if name.startswith("refs/pr/") else "branches"
            ref = name if name.startswith("refs/") else f"refs/heads/{name}"
            found[kind].append({"name": name, "ref": ref, "targetCommit": commit})
        self.send_json(found)

    def _serve(self, path: Path, commit: str, fault: Fault) -> None:
        size = path.stat().st_size
        etag = _sha256(path) if path.name.endswith(LFS_SUFFIXES) else _git_sha1(path)
        start, end = 0, size
        wanted = None if fault.whole else self.headers.get("Range")
        if wanted is not None:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1, end) if last else end
        self.send_response(200 if wanted is None else 206)
        if wanted is not None:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.send_header("Content-Length", str(end - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("X-Linked-Etag", f'"{etag}"')
        self.send_header("X-Linked-Size", str(size + fault.extra_size))
        self.end_headers()
        if self.command == "GET":
            if fault.drop_after is not None:
                end = min(end, start + fault.drop_after)
            step = max(1, size // 1000) if fault.delay else 1 << 20
            with path.open("rb") as file, suppress(ConnectionError):  # who has seen enough
                file.seek(start)
                while (left := end - file.tell()) > 0:
                    piece = file.read(min(step, left))
                    self.wfile.write(bytes(b ^ 1 for b in piece) if fault.corrupt else piece)
                    pause(fault.delay)


@functools.cache
def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@functools.cache
def _git_sha1(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
