"""A server of S3 (moto's) or Google's storage (gcp-storage-emulator's) on loopback, behind a proxy that can be told to fail."""

from __future__ import annotations

import http.client
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.support.hosts import Host, Network

BUCKET = "lab"
_SERVE = "import sys; from moto.server import main; main(['-H', sys.argv[1], '-p', sys.argv[2]])"
Rule = Callable[[str, str, int], str | None]
"""Method, path and the count of requests so far -> `503`, `403`, `drop` (after half of the body), or None: passed on."""


class Store:
    """The server and its proxy; `env` is what a process needs to reach the proxy, `seen` every request that came."""

    scheme = "s3"

    host = "127.0.0.1"

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind((self.host, 0))
            self.port = free.getsockname()[1]
        self.rule: Rule = lambda method, path, count: None
        self.seen: list[tuple[str, str]] = []
        log = (folder / f"{self.scheme}.log").open("w")
        self.process: subprocess.Popen[Any] = subprocess.Popen(self.serve(), stdout=log, stderr=log)
        self.wait()
        self.proxy = ThreadingHTTPServer((self.host, 0), _make_handler(self))
        threading.Thread(target=self.proxy.serve_forever, daemon=True).start()
        self.env = {**self.describe(f"{self.host}:{self.proxy.server_port}"), "NO_PROXY": self.host}

    def wait(self) -> None:
        """Until the server answers; then the bucket is made."""
        end = time.monotonic() + 60
        while True:
            try:
                socket.create_connection((self.host, self.port), 1).close()
                break
            except OSError:
                assert time.monotonic() < end and self.process.poll() is None
                time.sleep(0.1)
        self.make_bucket()

    def serve(self) -> list[str]:
        """The command of the server."""
        return [sys.executable, "-c", _SERVE, self.host, str(self.port)]

    def describe(self, host: str) -> dict[str, str]:
        """What says in a process's environment where the store is."""
        return {
            "AWS_ENDPOINT_URL": f"http://{host}",
            "AWS_ACCESS_KEY_ID": "id",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def make_bucket(self) -> None:
        assert self.ask("PUT", f"/{BUCKET}")[0] == 200

    def close(self) -> None:
        self.proxy.shutdown()
        self.proxy.server_close()
        self.process.kill()
        self.process.wait()

    def ask(self, method: str, path: str) -> tuple[int, bytes]:
        """Status and body of a request to the server itself."""
        connection = http.client.HTTPConnection(self.host, self.port)
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read()

    def list(self, prefix: str) -> list[str]:
        """The keys below a prefix."""
        _, body = self.ask("GET", f"/{BUCKET}?list-type=2&max-keys=1000&prefix={prefix}")
        return re.findall(r"<Key>([^<]+)</Key>", body.decode())

    def read(self, key: str) -> bytes:
        status, body = self.ask("GET", f"/{BUCKET}/{key}")
        assert status == 200, (key, status)
        return body

    def list_written(self) -> list[str]:
        """The keys that were written through the proxy, in their order."""
        return [path.partition("?")[0].removeprefix(f"/{BUCKET}/") for method, path in self.seen if method == "PUT"]


class GoogleStore(Store):
    """The same of Google's storage, which has buckets from the start."""

    scheme = "gs"

    def serve(self) -> list[str]:
        place = [f"--port={self.port}", f"--host={self.host}", "--in-memory", f"--default-bucket={BUCKET}"]
        return [sys.executable, "-c", "from gcp_storage_emulator.__main__ import main; main()", "start", *place]

    def describe(self, host: str) -> dict[str, str]:
        return {"STORAGE_EMULATOR_HOST": f"http://{host}"}

    def make_bucket(self) -> None:
        return None

    def list(self, prefix: str) -> list[str]:
        _, body = self.ask("GET", f"/storage/v1/b/{BUCKET}/o?maxResults=1000&prefix={prefix}")
        return [item["name"] for item in json.loads(body).get("items", [])]

    def read(self, key: str) -> bytes:
        status, body = self.ask("GET", f"/storage/v1/b/{BUCKET}/o/{urllib.parse.quote(key, safe='')}?alt=media")
        assert status == 200, (key, status)
        return body

    def list_written(self) -> list[str]:
        names = [
            urllib.parse.parse_qs(path.partition("?")[2]).get("name", [])
            for method, path in self.seen
            if method == "POST"
        ]
        return [name for found in names for name in found]


class HostStore(Store):
    """A server of S3 on a host of tests/hosts.py, without a proxy."""

    def __init__(self, network: Network, host: Host) -> None:
        self.host, self.port = host.ip, 9000
        self.process = network.start(host, shlex.join(self.serve()))
        self.wait()
        self.env = self.describe(f"{self.host}:{self.port}")


def _make_handler(store: Store) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            chunked = self.headers.get("Transfer-Encoding", "").lower() == "chunked"
            length = int(self.headers.get("Content-Length") or 0)
            store.seen.append((self.command, self.path))
            fault = store.rule(self.command, urllib.parse.unquote(self.path), len(store.seen))
            if fault == "drop":
                self.rfile.read(length // 2 if not chunked else 1)
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            body = self.read_chunks() if chunked else self.rfile.read(length)
            if fault:
                code = {"503": b"SlowDown", "403": b"AccessDenied"}[fault]
                self.answer(int(fault), {}, b"<Error><Code>" + code + b"</Code><Message>injected</Message></Error>")
                return
            connection = http.client.HTTPConnection("127.0.0.1", store.port, timeout=60)
            ours = ("expect", "transfer-encoding", "content-length")
            passing = {name: value for name, value in self.headers.items() if name.lower() not in ours}
            connection.request(self.command, self.path, body, {**passing, "Content-Length": str(len(body))})
            response = connection.getresponse()
            self.answer(response.status, dict(response.getheaders()), response.read())
            connection.close()

        def read_chunks(self) -> bytes:
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return body

        def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                    self.send_header(name, value)
            length = headers.get("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

        def log_message(self, format: str, *args: object) -> None:
            return None

    return Handler


def run_env(store: Store, home: Path) -> dict[str, str]:
    """The environment of a job on a machine of its own: its home, its Ray, the store."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "AWS_"))}
    return {**env, **store.env, "HOME": str(home), "RAY_ADDRESS": "local"}
