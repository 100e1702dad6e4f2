"""A server of the tests' own that speaks enough of the Hugging Face hub to make a repository and
take a commit, on loopback."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(eq=False)
class Hub:
    """What has been pushed to it: files by repository, messages, and who may write."""

    token: str
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    messages: list[str] = field(default_factory=list)
    endpoint: str = ""

    @contextmanager
    def running(self) -> Iterator["Hub"]:
        server = _Server(("127.0.0.1", 0), _Handler)
        server.hub = self
        self.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """The status and the JSON for a request that is allowed."""
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.repositories.setdefault(name, {})
            self.private |= {name} if asked.get("visibility") == "private" else set()
            return 200, {"url": f"{self.endpoint}/{name}"}
        name = "/".join(path.split("/")[3:5])
        if path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            return 200, {
                "files": [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in files
                ]
            }
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    self.messages.append(value["summary"])
                if line["key"] == "file":
                    self.repositories[name][value["path"]] = base64.b64decode(value["content"])
            return 200, {"commitUrl": f"{self.endpoint}/{name}/commit/1", "commitOid": "1" * 40}
        return 404, {"error": f"no such place: {path}"}


class _Server(ThreadingHTTPServer):
    hub: Hub


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        is_known = self.headers.get("Authorization") == f"Bearer {self.server.hub.token}"
        refusal = 401, {"error": "Invalid username or password."}
        path = self.path.split("?")[0]
        status, answer = self.server.hub.answer(path, body) if is_known else refusal
        sent = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    do_GET = do_POST = _serve

    def log_message(self, *_: object) -> None:
        """Nothing: pytest's output is for tests."""
