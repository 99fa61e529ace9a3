"""The downloader against a server that misbehaves in every way we could think of."""

import socket
import time

import pytest

from malloc_bench.data import DataError
from malloc_bench.data.sources import download
from malloc_bench.data.sources.download import download as fetch

BODY = bytes(range(256)) * 1000


def failure(url, tmp_path, hashes=None):
    """The reason of a download that must fail, and must leave nothing behind."""
    with pytest.raises(DataError) as caught:
        fetch(url, tmp_path / "got" / "file", hashes or {"sha256": "0" * 64}, progress=False)
    assert not [path for path in (tmp_path / "got").rglob("*") if path.is_file()]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_good_file_arrives_whole_and_alone(server, tmp_path):
    source = server.serve("good", BODY)
    fetch(source["url"], tmp_path / "got" / "file", {"sha256": source["sha256"]}, progress=True)
    assert [path.name for path in (tmp_path / "got").iterdir()] == ["file"]
    assert (tmp_path / "got" / "file").read_bytes() == BODY


def test_a_failure_leaves_an_older_file_alone(server, tmp_path):
    (tmp_path / "file").write_bytes(b"older")
    with pytest.raises(DataError):
        fetch(server.serve("bad", BODY)["url"], tmp_path / "file", {"sha256": "0" * 64}, progress=False)
    assert (tmp_path / "file").read_bytes() == b"older"


def test_truncated(server, tmp_path):
    source = server.serve("short", BODY, declared=len(BODY) + 10)
    assert failure(source["url"], tmp_path) == f"truncated: {len(BODY)} of {len(BODY) + 10} bytes"


@pytest.mark.parametrize("kind, length", [("md5", 32), ("sha256", 64)])
def test_wrong_hash(server, tmp_path, kind, length):
    reason = failure(server.serve("other", BODY)["url"], tmp_path, {kind: "0" * length})
    assert reason.startswith(f"wrong {kind}: ") and "0" * length in reason


def test_every_given_hash_is_checked(server, tmp_path):
    source = server.serve("good", BODY)
    assert "wrong md5" in failure(source["url"], tmp_path, {"sha256": source["sha256"], "md5": "0" * 32})


def test_not_found(server, tmp_path):
    assert failure(f"{server.url}/nothing", tmp_path) == "HTTP 404 Not Found"


def test_refused_at_once(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begun = time.monotonic()
    assert failure(f"http://127.0.0.1:{port}/x", tmp_path) == "Connection refused"
    assert time.monotonic() - begun < 2


def test_redirects_are_followed_but_not_for_ever(server, tmp_path):
    source = server.serve("good", BODY)
    fetch(server.redirect("moved", source["url"]), tmp_path / "file", {"sha256": source["sha256"]}, progress=False)
    assert (tmp_path / "file").read_bytes() == BODY
    server.asked.clear()
    assert "HTTP 302" in failure(server.redirect("round", f"{server.url}/round"), tmp_path)
    for n in range(20):
        server.redirect(f"chain{n}", f"{server.url}/chain{n + 1}")
    assert "HTTP 302" in failure(f"{server.url}/chain0", tmp_path)
    assert len(server.asked) <= 2 * (download.MAX_REDIRECTS + 1)


@pytest.mark.parametrize("to", ["http://example.com/x", "file:///etc/passwd", "ftp://127.0.0.1/x"])
def test_no_redirect_leaves_the_allowed_schemes(server, tmp_path, no_network_beyond_loopback, to):
    reason = failure(server.redirect("away", to), tmp_path)
    assert "only https" in reason or "not allowed" in reason


@pytest.mark.parametrize("url", ["http://example.com/x", "file:///etc/passwd", "ftp://example.com/x"])
def test_only_https_is_asked(tmp_path, no_network, url):
    assert failure(url, tmp_path) == "only https is used"


def test_a_server_that_never_answers(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "SILENCE", 0.2)
    server.answers["/mute"] = lambda handler: server.closing.wait(10)
    assert failure(f"{server.url}/mute", tmp_path) == "no answer for 0.2 s"


def test_a_server_that_falls_silent_in_the_middle(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "SILENCE", 0.2)

    def answer(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b"x" * 500)
        server.closing.wait(10)

    server.answers["/half"] = answer
    assert failure(f"{server.url}/half", tmp_path) == "no answer for 0.2 s"


def test_a_server_that_drips(server, tmp_path, monkeypatch):
    """Each byte comes in time, the file never would."""
    monkeypatch.setattr(download, "STALL", 0.3)

    def answer(handler):
        handler.send_response(200)
        handler.end_headers()
        while not server.closing.wait(0.02):
            try:
                handler.wfile.write(b"x")
            except OSError:
                return

    server.answers["/drip"] = answer
    assert failure(f"{server.url}/drip", tmp_path).startswith("stalled: ")


def test_a_file_without_end(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "MAX_BYTES", 100_000)
    assert failure(server.serve("big", BODY)["url"], tmp_path) == "over 100000 bytes"


def test_an_unwritable_folder_is_a_reason(server, tmp_path):
    (tmp_path / "got").write_bytes(b"a file where a folder should be")
    with pytest.raises(DataError, match="File exists"):
        fetch(server.serve("good", BODY)["url"], tmp_path / "got" / "file", {"sha256": "0" * 64}, progress=False)


@pytest.fixture
def no_network_beyond_loopback(monkeypatch):
    ask = socket.getaddrinfo

    def only_loopback(host, *args, **kwargs):
        assert host == "127.0.0.1", f"{host} was asked for"
        return ask(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", only_loopback)
