"""The page at an address of this machine, made anew when a log has changed.

Nothing but the page is served, whatever path is asked for, and to nobody but this machine: the
socket listens on 127.0.0.1. A page of another site, whose name its owner lets lead here (DNS
rebinding), is told by the Host header and gets nothing.
"""

from __future__ import annotations

import hashlib
import http.server
import math
import os
import re
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from pathlib import Path

from distclip.errors import ConfigurationError
from distclip.monitor.page.writing import html
from distclip.monitor.reading import read_runs
from distclip.monitor.summary import summaries

PORT = 8237
"""Where the page is served unless another port is asked for."""

REFRESH = 3
"""Seconds after which an open page looks whether the logs have changed."""

_HERE = re.compile(r"(?:127\.0\.0\.1|localhost|\[::1\])(?::\d{1,5})?", re.ASCII)
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class PageServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Serves the page of some logs at ``address``; ``serve_forever`` starts it.

    Args:
        paths: JSONL files; they need not be there yet.
        port: of 127.0.0.1; 0 for one that is free.

    Raises:
        ConfigurationError: the port cannot be had.
    """

    daemon_threads = True
    allow_reuse_address = os.name == "posix"  # elsewhere it lets two listen on one port

    def __init__(self, paths: Sequence[Path], port: int = PORT) -> None:
        self._paths = list(paths)
        self._making = threading.Lock()
        self._made = ("", "")
        """A page, and the version of the logs that it was made from."""
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise ConfigurationError(
                f"report --serve: port {port} of this machine cannot be had "
                f"({error.strerror or error}); give another with --port, or 0 for any that is free"
            ) from None

    @property
    def address(self) -> str:
        """Where a browser finds the page."""
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def version(self) -> str:
        """A text that changes when a log does."""
        found = hashlib.sha256()
        for path in self._paths:
            try:
                now = os.stat(path)
                found.update(f"{now.st_ino} {now.st_size} {now.st_mtime_ns};".encode())
            except (OSError, ValueError):
                found.update(b"-;")
        return found.hexdigest()[:16]

    def page(self) -> tuple[str, str]:
        """The page, and the version of the logs that it shows.

        Raises:
            ConfigurationError: a log that cannot be read, or has no step yet.
        """
        with self._making:
            version = self.version()  # before reading: what is written meanwhile is another one
            if version != self._made[1]:
                began = time.monotonic()
                runs = [run for path in self._paths for run in read_runs(path)]
                # A long log takes seconds to read: a fifth of the time at most.
                pause = max(REFRESH, math.ceil(4 * (time.monotonic() - began)))
                page = html(runs, summaries(runs), refresh=pause, version=version)
                self._made = (page, version)
            return self._made

    def handle_error(self, request: object, client_address: object) -> None:
        """A browser that has gone away is no error."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(http.server.BaseHTTPRequestHandler):
    server: PageServer
    server_version, sys_version = "distclip", ""
    timeout = 10.0

    def do_GET(self) -> None:
        self._answer(self._page)

    def do_HEAD(self) -> None:
        self._answer(lambda: self._send(HTTPStatus.OK, "", self.server.version()))

    def _answer(self, answer: Callable[[], None]) -> None:
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not _HERE.fullmatch(hosts[0]):
            self._send(HTTPStatus.FORBIDDEN, "Ask for 127.0.0.1 or localhost.\n")
        elif self.path != "/":
            self._send(HTTPStatus.NOT_FOUND, "There is one page here, at /.\n")
        else:
            answer()

    def _page(self) -> None:
        try:
            page, version = self.server.page()
        except ConfigurationError as error:
            self._send(HTTPStatus.SERVICE_UNAVAILABLE, f"{error}\n\nLooking again.\n", again=True)
        else:
            self._send(HTTPStatus.OK, page, version)

    def _send(
        self, status: HTTPStatus, text: str, version: str = "", *, again: bool = False
    ) -> None:
        body = text.encode("utf-8", "backslashreplace")
        kind = "html" if status == HTTPStatus.OK else "plain"
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"text/{kind}; charset=utf-8")
        if version:
            self.send_header("ETag", f'"{version}"')
        if again:
            self.send_header("Refresh", str(REFRESH))
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the terminal belongs to whoever started the command."""
