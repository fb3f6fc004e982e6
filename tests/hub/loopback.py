"""A stand-in for the Hub on this machine, with enough of its HTTP API for pushes, downloads and their failures.

    with LoopbackHub() as hub:
        hub.fail("POST", "/preupload/", 503)          # the next such request fails
        subprocess.run(..., env={**os.environ, **hub.environment(tmp_path)})
        hub.repo("me/model").files["config.json"]     # bytes

Large files (LFS) are safetensors and pictures, as on the Hub. Every request is noted in `hub.requests`.
"""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from tempfile import TemporaryDirectory
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import constants
from huggingface_hub.utils import close_session

TOKEN = "hf_loopback"
LARGE = re.compile(r"\.(safetensors|png|model)$")
KINDS = "models|datasets|spaces"


@dataclass
class Repo:
    """Branches are `{path: bytes}`; each commit has an id."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[dict] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        return self.branches["main"]

    def resolve(self, revision: str) -> str | None:
        """The branch that a revision means: its name, or the id of its latest commit."""
        for name in self.branches:
            if revision in (name, self.sha(name)):
                return name
        return None

    def sha(self, branch: str) -> str:
        state = [(path, hashlib.sha1(content).hexdigest()) for path, content in sorted(self.branches[branch].items())]
        return hashlib.sha1(json.dumps([branch, state]).encode()).hexdigest()


@dataclass
class Failure:
    method: str
    path: str
    status: int | None
    times: int
    after: int
    headers: dict[str, str]


class LoopbackHub:
    """
    Args:
        token (`str`): The only one accepted; another is answered with 401.
    """

    def __init__(self, token: str = TOKEN):
        self.token = token
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.created: list[dict] = []
        self.failures: list[Failure] = []
        self.read_only: set[str] = set()
        self.lock = threading.RLock()

    def __enter__(self):
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def environment(self, home) -> dict[str, str]:
        """Environment variables that make a process use this Hub; `home` is a folder for its caches."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }

    def repo(self, name: str) -> Repo:
        return self.repos[name]

    def add(
        self, name: str, private: bool = True, files: dict[str, bytes] | None = None, kind: str = "models"
    ) -> Repo:
        repo = Repo(private, {"main": dict(files or {})})
        self.repos[name if kind == "models" else f"{kind}/{name}"] = repo
        return repo

    def fail(self, method: str, path: str, status: int | None, times: int = 1, after: int = 0, **headers: str):
        """
        Answers the next `times` requests to a path that matches, but for the first `after`, with `status`; with `None`
        the connection is cut in the middle of the body.
        """
        self.failures.append(Failure(method, path, status, times, after, headers))

    def sent(self, method: str, path: str) -> int:
        """The number of requests for a path that matches."""
        return sum(m == method and bool(re.search(path, p)) for m, p in self.requests)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *args):
        pass

    def do_GET(self):
        self._answer("GET")

    def do_HEAD(self):
        self._answer("HEAD")

    def do_POST(self):
        self._answer("POST")

    def do_PUT(self):
        self._answer("PUT")

    def do_DELETE(self):
        self._answer("DELETE")

    # -- answers

    def _answer(self, method: str):
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), parse_qs(parts.query)
        with self.hub.lock:
            self.hub.requests.append((method, path))
            failure = self._failure(method, path)
        if failure is not None and failure.status is None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        body = self._body()
        if failure is not None:
            self._send(failure.status, {"error": "injected"}, failure.headers)
            return
        if path.startswith("/api") and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._error(401, "Invalid credentials in Authorization header", None)
            return
        for pattern, handle in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and handle.__name__.startswith(f"_{method.lower()}_".replace("head", "get")):
                with self.hub.lock:
                    handle(self, body, query, **match.groupdict())
                return
        self._error(404, f"no such endpoint: {method} {path}", "EntryNotFound")

    def _failure(self, method: str, path: str) -> Failure | None:
        for failure in self.hub.failures:
            if failure.times and failure.method == method and re.search(failure.path, path):
                if failure.after:
                    failure.after -= 1
                    return None
                failure.times -= 1
                return failure
        return None

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, status: int, content, headers: dict[str, str] | None = None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header(
            "Content-Type", "application/octet-stream" if isinstance(content, bytes) else "application/json"
        )
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _error(self, status: int, message: str, code: str | None):
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, {"error": message}, headers)

    def _find(self, kind: str, name: str, revision: str | None = None) -> tuple[Repo, str] | None:
        """A repository and branch; replies 404 and returns `None` if there is none."""
        repo = self.hub.repos.get(name if kind == "models" else f"{kind}/{name}")
        if repo is None:
            return self._error(404, "Repository not found", "RepoNotFound")
        branch = repo.resolve(revision or "main")
        if branch is None:
            return self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo, branch

    # -- endpoints

    def _get_whoami(self, body, query):
        self._send(200, {"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}})

    def _post_validate(self, body, query):
        self._send(200, {"errors": [], "warnings": []})

    def _post_create(self, body, query):
        asked = json.loads(body)
        kind = asked.get("type", "model") + "s"
        organization = asked.get("organization") or "me"
        name = f"{organization}/{asked['name']}"
        key = name if kind == "models" else f"{kind}/{name}"
        url = f"{self.hub.url}/{key}"
        self.hub.created.append(asked)
        if key in self.hub.repos:
            self._send(409, {"error": "You already created this model repo", "url": url})
        elif organization in self.hub.read_only:
            self._error(403, "You don't have the rights to create a model under this namespace", None)
        else:
            private = asked.get("visibility", "private" if asked.get("private") else "public") == "private"
            self.hub.add(name, private, kind=kind)
            self._send(200, {"url": url, "name": name})

    def _post_branch(self, body, query, kind, name, branch):
        if found := self._find(kind, name):
            repo, _ = found
            if branch in repo.branches:
                return self._error(409, f"Reference already exists: {branch}", None)
            repo.branches[branch] = dict(repo.files)
            self._send(201, {})

    def _post_preupload(self, body, query, kind, name, revision):
        if found := self._find(kind, name, revision):
            repo, branch = found
            files = []
            for file in json.loads(body)["files"]:
                base64.b64decode(file["sample"], validate=True)
                there = repo.branches[branch].get(file["path"])
                large = bool(LARGE.search(file["path"]))
                oid = None
                if there is not None:
                    oid = hashlib.sha256(there).hexdigest() if large else _git_hash(there)
                mode = "lfs" if large else "regular"
                files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            self._send(200, {"files": files})

    def _post_batch(self, body, query, name):
        objects = []
        for wanted in json.loads(body)["objects"]:
            href = f"{self.hub.url}/upload/{wanted['oid']}"
            known = wanted["oid"] in self.hub.blobs
            objects.append({**wanted, **({} if known else {"actions": {"upload": {"href": href}}})})
        self._send(200, {"transfer": "basic", "objects": objects})

    def _put_upload(self, body, query, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            return self._error(400, "the content does not have this hash", None)
        self.hub.blobs[oid] = body
        self._send(200, {})

    def _post_commit(self, body, query, kind, name, revision):
        if not (found := self._find(kind, name, revision)):
            return
        repo, branch = found
        proposal = query.get("create_pr") == ["1"]
        if name.split("/")[0] in self.hub.read_only and not proposal:
            return self._error(403, "You have read access, but not write access to this repo", None)
        files = dict(repo.branches[branch])
        commit = {"branch": branch, "pr": proposal}
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                commit |= value
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise NotImplementedError(entry["key"])
        target = f"refs/pr/{len(repo.commits) + 1}" if proposal else branch
        repo.branches[target] = files
        repo.commits.append(commit)
        sha = repo.sha(target)
        reply = {"success": True, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha}
        if proposal:
            reply["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{len(repo.commits)}"
        self._send(200, reply)

    def _get_info(self, body, query, kind, name, revision=None):
        if found := self._find(kind, name, revision):
            repo, branch = found
            siblings = [{"rfilename": path} for path in sorted(repo.branches[branch])]
            facts = {"id": name, "sha": repo.sha(branch), "private": repo.private, "siblings": siblings}
            self._send(200, {**facts, "tags": [], "downloads": 0, "likes": 0})

    def _get_tree(self, body, query, kind, name, revision, folder=""):
        if found := self._find(kind, name, revision):
            repo, branch = found
            entries = {}
            prefix = f"{folder}/" if folder else ""
            for path, content in repo.branches[branch].items():
                if not path.startswith(prefix):
                    continue
                first, slash, _ = path[len(prefix) :].partition("/")
                if slash and query.get("recursive") not in (["True"], ["true"]):
                    entries[prefix + first] = {"type": "directory", "oid": _git_hash(b""), "size": 0}
                    continue
                entries[path] = {"type": "file", "oid": _git_hash(content), "size": len(content)}
                if LARGE.search(path):
                    large = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
                    entries[path]["lfs"] = large
            if folder and not entries:
                return self._error(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
            self._send(200, [{**entry, "path": path} for path, entry in sorted(entries.items())])

    def _get_file(self, body, query, name, revision, file, kind="models"):
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._error(401, "Invalid credentials in Authorization header", None)
        if not (found := self._find(kind, name, revision)):
            return
        repo, branch = found
        content = repo.branches[branch].get(file)
        if content is None:
            return self._error(404, "Entry not found", "EntryNotFound")
        etag = hashlib.sha256(content).hexdigest() if LARGE.search(file) else _git_hash(content)
        headers = {"X-Repo-Commit": repo.sha(branch), "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        self._send(200, content, headers)


_REPO = r"(?P<name>[\w.-]+/[\w.-]+)"
_REVISION = r"(?P<revision>refs/pr/\d+|[^/]+)"
_ROUTES = [
    (r"/api/whoami-v2", _Handler._get_whoami),
    (r"/api/validate-yaml", _Handler._post_validate),
    (r"/api/repos/create", _Handler._post_create),
    (rf"/api/(?P<kind>{KINDS})/{_REPO}/branch/(?P<branch>.+)", _Handler._post_branch),
    (rf"/api/(?P<kind>{KINDS})/{_REPO}/preupload/{_REVISION}", _Handler._post_preupload),
    (rf"/(?:datasets/|spaces/)?{_REPO}\.git/info/lfs/objects/batch", _Handler._post_batch),
    (r"/upload/(?P<oid>\w+)", _Handler._put_upload),
    (rf"/api/(?P<kind>{KINDS})/{_REPO}/commit/{_REVISION}", _Handler._post_commit),
    (rf"/api/(?P<kind>{KINDS})/{_REPO}/tree/{_REVISION}(?:/(?P<folder>.+))?", _Handler._get_tree),
    (rf"/api/(?P<kind>{KINDS})/{_REPO}(?:/revision/{_REVISION})?", _Handler._get_info),
    (rf"/(?P<kind>datasets|spaces)/{_REPO}/resolve/{_REVISION}/(?P<file>.+)", _Handler._get_file),
    (rf"/{_REPO}/resolve/{_REVISION}/(?P<file>.+)", _Handler._get_file),
]


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def main():
    """Prints the variables to set and serves until stopped, for trying things out by hand."""
    import sys
    import tempfile

    with LoopbackHub() as hub:
        for name, value in hub.environment(tempfile.mkdtemp(prefix="loopback-hub-")).items():
            sys.stdout.write(f"export {name}={value}\n")
        sys.stdout.flush()
        while True:
            time.sleep(60)


if __name__ == "__main__":
    main()


@contextmanager
def taken_for_the_hub(monkeypatch):
    """A running loopback Hub that this process uses; huggingface_hub reads its settings when it is imported."""
    with LoopbackHub() as running, TemporaryDirectory() as cache:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # keeps a client for the first address it saw
        close_session()
        yield running
    close_session()
