"""Crawling permissions: robots.txt and opt-out headers.

robots.txt is interpreted as in RFC 9309. If its status is 4xx, or redirects do not end, everything
is allowed. If the server fails (5xx or 429), nothing is allowed. The file is fetched once per run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

from urllib3 import HTTPHeaderDict

from data_prep.download.address import DownloadError, WebAddress

if TYPE_CHECKING:
    from protego import Protego

ROBOTS_TXT = "/robots.txt"
ROBOTS_TXT_BYTES = 512_000  # the rest is ignored (RFC 9309 requires at least 500 KiB)
# Rules in X-Robots-Tag that count as opt-out.
OPT_OUTS = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
# Rules with a value after a colon; any other word before a colon is the name of a crawler.
RULES_WITH_VALUES = frozenset(
    {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}
)


class RobotsTxt:
    """Checks of URLs against the robots.txt of their site.

    Args:
        user_agent: User-Agent header; its first word, up to a slash, is the crawler's name.
        read: returns the content of a robots.txt, or raises DownloadError.
    """

    def __init__(self, user_agent: str, *, read: Callable[[str], bytes]):
        self._name = crawler_name(user_agent)
        self._read = read
        self._rules_of = lru_cache(maxsize=1024)(self._read_rules)

    def check(self, address: WebAddress) -> None:
        """Checks that robots.txt allows a URL.

        Raises:
            DownloadError: if robots.txt disallows the URL (download_robots_txt), or its host
                cannot be reached.
        """
        if address.target == ROBOTS_TXT:
            return
        rules = self._rules_of(address.origin)
        if isinstance(rules, DownloadError):
            raise rules.with_traceback(None)
        if rules is not None and not rules.can_fetch(address.url, self._name):
            raise DownloadError(
                "download_robots_txt",
                f"disallowed for {self._name} by {address.origin}{ROBOTS_TXT}",
            )

    def _read_rules(self, origin: str) -> Protego | DownloadError | None:
        from protego import Protego

        try:
            content = self._read(origin + ROBOTS_TXT)
        except DownloadError as error:
            if error.status is not None and error.status != 429 and error.status < 500:
                return None
            if error.status is None:
                return None if error.reason == "download_too_many_redirects" else error
            return DownloadError(
                "download_robots_txt", f"{origin}{ROBOTS_TXT}: {error}", is_transient=True
            )
        return Protego.parse(content.decode("utf-8-sig", errors="replace"))


def crawler_name(user_agent: str) -> str:
    """Returns the product name of a User-Agent: "isopair/0.1 (+https://...)" -> "isopair"."""
    return user_agent.partition("/")[0].split(" ")[0].lower()


def check_opt_out(headers: HTTPHeaderDict, *, user_agent: str) -> None:
    """Checks that the headers of a response do not contain an opt-out.

    X-Robots-Tag counts if it addresses all crawlers or this one. TDM-Reservation is defined by the
    TDM Reservation Protocol of the W3C.

    Raises:
        DownloadError: if they contain an opt-out (download_opt_out).
    """
    for line in headers.getlist("X-Robots-Tag"):
        found = OPT_OUTS.intersection(_rules_for(crawler_name(user_agent), line))
        if found:
            raise DownloadError("download_opt_out", f"X-Robots-Tag: {min(found)}")
    if headers.get("TDM-Reservation", "").strip() == "1":
        raise DownloadError("download_opt_out", "TDM-Reservation: 1")


def _rules_for(name: str, line: str) -> set[str]:
    """Returns the rules of one X-Robots-Tag that address this crawler.

    In "noai, otherbot: noindex, nofollow", a crawler's name applies up to the next name.
    """
    rules, is_for_us = set(), True
    for part in line.lower().split(","):
        word, colon, rest = (text.strip() for text in part.partition(":"))
        if colon and word not in RULES_WITH_VALUES:
            is_for_us = word in (name, "*")
            word = rest
        if is_for_us:
            rules.add(word)
    return rules
