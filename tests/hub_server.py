"""A Hugging Face hub on localhost, in memory, for tests with the real client: models and data sets, branches, commits.

    with Hub() as hub:
        HfApi(endpoint=hub.endpoint, token="token").create_repo("me/x", repo_type="dataset")
        hub.requests          # [("POST", "/api/repos/create")]: a request stands here before it is answered
        hub.faults.append(Fault("GET", "resolve/.*/a.bin", 503, times=1))

Uploads are "regular": base64 within the commit.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class Fault:
    """Answer `times` requests, whose method is this and whose path matches, with a status of an error."""

    method: str
    pattern: str
    status: int
    times: int = 1


@dataclass
class Repo:
    """Commits by their id, each all files of one moment, and branches and tags."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        text = f"{len(self.commits)}{branch}{message}{sorted(files)}"
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha], self.refs[branch] = files, sha
        self.messages.append(message)
        return sha

    def sha(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)


class Hub:
    """The server; `repos` maps (type, id) to repositories, as in `("datasets", "me/x")`."""

    def __init__(self, token: str = "token") -> None:
        self.token = token
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "", **headers: str) -> None:
        super().__init__(message or code)
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": message or code, **headers}


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[Hub]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the terminal."""

    def _serve(self) -> None:
        address = urlsplit(self.path)
        path, self.query = unquote(address.path), parse_qs(address.query)
        self.hub.requests.append((self.command, path))
        body = self._body()
        try:
            for fault in self.hub.faults:
                if fault.times and fault.method == self.command and re.search(fault.pattern, path):
                    fault.times -= 1
                    raise _Refused(fault.status, message="fault of a test")
            for method, pattern, answer in ROUTES:
                found = re.fullmatch(pattern, path)
                if found and self.command in method:
                    return self._send(*answer(self, body, **found.groupdict()))
            raise _Refused(404, "EntryNotFound", f"no route for {self.command} {path}")
        except _Refused as refused:
            text = json.dumps({"error": str(refused)}).encode()
            self._send(refused.status, text, {name: value for name, value in refused.headers.items() if value})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts: list[bytes] = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        self.wfile.flush()

    # ---- what requests ask for ---------------------------------------------------------------------------------------

    def _authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _repo(self, kind: str, name: str) -> Repo:
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo.private and not self._authorised()):
            raise _Refused(404 if self._authorised() else 401, "RepoNotFound", "Repository not found")
        return repo

    def _at(self, kind: str, name: str, revision: str) -> tuple[Repo, str, dict[str, bytes]]:
        repo = self._repo(kind, name)
        if (sha := repo.sha(revision)) is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, sha, repo.commits[sha]

    def whoami(self, body: bytes) -> tuple[int, Any]:
        if not self._authorised():
            raise _Refused(401, message="Invalid credentials")
        access = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return 200, {"type": "user", "name": "me", "orgs": [], "auth": access}

    def create(self, body: bytes) -> tuple[int, Any]:
        if not self._authorised():
            raise _Refused(401, message="Invalid credentials")
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        key = (f"{asked.get('type') or 'model'}s", name)
        url = f"{self.hub.endpoint}/{'' if key[0] == 'models' else key[0] + '/'}{name}"
        if key in self.hub.repos:
            return 409, {"error": "You already created this repo", "url": url}
        repo = self.hub.repos[key] = Repo(private=asked.get("private") or asked.get("visibility") == "private")
        repo.commit("main", {".gitattributes": b""}, "initial commit")
        return 200, {"url": url, "name": name, "id": name}

    def delete(self, body: bytes) -> tuple[int, Any]:
        asked = json.loads(body)
        key = (f"{asked.get('type') or 'model'}s", f"{asked.get('organization') or 'me'}/{asked['name']}")
        self._repo(*key)
        del self.hub.repos[key]
        return 200, {}

    def validate(self, body: bytes) -> tuple[int, Any]:
        return 200, {"errors": [], "warnings": []}

    def info(self, body: bytes, kind: str, name: str, rev: str | None = None) -> tuple[int, Any]:
        repo, sha, files = self._at(kind, name, rev or "main")
        fixed = {"gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0}
        dates = {"lastModified": DATE, "createdAt": DATE}
        siblings = [{"rfilename": path} for path in files]
        return 200, {
            "_id": name,
            "id": name,
            "sha": sha,
            "private": repo.private,
            "siblings": siblings,
            **fixed,
            **dates,
        }

    def tree(self, body: bytes, kind: str, name: str, rev: str, folder: str | None = None) -> tuple[int, Any]:
        _, _, files = self._at(kind, name, rev)
        inside = [path for path in files if not folder or path.startswith(folder + "/")]
        if folder and not inside:
            raise _Refused(404, "EntryNotFound", f"{folder} does not exist")
        if self.query.get("recursive", ["false"])[0].lower() != "true":
            start = len(folder) + 1 if folder else 0
            inside = sorted({"/".join(path[start:].split("/")[:1]) for path in inside})
            inside = [f"{folder}/{name}" if folder else name for name in inside]
        return 200, [_entry(path, files.get(path)) for path in _with_folders(inside)]

    def paths_info(self, body: bytes, kind: str, name: str, rev: str) -> tuple[int, Any]:
        _, _, files = self._at(kind, name, rev)
        there = {*_with_folders(list(files))}
        asked = json.loads(body) if body.startswith(b"{") else {"paths": parse_qs(body.decode())["paths"]}
        return 200, [_entry(path, files.get(path)) for path in asked["paths"] if path in there]

    def preupload(self, body: bytes, kind: str, name: str, rev: str) -> tuple[int, Any]:
        _, _, files = self._at(kind, name, rev)
        answers = []
        for asked in json.loads(body)["files"]:
            found = {"path": asked["path"], "uploadMode": "regular", "shouldIgnore": False}
            present = files.get(asked["path"])
            answers.append(found if present is None else found | {"oid": _blob(present)})
        return 200, {"files": answers}

    def commit(self, body: bytes, kind: str, name: str, rev: str) -> tuple[int, Any]:
        if not self._authorised():
            raise _Refused(401, message="Invalid credentials")
        repo, head, present = self._at(kind, name, rev)
        files, message = dict(present), ""
        for line in filter(None, body.splitlines()):
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, head):
                    raise _Refused(412, message="The branch has moved")
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] in ("deletedFile", "deletedFolder"):
                gone = [
                    path for path in files if path == value["path"] or path.startswith(value["path"].rstrip("/") + "/")
                ]
                if not gone:
                    raise _Refused(404, "EntryNotFound", f"{value['path']} does not exist")
                for path in gone:
                    del files[path]
        sha = repo.commit(rev, files, message)
        return 200, {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{kind}/{name}/commit/{sha}"}

    def resolve(self, body: bytes, name: str, rev: str, path: str, kind: str | None = None) -> tuple[int, bytes, Any]:
        _, sha, files = self._at(kind or "models", name, rev)
        if path not in files:
            raise _Refused(404, "EntryNotFound", f"{path} does not exist", **{"X-Repo-Commit": sha})
        data, headers = files[path], {"X-Repo-Commit": sha, "ETag": f'"{_blob(files[path])}"', "Accept-Ranges": "bytes"}
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(found[1]), int(found[2] or len(data) - 1) + 1
            return 206, data[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
        return 200, data, headers

    def refs(self, body: bytes, kind: str, name: str) -> tuple[int, Any]:
        repo = self._repo(kind, name)
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha} for n, sha in repo.refs.items()]
        return 200, {"branches": branches, "tags": [], "converts": []}

    def commits(self, body: bytes, kind: str, name: str, rev: str) -> tuple[int, Any]:
        repo, _, _ = self._at(kind, name, rev)
        found = zip(repo.commits, repo.messages, strict=True)
        return 200, [{"id": sha, "title": m, "message": "", "authors": [], "date": DATE} for sha, m in found][::-1]

    def mark(self, body: bytes, kind: str, name: str, rev: str) -> tuple[int, Any]:
        """A tag of a revision, or a branch that begins at main."""
        repo = self._repo(kind, name)
        asked = json.loads(body or b"{}")
        new, source = (asked["tag"], rev) if "tag" in asked else (rev, asked.get("startingPoint") or "main")
        if new in repo.refs:
            raise _Refused(409, message="Reference already exists")
        repo.refs[new] = self._at(kind, name, source)[1]
        return 200, {}


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(path: str, data: bytes | None) -> dict[str, Any]:
    if data is None:
        return {"type": "directory", "oid": _blob(path.encode()), "size": 0, "path": path}
    return {"type": "file", "oid": _blob(data), "size": len(data), "path": path}


def _with_folders(paths: list[str]) -> list[str]:
    """Paths of files, each after the folders that it is in."""
    parts = [path.split("/") for path in paths]
    return list(dict.fromkeys("/".join(part[:depth]) for part in parts for depth in range(1, len(part) + 1)))


API = r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
REV = r"/(?P<rev>[^/]+)"
ROUTES: list[tuple[tuple[str, ...], str, Callable[..., Any]]] = [
    (("GET",), "/api/whoami-v2", _Handler.whoami),
    (("POST",), "/api/repos/create", _Handler.create),
    (("POST", "DELETE"), "/api/repos/delete", _Handler.delete),
    (("POST",), "/api/validate-yaml", _Handler.validate),
    (("GET",), API, _Handler.info),
    (("GET",), API + "/revision" + REV, _Handler.info),
    (("GET",), API + "/tree" + REV + "(?:/(?P<folder>.+))?", _Handler.tree),
    (("POST",), API + "/paths-info" + REV, _Handler.paths_info),
    (("POST",), API + "/preupload" + REV, _Handler.preupload),
    (("POST",), API + "/commit" + REV, _Handler.commit),
    (("GET",), API + "/refs", _Handler.refs),
    (("GET",), API + "/commits" + REV, _Handler.commits),
    (("POST",), API + "/(?:tag|branch)" + REV, _Handler.mark),
    (
        ("GET", "HEAD"),
        r"/(?:(?P<kind>datasets)/)?(?P<name>[^/]+/[^/]+)/resolve" + REV + "/(?P<path>.+)",
        _Handler.resolve,
    ),
]
