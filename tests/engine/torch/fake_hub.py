"""A Hugging Face hub of one model on localhost: the few paths that snapshot_download asks for.

It can cut a file short once (`cut`), to see a download taken up again, and counts what it was asked (`asked`).
"""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "a" * 40


class FakeHub:
    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.asked: list[tuple[str, str, str | None]] = []  # method, path, range
        self.cut: dict[str, int] = {}  # file -> bytes after which the connection breaks, once
        self.cut_again = False  # cut every time
        hub = self

        class Answers(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self, has_body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, has_body=False)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, call: BaseHTTPRequestHandler, has_body: bool) -> None:
        path = call.path.split("?")[0]
        self.asked.append((call.command, path, call.headers.get("Range")))
        for revision in ("main", COMMIT):
            resolve = f"/{self.name}/resolve/{revision}/"
            if path.startswith(resolve):
                return self._file(call, path.removeprefix(resolve), has_body)
            if path == f"/api/models/{self.name}/revision/{revision}":
                return self._json(call, self._info())
            if path == f"/api/models/{self.name}/tree/{revision}":
                return self._json(call, self._tree())
        self._missing(call)

    def _info(self) -> object:
        names = sorted(path.name for path in self.folder.iterdir())
        return {
            "id": self.name,
            "sha": COMMIT,
            "siblings": [{"rfilename": name} for name in names],
            "private": False,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
        }

    def _tree(self) -> object:
        return [
            {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": etag(path)}
            for path in sorted(self.folder.iterdir())
        ]

    def _file(self, call: BaseHTTPRequestHandler, name: str, has_body: bool) -> None:
        path = self.folder / name
        if not path.is_file():
            return self._missing(call, "EntryNotFound")
        data, start = path.read_bytes(), 0
        asked = call.headers.get("Range")
        if asked:
            start = int(asked.removeprefix("bytes=").split("-")[0])
        call.send_response(206 if asked else 200)
        if asked:
            call.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        call.send_header("Accept-Ranges", "bytes")
        call.send_header("Content-Length", str(len(data) - start))
        call.send_header("ETag", f'"{etag(path)}"')
        call.send_header("X-Repo-Commit", COMMIT)
        call.end_headers()
        if not has_body:
            return
        stop = self.cut.get(name) if self.cut_again else self.cut.pop(name, None)
        call.wfile.write(data[start:stop])
        if stop is not None:
            call.wfile.flush()
            call.close_connection = True

    def _json(self, call: BaseHTTPRequestHandler, value: object) -> None:
        body = json.dumps(value).encode()
        call.send_response(200)
        call.send_header("Content-Type", "application/json")
        call.send_header("Content-Length", str(len(body)))
        call.send_header("X-Repo-Commit", COMMIT)
        call.end_headers()
        if call.command == "GET":
            call.wfile.write(body)

    def _missing(self, call: BaseHTTPRequestHandler, code: str = "RepoNotFound") -> None:
        call.send_response(404)
        call.send_header("X-Error-Code", code)
        call.send_header("Content-Length", "0")
        call.end_headers()


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
