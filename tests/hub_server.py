"""A hub on this machine, as far as `datasets` and `transformers` ask, whose connections can be made to fail."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

REVISION = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves folders as repositories, by id, of data sets and models alike.

    fault: "cut" ends connections after a third of a tar, "gated" wants a login, "busy" answers with 503.
    """

    def __init__(self, folders: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folders, self.fault = folders, ""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @contextmanager
    def serving(self) -> Iterator[Hub]:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def answer(self, body: bytes, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.server.fault == "cut" and self.path.endswith(".tar"):
            self.wfile.write(body[: len(body) // 3])
            self.close_connection = True
        else:
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        parts = path.removeprefix("/api").removeprefix("/datasets").removeprefix("/models").strip("/").split("/")
        repo = "/".join(parts[:2])
        folder = self.server.folders.get(repo)
        if self.server.fault == "busy":
            self.answer(b"{}", 503)
        elif self.server.fault == "gated" and "/resolve/" in path:
            self.answer(b"{}", 401, X_Error_Code="GatedRepo", X_Error_Message="Access to this dataset is restricted")
        elif folder is None:
            self.answer(b"{}", 404, X_Error_Code="RepoNotFound")
        elif "/tree/" in path and (base := folder / path.split("/tree/")[1].partition("/")[2]).is_dir():
            found = base.rglob("*") if "recursive=true" in self.path.lower() else base.glob("*")
            self.answer(json.dumps([self.entry(folder, file) for file in sorted(found)]).encode())
        elif path.startswith("/api/") and "/tree/" not in path:
            files = [{"rfilename": str(p.relative_to(folder))} for p in sorted(folder.rglob("*")) if p.is_file()]
            self.answer(json.dumps({"id": repo, "sha": REVISION, "siblings": files, "tags": []}).encode())
        elif "/resolve/" in path and (file := folder / path.split("/resolve/")[1].partition("/")[2]).is_file():
            self.file(file.read_bytes())
        else:
            self.answer(b"{}", 404, X_Error_Code="EntryNotFound")

    def entry(self, folder: Path, file: Path) -> dict[str, object]:
        kind, size = ("directory", 0) if file.is_dir() else ("file", file.stat().st_size)
        return {"type": kind, "path": str(file.relative_to(folder)), "oid": "0" * 40, "size": size}

    def file(self, body: bytes) -> None:
        about = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X_Repo_Commit": REVISION}
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        if start:
            about["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.answer(body[start:], 206 if start else 200, **about)
