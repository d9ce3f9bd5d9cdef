"""A hub on this machine: what huggingface_hub asks for over HTTP to create, fill and read a repository of models."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_test"


@dataclass
class Repository:
    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)  # the files that came by LFS
    commits: list[str] = field(default_factory=list)  # their messages

    @property
    def sha(self) -> str:
        return hashlib.sha1(f"{self.commits}{sorted(self.files.items())}".encode()).hexdigest()


class FakeHub(ThreadingHTTPServer):
    """Serves repositories on a free port of this machine.

    Attributes:
        failing: the status and the text of every answer to POST; None where they are as they should be.
        requests: methods and paths.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.failing: tuple[int, str] | None = None
        self.requests: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serving() -> Iterator[FakeHub]:
    hub = FakeHub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


class Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self, value: Any = None, status: int = 200, data: bytes | None = None, **headers: str) -> None:
        body = json.dumps(value).encode() if data is None else data
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code: str) -> None:
        self.answer({"error": "not found"}, 404, X_Error_Code=code)

    def authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    @property
    def route(self) -> str:
        return unquote(urlsplit(self.path).path)

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append(f"{self.command} {self.route}")
        if self.command == "POST" and self.server.failing:
            status, text = self.server.failing
            self.answer({"error": text}, status)
        elif self.command == "PUT":
            self.server.objects[self.route.rpartition("/")[2]] = body
            self.answer()
        elif self.route == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.command == "POST" and not self.authorised():
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.route == "/api/repos/create":
            self.create(json.loads(body))
        elif self.route.startswith("/api/models/"):
            self.models(self.route.removeprefix("/api/models/").split("/"), body)
        elif self.route.endswith(".git/info/lfs/objects/batch"):
            self.large_files(json.loads(body))
        else:
            self.resolve()

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.server.repositories:
            self.answer({"error": "You already created this model repo", "url": f"{self.server.address}/{name}"}, 409)
            return
        self.server.repositories[name] = Repository(asked.get("visibility") == "private" or bool(asked.get("private")))
        self.answer({"url": f"{self.server.address}/{name}", "name": name, "id": name})

    def models(self, parts: list[str], body: bytes) -> None:
        name, rest = "/".join(parts[:2]), parts[2:]
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and not self.authorised()):
            self.missing("RepoNotFound")
        elif not rest or rest[0] == "revision":
            siblings = [{"rfilename": path} for path in repository.files]
            self.answer({"id": name, "sha": repository.sha, "private": repository.private, "siblings": siblings})
        elif rest[0] == "tree":
            self.answer([self.entry(repository, path) for path in repository.files])
        elif rest[0] == "preupload":
            modes = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for each in json.loads(body)["files"]
            ]
            self.answer({"files": modes})
        else:
            self.commit(name, repository, [json.loads(line) for line in body.splitlines()])

    def entry(self, repository: Repository, path: str) -> dict[str, Any]:
        data = repository.files[path]
        found: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        if path in repository.large:
            found["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return found

    def commit(self, name: str, repository: Repository, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repository.commits.append(value["summary"])
            elif line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.server.objects[value["oid"]]
                repository.large.add(value["path"])
            elif line["key"] == "deletedFile":
                del repository.files[value["path"]]
        url = f"{self.server.address}/{name}/commit/{repository.sha}"
        self.answer({"commitUrl": url, "commitOid": repository.sha, "success": True})

    def large_files(self, asked: dict[str, Any]) -> None:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.server.address}/objects/{each['oid']}"}}}
            for each in asked["objects"]
        ]
        self.answer({"transfer": "basic", "objects": objects})

    def resolve(self) -> None:
        name, _, path = self.route.strip("/").partition("/resolve/")
        repository = self.server.repositories.get(name)
        file = path.partition("/")[2]
        if repository is None or (repository.private and not self.authorised()):
            self.missing("RepoNotFound")
        elif file not in repository.files:
            self.missing("EntryNotFound")
        else:
            entry = self.entry(repository, file)
            etag = entry.get("lfs", entry)["oid"]
            self.answer(data=repository.files[file], X_Repo_Commit=repository.sha, ETag=f'"{etag}"')
