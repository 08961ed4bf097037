"""An S3 server on 127.0.0.1 (moto's), behind a proxy that counts requests and injects faults."""

import threading
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest
import s3fs
import urllib3
from moto.server import ThreadedMotoServer

BUCKET = "shards"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "toy",
    "AWS_SECRET_ACCESS_KEY": "toy",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class ToyObjectStore(ThreadingHTTPServer):
    """The proxy of all clients, except for `upload` and `delete`.

    Each fault in `faults` is used once:

        a status    the answer has this status
        "cut"       the body ends halfway
        "drip"      the body comes in many parts
        "reset"     no answer
        "flip"      one bit of the body is flipped
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, moto_url):
        super().__init__(("127.0.0.1", 0), _Proxy)
        self.moto_url = moto_url
        self.pool = urllib3.PoolManager(maxsize=16)
        self.faults = defaultdict(list)  # end of the path -> faults still to come
        self.gets = Counter()  # name -> GETs answered in full
        self.sent_bytes = Counter()  # name -> bytes of bodies sent
        self.is_slow = threading.Event()  # bodies stop halfway for as long as it is set
        self.lock = threading.Lock()
        self.client = boto3.client("s3", endpoint_url=moto_url)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def upload(self, folder, prefix):
        """Puts a folder's files below s3://shards/<prefix>, and gives that URL."""
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                key = f"{prefix}/{path.relative_to(folder)}"
                self.client.put_object(
                    Bucket=BUCKET, Key=key, Body=path.read_bytes(), ACL="public-read"
                )
        return f"s3://{BUCKET}/{prefix}"

    def delete(self, url):
        bucket, _, key = url.removeprefix("s3://").partition("/")
        self.client.delete_object(Bucket=bucket, Key=key)

    def forget(self):
        """Forgets what was counted and what faults are left."""
        self.faults.clear()
        self.gets.clear()
        self.sent_bytes.clear()

    def next_fault(self, path):
        with self.lock:
            for end, faults in self.faults.items():
                if path.endswith(end) and faults:
                    return faults.pop(0)
        return None

    def handle_error(self, request, client_address):
        pass  # clients that hang up are what the tests are about


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: ToyObjectStore

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(self.ask())

    def do_PUT(self):
        self.answer(self.ask(self.rfile.read(int(self.headers.get("Content-Length", 0)))))

    do_POST = do_DELETE = do_PUT

    def do_GET(self):
        path = self.path.partition("?")[0]
        fault = self.server.next_fault(path)
        if fault == "reset":
            self.close_connection = True
            return
        if isinstance(fault, int):
            self.send_response(fault)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.answer(self.ask(), fault)

    def ask(self, body=None):
        headers = {name: value for name, value in self.headers.items() if name != "Host"}
        url = self.server.moto_url + self.path
        return self.server.pool.request(
            self.command, url, body=body, headers=headers, retries=False
        )

    def answer(self, response, fault=None):
        body, name = response.data, self.path.partition("?")[0].rpartition("/")[2]
        self.send_response(response.status)
        for header, value in response.headers.items():
            if header.lower() not in ("connection", "transfer-encoding", "date", "server"):
                self.send_header(header, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "flip":
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        self.count(name, len(body) // 2)
        self.wfile.write(body[: len(body) // 2])
        while self.server.is_slow.is_set() and name.endswith(".tar"):
            time.sleep(0.02)
        if fault == "cut":
            self.close_connection = True
            return
        # Counted before they are sent: the test may look as soon as they have come.
        self.count(name, len(body) - len(body) // 2)
        with self.server.lock:
            self.server.gets[name] += 1
        step = 100 if fault == "drip" else len(body)
        for start in range(len(body) // 2, len(body), step):
            self.wfile.write(body[start : start + step])

    def count(self, name, num_bytes):
        with self.server.lock:
            self.server.sent_bytes[name] += num_bytes


@contextmanager
def toy_object_store():
    """Runs the store behind s3:// URLs, for this process and its children."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        moto.start()
        host, port = moto.get_host_and_port()
        store = ToyObjectStore(f"http://{host}:{port}")
        store.client.create_bucket(Bucket=BUCKET)
        patch.setenv("AWS_ENDPOINT_URL_S3", store.url)
        s3fs.S3FileSystem.clear_instance_cache()  # of an earlier store, at another address
        threading.Thread(target=store.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield store
        finally:
            store.is_slow.clear()
            store.shutdown()
            store.server_close()
            moto.stop()
