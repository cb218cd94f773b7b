"""A hub on 127.0.0.1 for tests: repositories in memory, served with the protocol of the real one.

Model info with files and sizes, files by commit with ETag and X-Repo-Commit, weights behind a redirect to
another host name with their sha256 as X-Linked-Etag, ranges; and gates and connections that break off. Data
sets are listed as a tree, too. Models can be pushed, every file within the commit itself.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_DATASET = r"(datasets/[^/]+/[^/]+)"
_MODEL = r"models/([^/]+/[^/]+)"
_NAME = r"(?:models/)?((?:datasets/)?[^/]+/[^/]+)"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repository:
    files: dict[str, bytes]
    is_gated: bool = False
    cuts: list[int] = field(default_factory=list)
    """Bytes after which the next downloads of weights break off, one entry each."""
    weights_status: int = 200
    """With another status the host of the weights refuses them."""
    stated_sizes: dict[str, int] = field(default_factory=dict)
    """Sizes that the listing states instead of the true ones."""
    served: dict[str, bytes] = field(default_factory=dict)
    """Bytes that are sent instead of the true ones."""
    is_private: bool = False


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    authorization: str | None


class Hub:
    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.datasets: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.write_status = 200
        """With another status whoever wants to write is refused."""
        self.is_stopped = False
        self.server = _Server(("127.0.0.1", 0), _Handler)
        self.server.hub = self
        self.port = self.server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self.is_stopped = True  # connections that are kept alive fall silent too
        self.server.shutdown()
        self.server.server_close()

    def downloads(self, suffix: str) -> list[Request]:
        return [r for r in self.requests if r.method == "GET" and r.path.endswith(suffix)]


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    try:
        yield hub
    finally:
        hub.stop()


class _Server(ThreadingHTTPServer):
    hub: Hub


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_Server"

    @property
    def hub(self) -> "Hub":
        return self.server.hub

    def do_HEAD(self) -> None:
        self.respond(is_head=True)

    def do_GET(self) -> None:
        self.respond(is_head=False)

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        self.hub.requests.append(Request("POST", path, None, self.headers.get("Authorization")))
        if path == "/api/validate-yaml":
            self.answer({"warnings": [], "errors": []})
        elif path == "/api/repos/create" or re.fullmatch(
            r"/api/models/[^/]+/[^/]+/(preupload|commit)/main", path
        ):
            self.written(path, asked)
        else:
            self.asked(asked)

    def asked(self, asked: bytes) -> None:
        if match := re.fullmatch(rf"/api/{_DATASET}/paths-info/(.+)", self.path):
            paths = json.loads(asked)["paths"]
            self.tree(
                match[1], match[2], lambda file: any(f"{file}/".startswith(f"{path}/") for path in paths)
            )
        else:
            self.refuse(404, "EntryNotFound")

    def written(self, path: str, asked: bytes) -> None:
        """What a push asks for: a repository, how each file is to be sent, and the commit with the files."""
        if self.hub.write_status != 200:
            self.refuse(self.hub.write_status, "")
        elif path == "/api/repos/create":
            values = json.loads(asked)
            name = f"{values['organization']}/{values['name']}"
            is_private = values.get("visibility") == "private"
            if name in self.hub.repositories:
                self.answer({"url": f"{self.hub.endpoint}/{name}"}, status=409)
            else:
                self.hub.repositories[name] = Repository({}, is_private=is_private)
                self.answer({"url": f"{self.hub.endpoint}/{name}", "name": name, "private": is_private})
        elif path.endswith("/preupload/main"):
            files = [file["path"] for file in json.loads(asked)["files"]]
            modes = [{"path": file, "uploadMode": "regular", "shouldIgnore": False} for file in files]
            self.answer({"files": modes})
        else:
            name = "/".join(path.split("/")[3:5])
            for line in map(json.loads, asked.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.hub.repositories[name].files[line["value"]["path"]] = content
                elif line["key"] == "deletedFile":
                    del self.hub.repositories[name].files[line["value"]["path"]]
            self.answer({"commitUrl": f"{self.hub.endpoint}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    def answer(self, values: object, *, status: int = 200) -> None:
        self.send(status, {"Content-Type": "application/json"}, json.dumps(values).encode())

    def log_message(self, format: str, *args: object) -> None:
        pass

    def respond(self, *, is_head: bool) -> None:
        if self.hub.is_stopped:
            self.close_connection = True
            return
        path = self.path.partition("?")[0]
        self.hub.requests.append(
            Request(self.command, path, self.headers.get("Range"), self.headers.get("Authorization"))
        )
        if match := re.fullmatch(rf"/api/{_NAME}(?:/revision/(.+))?", path):
            self.info(match[1], match[2] or "main")
        elif match := re.fullmatch(rf"/api/{_MODEL}/tree/([^/]+)", path):
            self.tree(match[1], match[2], lambda file: True)
        elif match := re.fullmatch(rf"/api/{_DATASET}/tree/([^/]+)(?:/(.*))?", path):
            folder = f"{match[3]}/" if match[3] else ""
            self.tree(match[1], match[2], lambda file: file.startswith(folder))
        elif match := re.fullmatch(rf"/{_DATASET}/resolve/([^/]+)/(.+)", path):
            self.file(match[1], match[2], match[3], is_head=is_head, is_cdn=False)
        elif match := re.fullmatch(r"/(?:(cdn)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.file(match[2], match[3], match[4], is_head=is_head, is_cdn=bool(match[1]))
        else:
            self.refuse(404, "EntryNotFound")

    def found(self, name: str, revision: str) -> Repository | None:
        repository = (self.hub.datasets | self.hub.repositories).get(name.removeprefix("datasets/"))
        if repository is None:
            self.refuse(404, "RepoNotFound")
        elif revision not in ("main", COMMIT):
            self.refuse(404, "RevisionNotFound")
        else:
            return repository
        return None

    def tree(self, name: str, revision: str, is_asked: Callable[[str], bool]) -> None:
        """Files with their sizes; no folders, so a listing is as one asks for it recursively."""
        if (repository := self.found(name, revision)) is None:
            return
        if repository.is_gated:
            self.refuse(403 if self.headers.get("Authorization") else 401, "GatedRepo")
            return
        listed = [
            {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for file, content in repository.files.items()
            if is_asked(file)
        ]
        self.send(200, {"Content-Type": "application/json"}, json.dumps(listed).encode())

    def info(self, name: str, revision: str) -> None:
        if (repository := self.found(name, revision)) is None:
            return
        siblings = [
            {
                "rfilename": file,
                "size": repository.stated_sizes.get(file, len(content)),
                "blobId": "0" * 40,
            }
            for file, content in repository.files.items()
        ]
        name = name.removeprefix("datasets/")
        body = json.dumps({"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings}).encode()
        self.send(200, {"Content-Type": "application/json"}, body)

    def file(self, name: str, revision: str, file: str, *, is_head: bool, is_cdn: bool) -> None:
        if (repository := self.found(name, revision)) is None:
            return
        if repository.is_gated:
            self.refuse(403 if self.headers.get("Authorization") else 401, "GatedRepo")
        elif file not in repository.files:
            self.refuse(404, "EntryNotFound")
        elif file.endswith(".safetensors") and not is_cdn:
            self.redirect(repository.files[file])
        elif is_cdn and repository.weights_status != 200:
            self.send(repository.weights_status, {}, b"no")
        else:
            self.content(repository, file, is_head=is_head)

    def redirect(self, content: bytes) -> None:
        headers = {
            "Location": f"http://localhost:{self.hub.port}/cdn{self.path}",
            "X-Repo-Commit": COMMIT,
            "X-Linked-Size": str(len(content)),
            "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
        }
        self.send(302, headers, b"")

    def content(self, repository: Repository, file: str, *, is_head: bool) -> None:
        whole = repository.served.get(file, repository.files[file])
        start = int((self.headers.get("Range") or "bytes=0-")[6:].partition("-")[0])
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(whole).hexdigest()}"'}
        status = 200
        if "Range" in self.headers:
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(whole) - 1}/{len(whole)}"
        cut = None
        if not is_head and file.endswith(".safetensors") and repository.cuts:
            cut = repository.cuts.pop(0)
        self.send(status, headers, whole[start:], is_head=is_head, cut=cut)

    def refuse(self, status: int, code: str) -> None:
        self.send(status, {"X-Error-Code": code, "X-Error-Message": code}, b"")

    def send(
        self,
        status: int,
        headers: dict[str, str],
        body: bytes,
        *,
        is_head: bool = False,
        cut: int | None = None,
    ) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if not is_head:
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True
            self.wfile.flush()
            self.connection.close()
