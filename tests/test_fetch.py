"""Downloads: whole or not there, resumed, verified, with errors that say what to do."""

import hashlib
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from longtail.data.sources.cifar import fetch

DATA = bytes(range(256)) * 4000  # 1,024,000 bytes
MD5 = hashlib.md5(DATA).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `data` under any path on 127.0.0.1.

    `ranges`: whether it honours Range. `cuts`: after how many bytes to drop each of the first
    connections. `seen`: the Range header of each request.
    """

    def __init__(self, data: bytes, *, ranges: bool, cuts: list[int]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.data, self.ranges, self.cuts = data, ranges, list(cuts)
        self.seen: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_port}/files/archive.tar.gz"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.seen.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.server.ranges else 0
        if asked and start >= len(self.server.data):
            self.send_error(416)
            return
        body = self.server.data[start:]
        self.send_response(206 if asked and self.server.ranges else 200)
        if asked and self.server.ranges:
            end = len(self.server.data)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{end}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.server.cuts.pop(0)] if self.server.cuts else body)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serve(data: bytes, *, ranges: bool = True, cuts: tuple[int, ...] = ()) -> Iterator[Server]:
    with Server(data, ranges=ranges, cuts=list(cuts)) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_a_download_is_whole_and_leaves_no_part(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "archive"
    with serve(DATA) as server:
        assert fetch.download(server.url, path, MD5, progress=False) == path
    assert path.read_bytes() == DATA
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_is_there_needs_no_network(tmp_path: Path) -> None:
    (tmp_path / "archive").write_bytes(DATA)
    with serve(DATA) as server:
        fetch.download(server.url, tmp_path / "archive", MD5)
        assert server.seen == []


def test_a_wrong_file_put_there_by_hand_is_named_and_kept(tmp_path: Path) -> None:
    (tmp_path / "archive").write_bytes(b"other")
    with pytest.raises(fetch.DownloadError, match=f"archive: has MD5 .*expected {MD5}"):
        fetch.download("http://127.0.0.1/archive", tmp_path / "archive", MD5)
    assert (tmp_path / "archive").read_bytes() == b"other"


def test_dropped_connections_are_resumed_within_one_call(tmp_path: Path) -> None:
    with serve(DATA, cuts=(300_000, 200_000)) as server:
        fetch.download(server.url, tmp_path / "archive", MD5, progress=False)
        assert server.seen == [None, "bytes=300000-", "bytes=500000-"]
    assert (tmp_path / "archive").read_bytes() == DATA


def test_the_part_of_an_interrupted_call_is_resumed_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "archive"
    with serve(DATA, cuts=(400_000, 0)) as server:
        with pytest.raises(fetch.DownloadError, match="broke off after 400000 bytes"):
            fetch.download(server.url, path, MD5, progress=False)
        assert not path.exists()
        assert (tmp_path / "archive.part").read_bytes() == DATA[:400_000]
        fetch.download(server.url, path, MD5, progress=False)
        assert server.seen[-1] == "bytes=400000-"
    assert path.read_bytes() == DATA


def test_a_server_without_ranges_sends_the_whole_again(tmp_path: Path) -> None:
    (tmp_path / "archive.part").write_bytes(DATA[:1000])
    with serve(DATA, ranges=False) as server:
        fetch.download(server.url, tmp_path / "archive", MD5, progress=False)
        assert server.seen == ["bytes=1000-"]
    assert (tmp_path / "archive").read_bytes() == DATA


def test_a_complete_part_is_verified_and_moved(tmp_path: Path) -> None:
    (tmp_path / "archive.part").write_bytes(DATA)
    with serve(DATA) as server:
        fetch.download(server.url, tmp_path / "archive", MD5, progress=False)
    assert (tmp_path / "archive").read_bytes() == DATA


def test_a_wrong_md5_removes_the_file_and_names_all_three(tmp_path: Path) -> None:
    other = hashlib.md5(b"other").hexdigest()
    with serve(DATA) as server, pytest.raises(fetch.DownloadError) as caught:
        fetch.download(server.url, tmp_path / "archive", other, progress=False)
    assert all(text in str(caught.value) for text in (server.url, MD5, other))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_part_is_not_resumed_for_ever(tmp_path: Path) -> None:
    (tmp_path / "archive.part").write_bytes(b"x" * 1000)
    with serve(DATA) as server:
        with pytest.raises(fetch.DownloadError, match="MD5"):
            fetch.download(server.url, tmp_path / "archive", MD5, progress=False)
        fetch.download(server.url, tmp_path / "archive", MD5, progress=False)
    assert (tmp_path / "archive").read_bytes() == DATA


def test_without_a_network_the_error_says_what_to_do(tmp_path: Path) -> None:
    with socket.socket() as unused:  # bound but not listening: connections are refused
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/archive"
        with pytest.raises(fetch.DownloadError) as caught:
            fetch.download(url, tmp_path / "archive", MD5, progress=False)
    message = str(caught.value)
    assert all(text in message for text in (url, "LONGTAIL_MIRROR", str(tmp_path / "archive")))


def test_another_range_than_asked_for_is_refused(tmp_path: Path) -> None:
    (tmp_path / "archive.part").write_bytes(DATA[:1000])
    with serve(DATA) as server:
        server.RequestHandlerClass = OtherRange
        with pytest.raises(fetch.DownloadError, match="not the range asked for: bytes 0-9/10"):
            fetch.download(server.url, tmp_path / "archive", MD5, progress=False)
    assert (tmp_path / "archive.part").read_bytes() == DATA[:1000]


class OtherRange(Handler):
    def do_GET(self) -> None:
        self.send_response(206)
        self.send_header("Content-Range", "bytes 0-9/10")
        self.send_header("Content-Length", "10")
        self.end_headers()
        self.wfile.write(bytes(10))


def test_a_missing_page_is_an_error_with_its_status(tmp_path: Path) -> None:
    (tmp_path / "archive.part").write_bytes(b"")
    with serve(b"") as server:
        server.RequestHandlerClass = NotFound
        with pytest.raises(fetch.DownloadError, match="404"):
            fetch.download(server.url, tmp_path / "archive", MD5, progress=False)


class NotFound(Handler):
    def do_GET(self) -> None:
        self.send_error(404)


def test_progress_goes_to_stderr_and_can_be_switched_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serve(DATA) as server:
        fetch.download(server.url, tmp_path / "quiet", MD5, progress=False)
        assert capsys.readouterr() == ("", "")
        fetch.download(server.url, tmp_path / "loud", MD5)
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-1] == "loud: 100 % of 1.0 MB"


@pytest.mark.parametrize(
    ("url", "md5", "message"),
    [
        ("file:///etc/hostname", MD5, "url: 'file:///etc/hostname'.*allowed are http://"),
        ("http://127.0.0.1/x", "abc", "md5: 'abc'.*32 digits"),
        ("http://127.0.0.1/x", MD5.upper() + " ", "md5: "),
    ],
)
def test_settings_are_checked_first(tmp_path: Path, url: str, md5: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fetch.download(url, tmp_path / "archive", md5)
    assert list(tmp_path.iterdir()) == []
