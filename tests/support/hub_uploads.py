"""The routes of the hub by which a folder is uploaded, for the server of hub_server.py.

POST  /api/repos/create                               a repository, or 409 where it is there
POST  /api/models/<id>/branch/<branch>                a branch, or 409
GET   /api/models/<id>/tree/<revision>                its files
POST  /api/models/<id>/preupload/<revision>           which way each file goes
POST  /<id>.git/info/lfs/objects/batch, PUT /lfs/...  large files
POST  /api/models/<id>/commit/<revision>              the others, and what belongs to the commit
POST  /api/validate-yaml                              the card's metadata
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit


class Uploads(BaseHTTPRequestHandler):
    hub: Any

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_PUT(self) -> None:
        content = self._body()
        if self._struck():
            return
        self.hub.objects[hashlib.sha256(content).hexdigest()] = content
        self.send_json({})

    def do_POST(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path))
        content = self._body()
        if self._struck():
            return
        if path == "/api/repos/create":
            self._create(json.loads(content))
        elif path == "/api/validate-yaml":
            self.send_json({"errors": [], "warnings": []})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._batch(json.loads(content))
        else:
            repo_id, action, revision = path.removeprefix("/api/models/").rsplit("/", 2)
            repository = self.hub.repositories.get(repo_id)
            if repository is None:
                self.fail(404, {"X-Error-Code": "RepoNotFound"})
            elif action == "branch":
                self._branch(repository, unquote(revision))
            elif action == "preupload":
                self._preupload(repo_id, unquote(revision), json.loads(content))
            else:
                self._commit(repo_id, unquote(revision), content)

    def send_tree(self, repo_id: str, revision: str) -> None:
        files = self.hub.files(repo_id, revision)
        self.send_json(
            [
                {"type": "file", "path": name, "size": len(data), "oid": _git_sha1(data)}
                for name, data in files.items()
            ]
        )

    def fail(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_json(self, value: object, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _struck(self) -> bool:
        """Whether the upload was refused, by who may write or by ``hub.refuse``."""
        sent = self.headers.get("Authorization")
        by_link = self.path.startswith("/lfs/")  # signed, without a token
        if not by_link and self.hub.writer and sent != f"Bearer {self.hub.writer}":
            self.fail(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
            return True
        for part, answers in self.hub.refuse.items():
            if part in self.path and answers:
                self.fail(answers.pop(0), {})
                return True
        return False

    def _create(self, wanted: Mapping[str, Any]) -> None:
        owner = wanted.get("organization") or "me"
        repo_id = f"{owner}/{wanted['name']}"
        url = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repositories:
            self.send_json(url, 409)
            return
        self.hub.publish(repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.hub.repositories[repo_id].private = wanted.get("visibility") == "private"
        self.send_json(url)

    def _branch(self, repository: Any, name: str) -> None:
        if name in repository.refs:
            self.send_json({}, 409)
        else:
            repository.refs[name] = repository.refs["main"]
            self.send_json({})

    def _preupload(self, repo_id: str, revision: str, wanted: Mapping[str, Any]) -> None:
        files = self.hub.files(repo_id, revision)
        answers = []
        for file in wanted["files"]:
            large = not self.hub.regular and file["path"].endswith(".safetensors")
            answer = {"path": file["path"], "shouldIgnore": False}
            answer["uploadMode"] = "lfs" if large else "regular"
            if file["path"] in files:
                data = files[file["path"]]
                answer["oid"] = hashlib.sha256(data).hexdigest() if large else _git_sha1(data)
            answers.append(answer)
        self.send_json({"files": answers})

    def _batch(self, wanted: Mapping[str, Any]) -> None:
        objects = []
        for entry in wanted["objects"]:
            found: dict[str, Any] = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.hub.objects:
                found["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}
            objects.append(found)
        self.send_json({"objects": objects})

    def _commit(self, repo_id: str, revision: str, content: bytes) -> None:
        files = self.hub.files(repo_id, revision)
        for line in map(json.loads, content.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = self.hub.publish(repo_id, files, branch=revision)
        url = f"{self.hub.url}/{repo_id}/commit/{commit}"
        self.send_json({"commitUrl": url, "commitOid": commit, "success": True})


def _git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
