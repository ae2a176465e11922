"""A hub in a thread: enough of the real one's protocol for its own client library to use it."""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class HubServer:
    """One model, ``owner/model``, and a record of what was asked for."""

    files: dict[str, bytes]
    """What the model consists of."""

    refusal: tuple[int, str] | None = None
    """A status and an ``X-Error-Code`` with which every request is answered, or ``None``."""

    claimed_sizes: dict[str, int] = field(default_factory=dict)
    """Sizes to state in place of the true ones."""

    downloads: list[str] = field(default_factory=list)
    """Files whose bytes were asked for."""

    requests: list[str] = field(default_factory=list)
    """Every path that was asked for."""

    def __enter__(self) -> "HubServer":
        """Start to serve."""
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        """Stop to serve."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Return the status, headers and body with which a path is answered."""
        self.requests.append(path)
        path = path.partition("?")[0]
        if self.refusal is not None:
            return self.refusal[0], {"X-Error-Code": self.refusal[1]}, b"{}"
        if not path.removeprefix("/api/models").startswith("/owner/model"):
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if path.startswith("/api/models/owner/model/tree/"):
            return 200, {}, json.dumps([self._entry(name) for name in self.files]).encode()
        if path.startswith("/api/models/owner/model"):
            revision = path.removeprefix("/api/models/owner/model").removeprefix("/revision/")
            if revision not in ("", "main", COMMIT):
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            siblings = [{"rfilename": n, "size": self._size(n)} for n in self.files]
            return (
                200,
                {},
                json.dumps({"id": "owner/model", "sha": COMMIT, "siblings": siblings}).encode(),
            )
        name = path.rpartition("/")[2]
        if name not in self.files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        return 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{self._digest(name)}"'}, self.files[name]

    def _entry(self, name: str) -> dict[str, Any]:
        return {
            "type": "file",
            "path": name,
            "size": self._size(name),
            "oid": self._digest(name),
        }

    def _size(self, name: str) -> int:
        return self.claimed_sizes.get(name, len(self.files[name]))

    def _digest(self, name: str) -> str:
        return hashlib.sha1(self.files[name]).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer

    def do_HEAD(self) -> None:
        self._send(with_body=False)

    def do_GET(self) -> None:
        if "/resolve/" in self.path:
            self.hub.downloads.append(self.path.rpartition("/")[2])
        self._send(with_body=True)

    def log_message(self, *_: object) -> None:
        """Keep standard error quiet."""

    def _send(self, *, with_body: bool) -> None:
        status, headers, body = self.hub.answer(self.path)
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)
