"""Downloads from a local server that is kind, breaks off, lies, or never ends."""

import contextlib
import hashlib
import http.server
import io
import re
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import dn_lib  # noqa: F401
from dn_lib.data import DataError, cache_folder, load_corpus
from dn_lib.data import downloads as downloads_module
from dn_lib.data.downloads import DOWNLOADS, Download, fetch, named_text

CONTENT = b"".join(b"line %d of the download\n" % i for i in range(20000))
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DN_LIB_CACHE", str(tmp_path / "cache"))


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.content`, with Range. `server.stop_after` breaks the connection off; `server.answer` is called
    instead if it is set."""

    def do_GET(self):
        asked = self.headers.get("Range")
        self.server.requests.append(asked)
        if self.server.answer is not None:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.server.answer(self)
            return
        start = int(re.match(r"bytes=(\d+)-", asked)[1]) if asked else 0
        if start >= len(self.server.content):
            self.send_error(416)
            return
        body = self.server.content[start:]
        self.begin(206 if asked else 200, {"Content-Length": len(body)})
        self.wfile.write(body[: self.server.stop_after])

    def begin(self, status=200, headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, str(value))
        self.end_headers()

    def log_message(self, *arguments):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False


@pytest.fixture
def server():
    with Server(("127.0.0.1", 0), Handler) as running:
        running.requests, running.stop_after, running.answer, running.content = [], None, None, CONTENT
        running.url = f"http://127.0.0.1:{running.server_port}/text.txt"
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def target(tmp_path):
    return tmp_path / "text.txt"


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


class TestKindServer:
    def test_fetch_once(self, server, target):
        for _ in range(2):
            assert fetch(server.url, DIGEST, target).read_bytes() == CONTENT
        assert server.requests == [None]

    def test_resumes_where_it_stopped(self, server, target):
        server.stop_after = 100_000
        with pytest.raises(DataError, match="run again to go on"):
            fetch(server.url, DIGEST, target)
        assert not target.exists()
        server.stop_after = None
        fetch(server.url, DIGEST, target)
        assert server.requests == [None, "bytes=100000-"]
        assert target.read_bytes() == CONTENT
        assert visible(target.parent) == ["text.txt"]

    def test_wrong_hash_is_never_used(self, server, target):
        with pytest.raises(DataError, match=r"has SHA-256 .* expected 0000.*deleted"):
            fetch(server.url, "0" * 64, target)
        assert visible(target.parent) == []

    def test_a_damaged_cache_is_fetched_again(self, server, target):
        target.write_bytes(b"damaged")
        assert fetch(server.url, DIGEST, target).read_bytes() == CONTENT

    def test_a_file_with_another_hash_stays_until_the_right_one_is_there(self, server, target):
        target.write_bytes(b"of the user")
        for url, digest in ((server.url, "0" * 64), ("http://127.0.0.1:9/nothing", DIGEST)):
            with pytest.raises(DataError):
                fetch(url, digest, target)
            assert target.read_bytes() == b"of the user"

    @pytest.mark.parametrize("size", [50, len(CONTENT), len(CONTENT) + 7])
    def test_a_part_of_another_file_is_replaced(self, server, target, size):
        target.with_name("text.txt.part").write_bytes(b"x" * size)
        assert fetch(server.url, DIGEST, target).read_bytes() == CONTENT
        assert server.requests == [f"bytes={size}-", None]

    def test_a_part_that_is_whole_is_used(self, server, target):
        target.with_name("text.txt.part").write_bytes(CONTENT)
        assert fetch(server.url, DIGEST, target).read_bytes() == CONTENT

    def test_a_target_that_is_a_folder(self, server, tmp_path):
        with pytest.raises(DataError, match="target must be a file"):
            fetch(server.url, DIGEST, tmp_path)

    def test_a_folder_that_cannot_be_written(self, server, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(DataError, match="must be a folder that can be written"):
            fetch(server.url, DIGEST, tmp_path / "file" / "text.txt")

    def test_many_at_once_share_one_download(self, server, target):
        def slowly(handler):
            handler.begin(200, {"Content-Length": len(CONTENT)})
            time.sleep(0.2)
            handler.wfile.write(CONTENT)

        server.answer = slowly
        with ThreadPoolExecutor(8) as pool:
            paths = list(pool.map(lambda _: fetch(server.url, DIGEST, target), range(8)))
        assert paths == [target] * 8 and target.read_bytes() == CONTENT
        assert server.requests == [None]

    def test_waiting_for_another_process_ends(self, server, target):
        with downloads_module.alone(target, 1), pytest.raises(DataError, match="another process has been writing"):
            fetch(server.url, DIGEST, target, deadline=0.1)


def endless(handler):
    handler.begin()
    while True:
        handler.wfile.write(b"x" * 65536)


def endless_chunks(handler):
    handler.protocol_version = "HTTP/1.1"
    handler.begin(200, {"Transfer-Encoding": "chunked"})
    while True:
        handler.wfile.write(b"1000\r\n" + b"x" * 4096 + b"\r\n")


def drip(handler):
    handler.begin(200, {"Content-Length": len(CONTENT)})
    for byte in CONTENT:
        handler.wfile.write(bytes([byte]))
        time.sleep(0.05)


def drip_of_headers(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for i in range(10**6):
        handler.wfile.write(b"X-%d: y\r\n" % i)
        time.sleep(0.05)


def silence(handler):
    time.sleep(5)


def says_too_much(handler):
    handler.begin(200, {"Content-Length": 10**15})
    handler.wfile.write(CONTENT)


def says_too_little(handler):
    handler.begin(200, {"Content-Length": 10})
    handler.wfile.write(CONTENT)


def says_nonsense(handler):
    handler.begin(200, {"Content-Length": "a lot"})
    handler.wfile.write(b"short")


def says_less_than_nothing(handler):
    handler.begin(200, {"Content-Length": -5})
    handler.wfile.write(b"short")


def nothing(handler):
    handler.begin(200, {"Content-Length": 0})


def hangs_up(handler):
    handler.connection.close()


def no_http(handler):
    handler.wfile.write(b"\xff\xfe what is this\r\n\r\n")


def long_status(handler):
    handler.wfile.write(b"HTTP/1.1 200 " + b"o" * 100_000 + b"\r\n\r\n")


def many_headers(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 1000 + b"\r\n")


def broken_chunks(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nnot a size\r\n")


def unasked_part(handler):
    handler.begin(206, {"Content-Range": "bytes 5-9/10", "Content-Length": 5})
    handler.wfile.write(b"12345")


def zipped(handler):
    handler.begin(200, {"Content-Encoding": "gzip", "Content-Length": 5})
    handler.wfile.write(b"\x1f\x8b\x08\x00\x00")


def status(code):
    def answer(handler):
        handler.begin(code, {"Content-Length": 0})

    return answer


def leads_to(place):
    def answer(handler):
        handler.begin(302, {"Location": place or handler.path, "Content-Length": 0})

    return answer


class TestHostileServer:
    @pytest.mark.parametrize(
        ("answer", "message"),
        [
            (endless, "sends more than the 2,000,000 bytes"),
            (endless_chunks, "sends more than the 2,000,000 bytes"),
            (drip, "no end within 0 seconds; run again"),
            (drip_of_headers, "no end within 0 seconds; run again|more than 100 headers"),
            (silence, "no end within 0 seconds; run again"),
            (says_too_much, "has 1,000,000,000,000,000 bytes, more than"),
            (says_too_little, "has SHA-256"),
            (says_nonsense, "has SHA-256"),
            (says_less_than_nothing, "has SHA-256"),
            (nothing, "has SHA-256"),
            (zipped, "has SHA-256"),
            (hangs_up, "could not download"),
            (no_http, "could not download|has SHA-256"),
            (long_status, "could not download"),
            (many_headers, "could not download"),
            (broken_chunks, "could not download"),
            (unasked_part, "the server sent another part"),
            (status(204), "has SHA-256"),
            (status(304), "HTTP 304"),
            (status(401), "HTTP 401"),
            (status(404), "HTTP 404 Not Found"),
            (status(416), "HTTP 416"),
            (status(500), "HTTP 500"),
            (status(999), "HTTP 999"),
            (leads_to(""), "could not download"),
            (leads_to("file:///etc/hostname"), "could not download.*file:///etc/hostname"),
            (leads_to("ftp://127.0.0.1:9/x"), "leads on to ftp://127.0.0.1:9/x, which is not followed"),
            (leads_to("data:text/plain,hello"), "could not download"),
            (leads_to("http://127.0.0.1:9/x"), "could not download"),
            (leads_to("http://[bad"), "could not download"),
        ],
    )
    def test_ends_in_one_line_and_leaves_no_target(self, server, target, answer, message):
        server.answer = answer
        slow = answer in (drip, drip_of_headers, silence)
        begun = time.monotonic()
        with pytest.raises(DataError, match=message) as caught:
            fetch(server.url, DIGEST, target, size=2_000_000, deadline=0.4 if slow else 60)
        assert time.monotonic() - begun < 30
        assert "\n" not in str(caught.value)
        assert not target.exists()

    def test_a_redirect_within_http_is_followed(self, server, target):
        def answer(handler):
            server.answer = None
            handler.begin(302, {"Location": server.url, "Content-Length": 0})

        server.answer = answer
        assert fetch(server.url, DIGEST, target).read_bytes() == CONTENT

    def test_https_is_never_left(self):
        redirects, headers = downloads_module._Redirects(), {}
        secure = downloads_module.urllib.request.Request("https://example.org/a")
        follow = lambda place: redirects.redirect_request(secure, io.BytesIO(), 302, "Found", headers, place)  # noqa: E731
        assert follow("https://example.org/b").full_url == "https://example.org/b"
        with pytest.raises(OSError, match="not followed"):
            follow("http://example.org/b")

    def test_another_range_than_asked_for_begins_anew(self, server, target):
        part = target.with_name("text.txt.part")
        part.write_bytes(CONTENT[:1000])

        def answer(handler):
            handler.begin(206, {"Content-Range": f"bytes 0-{len(CONTENT) - 1}/{len(CONTENT)}"})
            handler.wfile.write(CONTENT)

        server.answer = answer
        with pytest.raises(DataError, match="another part than that from byte 1000 on"):
            fetch(server.url, DIGEST, target)
        server.answer = None
        assert fetch(server.url, DIGEST, target).read_bytes() == CONTENT

    def test_a_server_without_ranges_begins_anew(self, server, target):
        target.with_name("text.txt.part").write_bytes(CONTENT[:1000])

        def answer(handler):
            handler.begin(200)
            handler.wfile.write(CONTENT)

        server.answer = answer
        assert fetch(server.url, DIGEST, target).read_bytes() == CONTENT

    def test_what_arrived_before_the_deadline_is_kept(self, server, target):
        def answer(handler):
            handler.begin(200, {"Content-Length": len(CONTENT)})
            handler.wfile.write(CONTENT[:5000])
            time.sleep(3)

        server.answer = answer
        with pytest.raises(DataError, match="run again to go on"):
            fetch(server.url, DIGEST, target, deadline=0.5)
        server.answer = None
        assert fetch(server.url, DIGEST, target).read_bytes() == CONTENT
        assert server.requests[1] == "bytes=5000-"

    def test_no_network(self, target):
        with pytest.raises(DataError, match="could not download"):
            fetch("http://127.0.0.1:9/nothing", DIGEST, target)

    @pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://host/x", "data:,x", "/etc/hostname", "", "C:\\x"])
    def test_other_schemes_are_refused(self, url, target):
        with pytest.raises(DataError, match="url must begin with https:// or http://"):
            fetch(url, DIGEST, target)

    @pytest.mark.parametrize("url", ["http://", "http://[", "http://a b/", "http://x:port/", "http://\udcff/"])
    def test_addresses_that_are_none(self, url, target):
        with pytest.raises(DataError, match="could not download"):
            fetch(url, DIGEST, target, deadline=10)


class TestNamed:
    def test_is_split_and_fetched_once(self, server, monkeypatch):
        monkeypatch.setitem(DOWNLOADS, "enwik8", Download(server.url, DIGEST, train=9000, validation=500))
        corpus = load_corpus("enwik8")
        # one separator before each text
        assert len(corpus.train) == 9001 and len(corpus.validation) == 501
        load_corpus("enwik8")
        assert server.requests == [None]

    def test_more_bytes_than_declared(self, server, monkeypatch):
        monkeypatch.setitem(DOWNLOADS, "enwik8", Download(server.url, DIGEST, size=1000))
        with pytest.raises(DataError, match="more than the 1,000 that are allowed"):
            named_text("enwik8")

    @staticmethod
    def serve_zip(server, monkeypatch, write, **declared):
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            write(archive)
        server.content = packed.getvalue()
        digest = hashlib.sha256(server.content).hexdigest()
        url = server.url.replace("txt", "zip")
        monkeypatch.setitem(DOWNLOADS, "enwik8", Download(url, digest, member="inside", **declared))

    def test_zip(self, server, monkeypatch):
        self.serve_zip(server, monkeypatch, lambda archive: archive.writestr("inside", CONTENT))
        train, validation = named_text("enwik8")
        assert train + validation == CONTENT
        self.serve_zip(server, monkeypatch, lambda a: a.writestr("inside", CONTENT), train=90, validation=5)
        assert named_text("enwik8") == (CONTENT[:90], CONTENT[90:95])

    def test_zip_without_the_member(self, server, monkeypatch):
        self.serve_zip(server, monkeypatch, lambda archive: archive.writestr("other", CONTENT))
        with pytest.raises(DataError, match="holds no inside that can be read"):
            named_text("enwik8")

    def test_zip_bomb(self, server, monkeypatch):
        self.serve_zip(server, monkeypatch, lambda archive: archive.writestr("inside", bytes(10**7)))
        with pytest.raises(DataError, match="more than the 1,000,000 bytes"):
            named_text("enwik8", most=10**6)

    def test_no_zip_at_all(self, server, monkeypatch):
        monkeypatch.setitem(DOWNLOADS, "enwik8", Download(server.url, DIGEST, member="inside"))
        with pytest.raises(DataError, match="holds no inside that can be read: File is not a zip file"):
            named_text("enwik8")

    @pytest.mark.parametrize("name", sorted(DOWNLOADS))
    def test_pins_are_hashes_and_sizes(self, name):
        assert re.fullmatch("[0-9a-f]{64}", DOWNLOADS[name].sha256)
        assert 0 < DOWNLOADS[name].size < downloads_module.LARGEST


class TestCacheFolder:
    @pytest.fixture(autouse=True)
    def home(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        for name in ("DN_LIB_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)

    @pytest.mark.parametrize("empty", [None, "", "  ", "\t"])
    def test_an_empty_variable_counts_as_not_set(self, tmp_path, monkeypatch, empty):
        for name in ("DN_LIB_CACHE", "XDG_CACHE_HOME"):
            if empty is not None:
                monkeypatch.setenv(name, empty)
        assert cache_folder() == tmp_path / ".cache" / "dn_lib"

    def test_a_relative_user_cache_is_ignored(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        assert cache_folder() == tmp_path / ".cache" / "dn_lib"
        monkeypatch.setenv("XDG_CACHE_HOME", "/absolute")
        assert cache_folder() == Path("/absolute/dn_lib")

    def test_a_tilde_is_the_home(self, tmp_path, monkeypatch):
        monkeypatch.setenv("DN_LIB_CACHE", "~/mine")
        assert cache_folder() == tmp_path / "mine"

    def test_no_home(self, monkeypatch):
        def none():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", none)
        with pytest.raises(DataError, match="set DN_LIB_CACHE"):
            cache_folder()
