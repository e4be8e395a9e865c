"""The page over HTTP: that it follows the log, and that nothing else and nobody else is served."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clip_records import record, write

from distclip.errors import ConfigurationError
from distclip.monitor.page.serving import PageServer
from tests.helpers.command import command
from tests.helpers.processes import in_browser


@contextlib.contextmanager
def serving(server: PageServer) -> Iterator[PageServer]:
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server: PageServer, path: str = "/", method: str = "GET", **headers: str) -> Any:
    """Status, headers and text of an answer."""
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=10)
    with contextlib.closing(connection):
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read().decode()


def data_of(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found is not None
    return json.loads(found.group(1))


def test_it_follows_the_log(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with serving(PageServer([path], 0)) as server:
        status, headers, text = ask(server)
        assert status == 503
        assert headers["Refresh"]
        assert "cannot be read" in text
        write(path, [record(0)])
        _, headers, text = ask(server)
        first = headers["ETag"]
        assert data_of(text)["runs"][0]["steps"] == [0]
        assert f'"{data_of(text)["version"]}"' == first
        assert ask(server, method="HEAD")[1]["ETag"] == first
        with open(path, "a") as file:
            file.write(json.dumps(record(1)) + "\n")
        status, headers, text = ask(server, method="HEAD")
        assert (status, text) == (200, "")
        assert headers["ETag"] != first
        assert data_of(ask(server)[2])["runs"][0]["steps"] == [0, 1]


def test_a_page_is_made_once_for_a_log_that_does_not_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distclip.monitor.page import serving as module

    made: list[int] = []
    real = module.html

    def counted(*arguments: Any, **options: Any) -> str:
        made.append(options["refresh"])
        return real(*arguments, **options)

    monkeypatch.setattr(module, "html", counted)
    with serving(PageServer([write(tmp_path / "r.jsonl", [record(0)])], 0)) as server:
        assert {ask(server)[0] for _ in range(3)} == {200}
    assert made == [module.REFRESH]


def test_nothing_but_the_page_is_served(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [record(0, run="here")])
    with serving(PageServer([path], 0)) as server:
        for asked in (
            "/r.jsonl",
            f"/{path}",
            "/../r.jsonl",
            "/?x",
            "/%2e",
            "*",
            "http://localhost/",
        ):
            status, _, text = ask(server, asked)
            assert (status, "total_norm" in text) == (404, False), asked
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert ask(server, method=method)[0] == 501
        _, headers, _ = ask(server)
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert headers["Content-Security-Policy"] == "frame-ancestors 'none'"
        assert "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_name_that_somebody_lets_lead_here_gets_nothing(tmp_path: Path, method: str) -> None:
    with serving(PageServer([write(tmp_path / "r.jsonl", [record(0)])], 0)) as server:
        port = server.server_address[1]
        for host in ("localhost", f"127.0.0.1:{port}", "localhost:9000", "[::1]:80"):
            assert ask(server, method=method, Host=host)[0] == 200, host
        for host in (
            "evil.example", f"evil.example:{port}", "localhost.evil.example", "127.0.0.1.nip.io",
            "a@localhost", "localhost:1:2", "localhost:", "127.0.0.2", "",
        ):  # fmt: skip
            status, headers, text = ask(server, method=method, Host=host)
            assert (status, "ETag" in headers, "<html" in text) == (403, False, False), host
        for lines in (b"", b"Host: localhost\r\nHost: evil.example\r\n"):
            with socket.create_connection(("127.0.0.1", port), 10) as raw:
                raw.sendall(method.encode() + b" / HTTP/1.1\r\n" + lines + b"\r\n")
                assert b" 403 " in raw.recv(200).splitlines()[0]


def test_only_on_the_loopback_address(tmp_path: Path) -> None:
    with serving(PageServer([tmp_path / "r"], 0)) as server:
        host, port = server.server_address[:2]
        assert host == "127.0.0.1"
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.2", port), 5)
        with pytest.raises(ConfigurationError, match=f"port {port} of this machine cannot be had"):
            PageServer([tmp_path / "r"], port)  # type: ignore[arg-type]


def test_the_command_ends_on_ctrl_c(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [record(0)])
    timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))
    # A shell that starts the tests in the background has them ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        timer.start()
        result = command("report", str(path), "--serve", "--port", "0")
        timer.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.code == 0, result.err
    found = re.search(r"page: http://127\.0\.0\.1:(\d+)/", result.out)
    assert found is not None
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", int(found.group(1))), 5)


@pytest.mark.parametrize("options", [["--serve", "-o", "x.html"], ["--port", "80"]])
def test_what_cannot_be_meant(tmp_path: Path, options: list[str]) -> None:
    result = command("report", str(tmp_path / "r"), *options)
    assert result.code == 2
    assert "--serve" in result.err


class Growing(PageServer):
    """A log that has another step when an open page asks for the first time."""

    grown = False

    def version(self) -> str:
        if not self.grown and self._made[0] and not self._making.locked():
            self.grown = True
            with open(self._paths[0], "a") as file:
                file.write(json.dumps(record(1)) + "\n")
        return super().version()


def test_an_open_page_loads_itself_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [record(0)])
    with serving(Growing([path], 0)) as server:
        shown = in_browser(server.address, budget=8000)
    assert data_of(shown)["runs"][0]["steps"] == [0, 1]
