"""A hub on this machine: takes the requests of an upload and keeps what was committed."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """What the server was asked for."""

    address: str = ""
    token: str = "hf_right"
    created: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    is_private: bool = True


def _make_handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._answer(200, {"sha": "0" * 40, "id": "lab/model", "siblings": [], "private": hub.is_private})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Authorization") != f"Bearer {hub.token}":
                self._answer(401, {"error": "Invalid credentials"})
            elif self.path == "/api/repos/create":
                hub.created.append(json.loads(body))
                self._answer(200, {"url": f"{hub.address}/lab/model", "id": "1"})
            elif "/preupload/" in self.path:
                asked = json.loads(body)["files"]
                files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]
                self._answer(200, {"files": files})
            elif "/commit/" in self.path:
                for line in filter(None, body.split(b"\n")):
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        hub.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                commit = {"commitUrl": f"{hub.address}/lab/model/commit/1", "commitOid": "1" * 40, "success": True}
                self._answer(200, commit)
            else:
                self._answer(200, {"errors": [], "warnings": []})

        def _answer(self, code: int, content: Any) -> None:
            data = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """A hub that answers until the context ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _make_handler(hub))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
