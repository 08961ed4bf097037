"""A web server on 127.0.0.1 whose paths define its answers, and that counts requests."""

import gzip
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BODY = b"media " * 1000
GZIP_BOMB = gzip.compress(bytes(10_000_000), 1)


class ToyWebServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests = Counter()  # by path
        self.headers_of = {}  # path -> headers of the last request
        self.robots_txt = (404, b"")  # status, content
        self.num_at_a_time = self.most_at_a_time = 0
        self.slow_answers = threading.Semaphore(0)  # answers that /slow may give
        self.lock = threading.Lock()
        self.stopped = threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # the tests are about clients that disconnect


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for the client's acknowledgement
    server: ToyWebServer

    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        with server.lock:
            server.requests[self.path] += 1
            server.headers_of[self.path] = dict(self.headers)
            server.num_at_a_time += 1
            server.most_at_a_time = max(server.most_at_a_time, server.num_at_a_time)
        self.is_counted = True
        try:
            word, *parts = self.path.lstrip("/").partition("?")[0].split("/")
            getattr(self, word.replace(".", "_").replace("-", "_"))(*parts)
        finally:
            self._stop_counting()

    def _stop_counting(self):
        with self.server.lock:
            self.server.num_at_a_time -= self.is_counted
        self.is_counted = False

    def answer(self, status=200, body=BODY, length=None, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self._stop_counting()  # a client that has its answer may ask again before this thread runs
        self.end_headers()
        self.wfile.write(body)

    def answer_until_closed(self, chunks, **headers):
        """Sends a body without a length, which ends with the connection."""
        self.send_response(200)
        self.send_header("Connection", "close")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        for chunk in chunks:
            self.wfile.write(chunk)
            self.wfile.flush()

    # ------------------------------------------------------------------------------------- paths

    def good(self, *_):
        self.answer(body=self.path.encode() + BODY)

    def slow(self, *_):
        self.server.slow_answers.acquire()
        self.good()

    def wait(self, *_):
        self.server.stopped.wait()

    def status(self, status, *_):
        self.answer(int(status))

    def then_good(self, status, retry_after=None):
        again = {} if retry_after is None else {"Retry_After": retry_after}
        if self.server.requests[self.path] == 1:
            self.answer(int(status), **again)
        else:
            self.good()

    def drip(self, *_):
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self._drip()

    def drip_until_closed(self):
        self.answer_until_closed([b"x"])
        self._drip()

    def drip_headers(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        self._drip()

    def _drip(self):
        while not self.server.stopped.wait(0.05):
            self.wfile.write(b"x")

    def loop(self, *_):
        self.answer(302, b"", Location="/loop")

    def to(self, *parts):
        self.answer(301, b"", Location="/" + "/".join(parts))

    def to_url(self):
        self.answer(302, b"", Location=self.path.partition("?")[2])

    def short(self, *_):
        self.close_connection = True
        self.answer(length=len(BODY) + 1)

    def short_chunked(self):
        self.close_connection = True
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"5\r\nhello\r\n6\r\nhal")

    def chunked(self):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"5\r\nhello\r\n0\r\n\r\n")

    def endless(self):
        self.answer_until_closed(bytes(65_536) for _ in range(10_000))

    def gzip(self):
        self.answer(body=gzip.compress(BODY), Content_Encoding="gzip")

    def gzip_short(self):
        self.answer(body=gzip.compress(BODY)[:-9], Content_Encoding="gzip")

    def gzip_bomb(self):
        self.answer(body=GZIP_BOMB, Content_Encoding="gzip")

    def brotli(self):
        self.answer(Content_Encoding="br")

    def garbage(self):
        self.close_connection = True
        self.wfile.write(b"no HTTP at all\r\n\r\n")

    def header(self, name, value):
        self.answer(**{name: value.replace("_", " ")})

    def robots_txt(self):
        status, content = self.server.robots_txt
        self.answer(status, content)


@contextmanager
def toy_web_server():
    server = ToyWebServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        server.shutdown()
        server.server_close()
