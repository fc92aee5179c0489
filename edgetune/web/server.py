"""Serving a page's folder on 127.0.0.1: nothing outside of it, to nobody but this machine.

The headers make the page isolated, which the runtime's threads need, and keep it from talking to any other place.
"""

from __future__ import annotations

import shutil
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from edgetune.artifacts.reading import is_inside
from edgetune.checkpoint.files import disk_errors
from edgetune.errors import ArtifactsError, UsageError

HOST = "127.0.0.1"
INDEX = "index.html"
# The same as in index.html, for what the page starts: workers go by the headers of their own files.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; img-src 'self' blob: data:; "
    "media-src 'self' blob:; connect-src 'self'; worker-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    # The folder may be exported anew while the address stays.
    "Cache-Control": "no-cache",
}
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".wasm": "application/wasm",
    ".svg": "image/svg+xml",
}


def server(folder: Path, port: int) -> ThreadingHTTPServer:
    """A server that is bound and not yet running; port 0 takes a free one.

    Raises: ArtifactsError if there is no page in the folder; RunFolderError if it can't be read; UsageError if the port
    can't be had.
    """
    with disk_errors(folder, "read"):
        if not (folder / INDEX).is_file():
            raise ArtifactsError(
                f"{folder} holds no page ({INDEX}). Write one with: edgetune export ... --web {folder}"
            )
    try:
        return _Server((HOST, port), partial(_Handler, folder.resolve()))
    except OSError as error:
        raise UsageError(f"port {port} of {HOST} can't be had ({error.strerror}). Try another --port.") from error


class _Server(ThreadingHTTPServer):
    daemon_threads = True


class _Handler(BaseHTTPRequestHandler):
    server_version = "edgetune"
    sys_version = ""
    timeout = 60  # of a connection on which nothing comes

    def __init__(self, folder: Path, *arguments: object) -> None:
        self.folder = folder
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        # Another site's name may be made to lead here (DNS rebinding): only our own names are answered.
        if self.headers.get("Host", "").rsplit(":", 1)[0] not in (HOST, "localhost"):
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST)
            return
        path = self._file()
        if path is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        try:
            file: BinaryIO = path.open("rb")
        except OSError:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        with file:
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", _TYPES.get(path.suffix, "application/octet-stream"))
            self.send_header("Content-Length", str(path.stat().st_size))
            self.end_headers()
            if with_body:
                try:
                    shutil.copyfileobj(file, self.wfile)
                except ConnectionError:  # whoever asked has gone
                    self.close_connection = True

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def _file(self) -> Path | None:
        """The plain file of the folder that was asked for."""
        name = unquote(urlsplit(self.path).path).lstrip("/") or INDEX
        if not is_inside(name) or any(part.startswith(".") for part in name.split("/")):
            return None
        path = (self.folder / name).resolve()
        return path if self.folder in path.parents and path.is_file() else None

    def log_message(self, *_: object) -> None:
        """Every file of every visit is no news."""
