"""A Hugging Face Hub on this machine's loopback, for tests: the endpoints that `huggingface_hub` really calls.

    with LoopbackHub() as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.token)
        ...
        hub.files("alice/m")            # what a revision holds
        hub.fail(status=500, path="/commit/", times=1)

Users: "alice" writes to alice/* and org/*, "stranger" to stranger/*. The client needs `HF_HUB_DISABLE_XET=1`.
`loopback_routes` holds the endpoints, `loopback_store` what they work on, `loopback_cards` the check of a README.
"""

import itertools
import json
import re
import secrets
import socket
import sys
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote

from loopback_routes import ROUTES
from loopback_store import KINDS, HubError, Store


class Request(NamedTuple):
    method: str
    path: str
    status: int | None  # `None` where the connection was cut


@dataclass
class Fault:
    status: int | None
    method: str | None
    path: str
    times: int
    retry_after: int | None
    cut_after: int | None
    delay: float | None
    message: str | None
    code: str | None
    skip: int

    def answer(self):
        message = self.message or f"{self.status}, as the test asked for"
        headers = {"X-Error-Message": message}
        if self.code is not None:
            headers["X-Error-Code"] = self.code
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        return self.status, {"error": message}, headers


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 60

    def log_message(self, *args):
        pass

    @property
    def hub(self):
        return self.server.hub

    @property
    def store(self):
        return self.server.hub.store

    def json(self):
        return json.loads(self.body or b"{}")

    def flag(self, name):
        return self.query.get(name, [""])[0].lower() in ("1", "true")

    def repo(self, write=False):
        kind = KINDS[self.args.get("kinds") or "models"]
        return self.store.repo(self.user, kind, self.args["id"], write)

    def receive(self, limit):
        """The body of the request, by its length or in chunks; `None` where it is cut because it exceeds `limit`."""
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts, total = [], 0
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                total += size
                self.rfile.readline()
                if limit is not None and total > limit:
                    return None
            self.rfile.readline()
            return b"".join(parts)
        length = int(self.headers.get("Content-Length") or 0)
        if limit is not None and length > limit:
            self.rfile.read(limit)
            return None
        return self.rfile.read(length)

    def answer(self):
        """Runs the endpoint, or the fault that a test asked for in its place."""
        self.raw_path, _, query = self.path.partition("?")
        self.query, path = parse_qs(query, keep_blank_values=True), unquote(self.raw_path)
        self.extra_headers = {}
        fault = self.hub.next_fault(self.command, path)
        cut_after = fault.cut_after if fault else None
        upload = self.command in ("PUT", "POST")
        if fault and fault.delay:
            time.sleep(fault.delay)
        self.body = self.receive(cut_after if upload else None)
        if self.body is None:
            self.hub.requests.append(Request(self.command, path, None))
            self.close_connection = True
            return
        if fault and cut_after is None and fault.status is not None:
            status, body, headers = fault.answer()
        else:
            status, body, headers = self.dispatch()
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json; charset=utf-8"} | headers
        cut = cut_after is not None and (upload or cut_after < len(body))
        # Before anything is sent, so that whoever has the answer finds the request noted.
        self.hub.requests.append(Request(self.command, path, None if cut else status))
        self.close_connection = self.close_connection or cut
        if cut and upload:
            return
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(body), "X-Request-Id": secrets.token_hex(8)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut_after] if cut else body)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = answer

    def dispatch(self):
        headers = {}
        try:
            with self.hub.lock:
                self.user = self.authenticate()
                for method, pattern, endpoint in ROUTES:
                    if method == self.command and (match := re.fullmatch(pattern, self.raw_path)):
                        self.args = {name: unquote(value) for name, value in match.groupdict().items() if value}
                        status, body, *rest = endpoint(self)
                        return status, body, rest[0] if rest else headers
            self.hub.unknown_requests.append((self.command, unquote(self.raw_path)))
            raise HubError(404, f"No such endpoint: {self.command} {self.raw_path}")
        except HubError as error:
            headers = {"X-Error-Message": error.message.replace("\n", " ").encode("ascii", "replace").decode()}
            if error.code:
                headers["X-Error-Code"] = error.code
            return error.status, {"error": error.message, **error.body}, headers | self.extra_headers
        except Exception as error:
            # A mistake of this server must fail the test, not look like the Hub's bad day.
            self.hub.errors.append(error)
            return 500, {"error": f"the loopback Hub itself failed: {error!r}"}, headers

    def authenticate(self):
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if not scheme:
            return None
        if token not in self.store.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.store.users[token]


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, *args):
        super().__init__(*args)
        self.connections = set()

    def process_request(self, request, client_address):
        self.connections.add(request)
        super().process_request(request, client_address)

    def handle_error(self, request, client_address):
        """Clients that leave in the middle are part of the tests; nothing is printed."""
        error = sys.exception()
        if not isinstance(error, ConnectionError | TimeoutError):
            self.hub.errors.append(error)

    def shutdown_request(self, request):
        # Without it a connection that is cut ends in a reset, and the client loses what it has received already.
        try:
            request.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        self.connections.discard(request)
        self.close_request(request)

    def close_connections(self):
        """Else clients that kept theirs open would still be served by a server that is gone."""
        for connection in list(self.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


class LoopbackHub:
    def __init__(self):
        self.store, self.lock = Store(), threading.RLock()
        self.token = self.store.add_user("alice", orgs=["org"])
        self.read_token = self.store.add_user("alice", orgs=["org"], role="read")
        self.stranger_token = self.store.add_user("stranger")
        self.requests, self.unknown_requests, self.errors = [], [], []
        self.faults, self.grants, self.parts = [], {}, {}
        self.uploaded_bytes = 0
        # Above it an LFS file is asked for in parts of that size; `None`: always in one.
        self.chunk_size = None
        self.page_size = 1000

    def __enter__(self):
        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.hub = self
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()
        self.server.close_connections()

    def grant(self, repo, oid, size):
        signature = secrets.token_hex(16)
        self.grants[signature] = (repo, oid, size)
        return signature

    # Faults

    def fail(
        self,
        status=500,
        method=None,
        path=".*",
        times=1,
        retry_after=None,
        cut_after=None,
        delay=None,
        message=None,
        code=None,
        skip=0,
    ):
        """
        Makes the next `times` requests fail whose method is `method` and in whose path (decoded, without query) the
        regular expression `path` is found, after `skip` such requests that still succeed. Of several faults that fit
        the earlier one comes first, and only what it leaves is seen by the next.

        `status` is what they answer, with `message`, `X-Error-Code: code` and `Retry-After: retry_after`. `cut_after=n`
        cuts the connection instead: a download after `n` bytes of its body, an upload after `n` bytes of it were
        received; an upload that is no longer than that is carried out, and its answer is lost. `delay` waits that many
        seconds first; `status=None, delay=2` is an answer that is merely slow. `times=None`: from now on.
        """
        times = 10**9 if times is None else times
        with self.lock:
            self.faults.append(Fault(status, method, path, times, retry_after, cut_after, delay, message, code, skip))

    def stop_failing(self):
        with self.lock:
            self.faults.clear()

    def next_fault(self, method, path):
        with self.lock:
            for fault in self.faults:
                if method == "HEAD" and fault.cut_after is not None:
                    continue  # an answer without a body cannot be cut
                if fault.times and fault.method in (None, method) and re.search(fault.path, path):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    # What is there

    def repo(self, id, repo_type="model"):
        return self.store.repos[repo_type, id]

    def files(self, id, revision="main", repo_type="model"):
        """The content of every file of a revision by its path; `.gitattributes`, which the Hub makes, is left out."""
        with self.lock:
            files = self.repo(id, repo_type).resolve(revision).files
            return {path: file.content for path, file in files.items() if path != ".gitattributes"}

    def commits(self, id, revision="main", repo_type="model"):
        """
        Commits, newest first, without the one with which the Hub begins: `id`, `message` (its first line),
        `description`, `author`, `parent`, `files` (all paths) and `changed` (those written or deleted).
        """
        with self.lock:
            history = list(self.repo(id, repo_type).history(revision))
        rows = []
        for commit, parent in itertools.pairwise(history):
            paths = sorted(commit.files.keys() | parent.files.keys())
            changed = [path for path in paths if commit.files.get(path) != parent.files.get(path)]
            row = {"id": commit.id, "message": commit.title, "description": commit.message, "author": commit.author}
            files = [path for path in commit.files if path != ".gitattributes"]
            rows.append(row | {"parent": parent.id, "files": files, "changed": changed})
        return rows

    def refs(self, id, repo_type="model"):
        """Commit ids by name, of `branches`, `tags` and `pulls` (by number)."""
        with self.lock:
            repo = self.repo(id, repo_type)
            return {"branches": dict(repo.branches), "tags": dict(repo.tags), "pulls": dict(repo.pulls)}

    def environment(self, home, token=None):
        """
        The variables with which a fresh process works against this server alone, to be laid over `os.environ`.

        `home` takes its caches. `token` is alice's unless given; `False` leaves the process without.
        """
        home = Path(home)
        token = self.token if token is None else token or ""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": token,
            "HUGGING_FACE_HUB_TOKEN": "",
            "HF_HOME": str(home),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_CACHE": str(home / "hub"),
            "HUGGINGFACE_HUB_CACHE": str(home / "hub"),
            "HF_ASSETS_CACHE": str(home / "assets"),
            "HF_XET_CACHE": str(home / "xet"),
            "HF_MODULES_CACHE": str(home / "modules"),
            "HF_DATASETS_CACHE": str(home / "datasets"),
            "HF_EVALUATE_CACHE": str(home / "evaluate"),
            "HF_METRICS_CACHE": str(home / "metrics"),
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "HF_EVALUATE_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            # The client would ask huggingface.co's converter for what the repository has in pickles alone.
            "DISABLE_SAFETENSORS_CONVERSION": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
