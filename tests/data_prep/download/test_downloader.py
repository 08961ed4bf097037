"""Downloads from a real server on 127.0.0.1, which counts what it is asked."""

import contextlib
import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from urllib3 import HTTPHeaderDict

from data_prep.config import DownloadOptions
from data_prep.download import downloader as downloader_module
from data_prep.download import fetch
from data_prep.download.address import DownloadError, is_public, parse_address, redirected_address
from data_prep.download.cache import (
    DownloadCache,
    DownloadsEnded,
    FetchRecord,
    parse_record,
)
from data_prep.download.downloader import Downloader
from data_prep.download.fetch import retry_seconds
from data_prep.download.robots import check_opt_out
from data_prep.errors import RunError
from data_prep.sources.pair import BadItemError
from data_prep.storage.retry import RetryPolicy
from data_prep.storage.sealed import DamagedFileError
from tests.support.damage import edits, outcomes_of, single_bit_flips, truncations
from tests.support.toy_web_server import BODY, toy_web_server
from tests.support.waiting import wait_until

MAX_BYTES = 1_000_000


@pytest.fixture
def server():
    with toy_web_server() as server:
        yield server


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(fetch, "RetryPolicy", partial(RetryPolicy, first_delay_seconds=0.02))


def options(**changes):
    values = {
        "private_hosts": True,
        "retries": 1,
        "connect_timeout_seconds": 600,
        "read_timeout_seconds": 600,
        "total_timeout_seconds": 600,
        "connections_per_host": 16,
    }
    return DownloadOptions(**{**values, **changes})


def fetch_all(cache, urls, *, max_bytes=MAX_BYTES, **changes):
    with Downloader(options(**changes), cache=cache, max_bytes=max_bytes) as downloader:
        return list(downloader.fetch_all(urls))


def outcome(result):
    """Returns the body, or the reason why there is none."""
    return result.reason if isinstance(result, BadItemError) else result


# ------------------------------------------------------------------------------------- outcomes

OUTCOMES = {
    "good/1": b"/good/1" + BODY,
    "chunked": b"hello",
    "to/good/2": b"/good/2" + BODY,
    "to/to/good/3": b"/good/3" + BODY,
    "then_good/500": b"/then_good/500" + BODY,
    "then_good/503": b"/then_good/503" + BODY,
    "gzip": BODY,
    "good/caf\u00e9 au lait": b"/good/caf%C3%A9%20au%20lait" + BODY,
    "header/X-Robots-Tag/otherbot:_noai,_noimageai": BODY,
    "header/X-Robots-Tag/max-image-preview:_large": BODY,
    "header/TDM-Reservation/0": BODY,
    "status/404": "download_not_found",
    "status/410": "download_not_found",
    "status/401": "download_refused",
    "status/403": "download_refused",
    "status/451": "download_refused",
    "status/400": "download_http_error",
    "status/204": "download_http_error",
    "status/502": "download_http_error",
    "status/304": "download_http_error",
    "short": "download_http_error",
    "short_chunked": "download_http_error",
    "gzip_short": "download_http_error",
    "brotli": "download_http_error",
    "garbage": "download_unreachable",
    "endless": "download_too_large",
    "gzip_bomb": "download_too_large",
    "loop": "download_too_many_redirects",
    "to_url?ftp://127.0.0.1/x": "download_bad_url",
    "to_url?mailto:me@example.org": "download_bad_url",
    "header/X-Robots-Tag/noai": "download_opt_out",
    "header/X-Robots-Tag/all,_NoImageAI": "download_opt_out",
    "header/X-Robots-Tag/isopair:_noindex": "download_opt_out",
    "header/X-Robots-Tag/otherbot:_nofollow,_isopair:_none": "download_opt_out",
    "header/TDM-Reservation/1": "download_opt_out",
}
RETRIED = {
    *("then_good/500", "then_good/503", "status/502", "short", "short_chunked", "gzip_short"),
    "garbage",
}
ENDLESS = ("drip", "drip_until_closed", "drip_headers", "wait")


def test_every_kind_of_answer_ends_in_its_outcome_in_order(server, tmp_path):
    urls = [f"{server.url}/{path}" for path in OUTCOMES]
    results = fetch_all(tmp_path, urls)
    for path, result in zip(OUTCOMES, results, strict=True):
        assert outcome(result) == OUTCOMES[path], path
    once = {path for path in OUTCOMES if "to" not in path and path != "loop"} - RETRIED
    assert {server.requests[f"/{path}"] for path in once if path.isascii()} == {1}
    assert {server.requests[f"/{path}"] for path in RETRIED} == {2}
    assert server.requests["/loop"] == 1 + options().max_redirects

    num_requests = server.requests.total()
    again = fetch_all(tmp_path, urls)
    assert server.requests.total() == num_requests, "a second attempt fetches nothing"
    assert [outcome(result) for result in again] == [outcome(result) for result in results]


def test_answers_without_end_time_out_and_are_retried(server, tmp_path):
    limits = {"read_timeout_seconds": 1.0, "total_timeout_seconds": 1.4, "obey_robots_txt": False}
    urls = [f"{server.url}/{path}" for path in ENDLESS]
    results = fetch_all(tmp_path, urls, **limits)
    assert [outcome(result) for result in results] == ["download_timeout"] * len(ENDLESS)
    # The server may count a request after its client has gone.
    wait_until(lambda: all(server.requests[f"/{path}"] == 2 for path in ENDLESS))
    again = fetch_all(tmp_path, urls, **limits)
    assert server.requests.total() == 2 * len(ENDLESS), "a second attempt fetches nothing"
    assert [outcome(result) for result in again] == [outcome(result) for result in results]


def test_urls_that_lead_nowhere_have_their_reasons(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        closed_port = unused.getsockname()[1]
        urls = {
            "file:///etc/passwd": "download_bad_url",
            "ftp://example.org/x.jpg": "download_bad_url",
            "pictures/1.jpg": "download_bad_url",
            "http://": "download_bad_url",
            "http://[::1": "download_bad_url",
            "http://127.0.0.1:99999/": "download_bad_url",
            "http://a\x00b/": "download_bad_url",
            "http://" + "a" * 20_000: "download_bad_url",
            "http://nowhere.invalid/x.jpg": "download_unreachable",
            f"http://127.0.0.1:{closed_port}/x.jpg": "download_unreachable",
            f"https://127.0.0.1:{closed_port}/x.jpg": "download_unreachable",
        }
        results = fetch_all(tmp_path, list(urls))
    assert [outcome(result) for result in results] == list(urls.values())


def test_tls_with_a_server_that_has_none_is_unreachable(server, tmp_path):
    (result,) = fetch_all(tmp_path, [server.url.replace("http", "https") + "/good/1"])
    assert outcome(result) == "download_unreachable"


def test_body_of_exactly_the_limit_passes_and_one_byte_more_does_not(server, tmp_path):
    urls = [f"{server.url}/status/200", f"{server.url}/gzip"]
    assert fetch_all(tmp_path / "1", urls, max_bytes=len(BODY)) == [BODY, BODY]
    results = fetch_all(tmp_path / "2", urls, max_bytes=len(BODY) - 1)
    assert [outcome(result) for result in results] == ["download_too_large"] * 2
    assert fetch_all(tmp_path / "2", urls, max_bytes=len(BODY)) == [BODY, BODY]


def test_retry_after_is_honoured(server, tmp_path, monkeypatch):
    waits = []

    def at_once(delay, error):
        waits.append(retry_seconds(delay, error))
        return 0

    monkeypatch.setattr(fetch, "retry_seconds", at_once)
    (body,) = fetch_all(tmp_path, [f"{server.url}/then_good/429/1"])
    assert body.endswith(BODY)
    assert waits == [1]


@pytest.mark.parametrize(("asked", "seconds"), [(None, 2), (0, 2), (5, 5), (3600, 60)])
def test_a_server_may_lengthen_the_wait_up_to_a_limit(asked, seconds):
    error = DownloadError("download_http_error", "", retry_after_seconds=asked)
    assert retry_seconds(2, error) == seconds


def test_password_is_sent_to_its_host_and_written_nowhere(server, tmp_path, caplog):
    caplog.set_level(0)
    with_password = server.url.replace("//", "//me:s%3Acret@")
    urls = [f"{with_password}/good/1", f"{with_password}/to/good/2", f"{with_password}/status/500"]
    results = fetch_all(tmp_path, urls)
    expected = "Basic bWU6czpjcmV0"  # base64 of me:s:cret
    assert server.headers_of["/good/1"]["Authorization"] == expected
    assert server.headers_of["/good/2"]["Authorization"] == expected
    written = caplog.text + str(results[2])
    written += "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    assert "cret" not in written


def test_request_says_who_asks_and_wants_no_compression(server, tmp_path):
    fetch_all(tmp_path, [f"{server.url}/good/1"])
    assert server.headers_of["/good/1"]["User-Agent"] == DownloadOptions().user_agent
    assert server.headers_of["/good/1"]["Accept-Encoding"] == "identity"


# ------------------------------------------------------------------------------------ addresses


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "0.0.0.0", "[::1]", "2130706433", "[::ffff:127.0.0.1]"]
)
def test_private_hosts_are_refused_however_they_are_written(server, tmp_path, host):
    url = f"http://{host}:{server.server_port}/good/1"
    (result,) = fetch_all(tmp_path, [url], private_hosts=False, obey_robots_txt=False)
    assert outcome(result) == "download_private_host"
    assert not server.requests


def test_redirect_to_a_private_host_is_refused(server, tmp_path, monkeypatch):
    # The first host counts as public, as one on the internet would.
    monkeypatch.setattr("data_prep.download.connection.is_public", lambda ip: ip == "127.0.0.1")
    url = f"{server.url}/to_url?http://127.0.0.2:{server.server_port}/good/1"
    (result,) = fetch_all(tmp_path, [url], private_hosts=False)
    assert outcome(result) == "download_private_host"
    assert "/good/1" not in server.requests


def test_name_that_leads_elsewhere_a_moment_later_is_refused(server, tmp_path, monkeypatch):
    # What was checked is what is connected to: every answer of the resolver is checked.
    answers = iter(["93.184.215.14", "127.0.0.1"])
    real = socket.getaddrinfo

    def resolve(host, *args, **kwargs):
        name = next(answers) if host == "rebinding.example" else host
        return real(name, *args, **kwargs)

    connected = []
    monkeypatch.setattr(socket, "getaddrinfo", resolve)

    def connect(address, *_):
        connected.append(address[0])
        raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")

    monkeypatch.setattr("data_prep.download.connection.create_connection", connect)
    url = f"http://rebinding.example:{server.server_port}/good/1"
    (result,) = fetch_all(tmp_path, [url], private_hosts=False, obey_robots_txt=False)
    assert outcome(result) == "download_private_host"
    assert connected == ["93.184.215.14"]


def test_public_addresses():
    public = ["8.8.8.8", "2606:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8"]
    private = [
        *("10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
        *("127.9.9.9", "224.0.0.1", "255.255.255.255", "::1", "fe80::1%eth0", "fc00::1"),
        *("::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:7f00:1::", "ff02::1", "::"),
    ]
    assert [is_public(address) for address in public] == [True] * len(public)
    assert [is_public(address) for address in private] == [False] * len(private)


def test_redirect_keeps_a_password_on_its_own_host_alone():
    address = parse_address("http://me:secret@example.org/a/b?c")
    assert address.url == "http://example.org/a/b?c"
    assert redirected_address(address, "../d").authorization == address.authorization
    assert redirected_address(address, "../d").url == "http://example.org/d"
    assert redirected_address(address, "//other.org/d").authorization is None
    assert redirected_address(address, "https://example.org/d").authorization is None
    assert redirected_address(address, "/\u00c3\u00a9").target == "/%C3%A9"  # UTF-8 as Latin-1


@given(st.text() | st.text("ht:/@[]%?#&.a1\u00e9\ud800 ").map("http://".__add__), st.text())
def test_every_text_is_an_address_or_a_bad_url(text, location):
    try:
        address = parse_address(text)
        assert address.url.isascii() and address.url.isprintable()
        assert parse_address(address.url).url == address.url
        redirected_address(address, location)
    except DownloadError as error:
        assert error.reason == "download_bad_url"


# ----------------------------------------------------------------------------------- permission


@pytest.mark.parametrize(
    ("status", "content", "expected"),
    [
        (200, b"User-agent: *\nDisallow: /", "download_robots_txt"),
        (200, b"\xef\xbb\xbfUser-agent: IsoPair\nDisallow: /good", "download_robots_txt"),
        (200, b"User-agent: otherbot\nDisallow: /", BODY),
        (200, b"User-agent: pypi\nDisallow: /", BODY),  # in our header's comment, not our name
        (200, b"User-agent: *\nDisallow: /\nUser-agent: isopair\nAllow: /", BODY),
        (200, b"User-agent: *\nDisallow: /*.gif$\nAllow: /good", BODY),
        (200, b"", BODY),
        (200, b"\xff\xfe nonsense", BODY),
        (200, b"#" * 600_000 + b"\nUser-agent: *\nDisallow: /", BODY),  # behind what is read
        (404, b"User-agent: *\nDisallow: /", BODY),
        (403, b"", BODY),
        (429, b"", "download_robots_txt"),
        (503, b"", "download_robots_txt"),
    ],
)
def test_robots_txt_is_obeyed(server, tmp_path, status, content, expected):
    server.robots_txt = (status, content)
    urls = [f"{server.url}/good/{number}" for number in range(3)]
    results = fetch_all(tmp_path, urls, retries=0)
    for url, result in zip(urls, results, strict=True):
        body = url.removeprefix(server.url).encode() + BODY
        assert outcome(result) == (body if expected == BODY else expected)
    assert server.requests["/robots.txt"] == 1
    fetch_all(tmp_path, [*urls, f"{server.url}/good/4"], retries=0)
    assert server.requests["/robots.txt"] == 1


def test_robots_txt_of_every_hop_is_obeyed(server, tmp_path):
    with toy_web_server() as other:
        other.robots_txt = (200, b"User-agent: *\nDisallow: /")
        (result,) = fetch_all(tmp_path, [f"{server.url}/to_url?{other.url}/good/1"])
        assert outcome(result) == "download_robots_txt"
        assert "/good/1" not in other.requests


def test_host_that_is_not_there_is_not_counted_as_its_robots_txt(tmp_path):
    (result,) = fetch_all(tmp_path, ["http://127.0.0.1:1/x.jpg"], retries=0)
    assert outcome(result) == "download_unreachable"


def test_permission_is_not_asked_where_options_say_so(server, tmp_path):
    server.robots_txt = (200, b"User-agent: *\nDisallow: /")
    urls = [f"{server.url}/good/1", f"{server.url}/header/X-Robots-Tag/noai"]
    rude = {"obey_robots_txt": False, "obey_opt_out_headers": False}
    assert all(isinstance(result, bytes) for result in fetch_all(tmp_path, urls, **rude))
    assert server.requests["/robots.txt"] == 0


def test_robots_txt_itself_may_be_fetched(server, tmp_path):
    server.robots_txt = (200, b"User-agent: *\nDisallow: /")
    assert fetch_all(tmp_path, [f"{server.url}/robots.txt"]) == [server.robots_txt[1]]


def test_opt_out_of_several_headers():
    headers = HTTPHeaderDict({"X-Robots-Tag": "nofollow"})
    headers.add("X-Robots-Tag", "unavailable_after: 25 Jun 2030 15:00:00 PST")
    headers.add("X-Robots-Tag", "otherbot: noai")
    check_opt_out(headers, user_agent="isopair/0.1")
    with pytest.raises(DownloadError, match="X-Robots-Tag: noai"):
        check_opt_out(headers, user_agent="OtherBot/2.0 (+https://example.org)")
    headers.add("X-Robots-Tag", "noimageindex")
    with pytest.raises(DownloadError, match="X-Robots-Tag: noimageindex"):
        check_opt_out(headers, user_agent="isopair/0.1")


# ---------------------------------------------------------------------------------- never twice


def test_equal_urls_in_one_call_are_fetched_once(server, tmp_path):
    urls = [f"{server.url}/slow/{number % 7}" for number in range(300)]
    with ThreadPoolExecutor(1) as thread:
        fetched = thread.submit(fetch_all, tmp_path, urls, threads=8)
        wait_until(lambda: server.num_at_a_time == 7)
        server.slow_answers.release(len(urls))
        results = fetched.result()
    assert results == [f"/slow/{number % 7}".encode() + BODY for number in range(300)]
    assert {server.requests[f"/slow/{number}"] for number in range(7)} == {1}


def test_failures_are_remembered_and_transient_ones_retried_only_if_asked(server, tmp_path):
    urls = [f"{server.url}/status/404", f"{server.url}/status/503"]
    for retry_failed, expected in ((False, 1), (False, 1), (True, 2), (False, 2)):
        results = fetch_all(tmp_path, urls, retries=0, retry_failed=retry_failed)
        assert [outcome(r) for r in results] == ["download_not_found", "download_http_error"]
        assert server.requests["/status/404"] == 1
        assert server.requests["/status/503"] == expected


def test_retry_failed_asks_once_in_an_attempt(server, tmp_path):
    url = f"{server.url}/status/503"
    fetch_all(tmp_path, [url], retries=0)
    with Downloader(
        options(retries=0, retry_failed=True), cache=tmp_path, max_bytes=MAX_BYTES
    ) as downloader:
        list(downloader.fetch_all([url]))
        list(downloader.fetch_all([url]))
    assert server.requests["/status/503"] == 2


def test_forgotten_bodies_are_deleted_and_failures_stay_known(server, tmp_path):
    urls = [f"{server.url}/good/1", f"{server.url}/status/404"]
    with Downloader(options(), cache=tmp_path, max_bytes=MAX_BYTES) as downloader:
        first = list(map(outcome, downloader.fetch_all(urls)))
        downloader.forget(urls)
        assert not [path for path in tmp_path.rglob("*") if len(path.name) == 64]
        assert list(map(outcome, downloader.fetch_all(urls))) == first
    assert server.requests["/good/1"] == 2  # nothing else gives its bytes
    assert server.requests["/status/404"] == 1


def test_half_a_body_or_record_is_never_taken_for_whole(server, tmp_path):
    urls = [f"{server.url}/good/{number}" for number in range(3)]
    whole = fetch_all(tmp_path, urls)
    cache = DownloadCache(tmp_path, closed=threading.Event())
    os.truncate(cache.body_path(urls[0]), 100)
    os.truncate(cache.body_path(urls[1]) + ".json", 20)
    Path(cache.body_path(urls[2])).unlink()
    assert fetch_all(tmp_path, urls) == whole
    assert [server.requests[f"/good/{number}"] for number in range(3)] == [2, 2, 2]


def test_no_damaged_record_is_taken_for_another(tmp_path):
    cache = DownloadCache(tmp_path, closed=threading.Event())
    record = FetchRecord("download_refused", "HTTP status 403", status=403, time=1.5, max_bytes=10)
    cache.write_record("https://a.org/1", record)
    assert cache.read_record("https://a.org/1") == record
    content = Path(cache.body_path("https://a.org/1") + ".json").read_bytes()
    damaged = [*single_bit_flips(content.strip()), *truncations(content.strip())]
    assert list(outcomes_of(parse_record, damaged, error=DamagedFileError)) == []
    # Of earlier versions: without a checksum, but of the right types or refused.
    plain = json.dumps(vars(record)).encode()
    assert parse_record(plain) == record
    for _, found in outcomes_of(parse_record, edits(plain), error=DamagedFileError):
        for key, value in vars(found).items():
            kinds = {type(vars(record)[key]), type(getattr(FetchRecord(), key))}
            assert type(value) in kinds | ({int} if key == "time" else set()), key


def test_a_folder_in_the_place_of_a_record_is_named(tmp_path):
    cache = DownloadCache(tmp_path, closed=threading.Event())
    path = Path(cache.body_path("https://a.org/1") + ".json")
    path.mkdir()
    for use in (cache.read_record, lambda url: cache.write_record(url, FetchRecord())):
        with pytest.raises(RunError, match=rf"{path}: cannot store downloads: Is a directory"):
            use("https://a.org/1")


PROGRAM = """
import sys
from data_prep.config import DownloadOptions
from data_prep.download.downloader import Downloader
cache, limit, *urls = sys.argv[1:]
options = DownloadOptions(
    private_hosts=True,
    connections_per_host=int(limit),
    threads=12,
    read_timeout_seconds=600,
    total_timeout_seconds=600,
)
print("imported", flush=True)
with Downloader(options, cache=__import__("pathlib").Path(cache), max_bytes=10**6) as downloader:
    for content in downloader.fetch_all(urls):
        print(len(content), flush=True)
"""


def start_process(cache, urls, *, limit=3):
    command = [sys.executable, "-c", PROGRAM, str(cache), str(limit), *urls]
    root = Path(__file__).parents[3]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
    assert process.stdout.readline() == "imported\n"
    return process


def records_in(cache):
    return list(cache.rglob("*.json"))


def test_two_processes_ask_once_for_each_url_and_share_a_hosts_places(server, tmp_path):
    urls = [f"{server.url}/slow/{number}" for number in range(60)]
    processes = [start_process(tmp_path, order) for order in (urls, urls[::-1])]
    wait_until(lambda: server.num_at_a_time == 3)
    server.slow_answers.release(len(urls))
    outputs = [process.communicate(timeout=600)[0].split() for process in processes]
    assert [len(output) for output in outputs] == [60, 60]
    assert set(server.requests.values()) == {1}
    assert 2 <= server.most_at_a_time <= 3


def test_killed_process_leaves_nothing_that_harms_the_next(server, tmp_path):
    urls = [f"{server.url}/slow/{number}" for number in range(40)]
    process = start_process(tmp_path, urls)
    server.slow_answers.release(20)
    assert len(list(islice(process.stdout, 5))) == 5
    wait_until(lambda: server.num_at_a_time == 3)  # the others were answered
    wait_until(lambda: len(records_in(tmp_path)) == 21)  # one of robots.txt
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    fetched = {json.loads(path.read_text())["sha256"] for path in tmp_path.rglob("*.json")}
    assert 5 <= len(fetched) < 40
    server.slow_answers.release(2 * len(urls))
    results = fetch_all(tmp_path, urls, connections_per_host=3)
    assert results == [url.removeprefix(server.url).encode() + BODY for url in urls]
    asked_again = [path for path, number in server.requests.items() if number > 1]
    assert len(asked_again) <= 3  # what was under way


# ------------------------------------------------------------------------------ threads and disk


def test_slow_host_does_not_hold_up_others(server, tmp_path):
    waiting = [f"{server.url}/wait/{number}" for number in range(12)]
    with toy_web_server() as other:
        quick = [f"{other.url.replace('127.0.0.1', 'localhost')}/good/{n}" for n in range(12)]
        with Downloader(
            options(threads=4, connections_per_host=2, obey_robots_txt=False, retries=0),
            cache=tmp_path,
            max_bytes=MAX_BYTES,
        ) as downloader:
            results = downloader.fetch_all(waiting + quick)
            threading.Thread(target=first_of, args=(results,), daemon=True).start()
            wait_until(lambda: sum(other.requests.values()) >= 2)
            wait_until(lambda: server.num_at_a_time == 2)  # the first host is waited for
            assert server.requests.total() == 2


def is_idle(downloader):
    """Returns True if no thread works, and no job waits for one."""
    with downloader._changed:
        return not downloader._jobs and not +downloader._jobs_of_host


def test_no_more_is_fetched_ahead_than_agreed(server, tmp_path):
    urls = [f"{server.url}/good/{number}" for number in range(100)]
    with Downloader(options(threads=2), cache=tmp_path, max_bytes=MAX_BYTES) as downloader:
        results = downloader.fetch_all(urls)
        next(results)
        wait_until(lambda: is_idle(downloader))
        assert server.requests.total() - server.requests["/robots.txt"] <= 9
        assert len(list(results)) == 99


def first_of(results):
    with contextlib.suppress(DownloadsEnded):
        next(results)


def test_closing_ends_promptly_and_records_nothing(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloader_module, "SHUTDOWN_SECONDS", 600)
    urls = [f"{server.url}/{path}/{number}" for path in ("drip", "wait") for number in range(4)]
    slow = options(read_timeout_seconds=6000, total_timeout_seconds=6000, retries=3)
    with Downloader(slow, cache=tmp_path, max_bytes=MAX_BYTES) as downloader:
        results = downloader.fetch_all(urls)
        threading.Thread(target=first_of, args=(results,), daemon=True).start()
        wait_until(lambda: server.num_at_a_time == 8)
        threads = list(downloader._threads)
        assert all(thread.is_alive() for thread in threads)
    assert not any(thread.is_alive() for thread in threads)  # none waits for its time limit
    records = [json.loads(path.read_text()) for path in tmp_path.rglob("*.json")]
    assert [record["status"] for record in records] == [404]  # robots.txt


def test_full_disk_stops_the_run_and_names_the_folder(server, tmp_path):
    # A limit on the size of files stands for the full disk: writing fails in the same place.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    urls = [f"{server.url}/{path}" for path in ("good/1", "gzip", "status/404")]
    with Downloader(options(), cache=tmp_path, max_bytes=MAX_BYTES) as downloader:
        for num_bytes in (1000, 0):  # too few for a body; for a record
            resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
            try:
                with pytest.raises(RunError, match=rf"^{tmp_path}: .*File too large; free space"):
                    list(downloader.fetch_all(urls[:2] if num_bytes else urls[2:]))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        results = list(downloader.fetch_all(urls))
    assert list(map(outcome, results)) == [b"/good/1" + BODY, BODY, "download_not_found"]


def test_cache_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot store downloads: Not a directory"):
        Downloader(options(), cache=tmp_path / "file" / "cache", max_bytes=1)


def test_what_failed_for_a_reason_that_is_named_is_fetched_again(server, tmp_path):
    url = f"{server.url}/status/404"
    for retried, num_requests in ((), 1), ((), 1), (("download_not_found",), 2):
        with Downloader(options(), cache=tmp_path, max_bytes=9, retried=retried) as downloader:
            (result,) = downloader.fetch_all([url])
        assert result.reason == "download_not_found"
        assert server.requests["/status/404"] == num_requests
        assert server.requests["/robots.txt"] == 1  # it is not there either
