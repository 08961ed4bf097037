"""What web servers say about who may use their files: robots.txt, and headers that opt out.

robots.txt is read by RFC 9309: a site that answers 4xx, or without end, has no rules; one that
cannot answer (5xx, also 429) allows nothing. It is fetched once for a whole run.
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
ROBOTS_TXT_BYTES = 512_000  # what stands behind is not read (RFC 9309 asks for 500 KiB at least)
OPT_OUTS = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})  # of X-Robots-Tag
# Rules with a value after a colon; any other word before a colon names a crawler.
RULES_WITH_VALUES = frozenset(
    {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}
)


class RobotsTxt:
    """Whether robots.txt lets us fetch a URL.

    Args:
        user_agent: header of that name; its first word, up to a slash, is what sites call us.
        read: the content of a robots.txt; raises DownloadError.
    """

    def __init__(self, user_agent: str, *, read: Callable[[str], bytes]):
        self._name = crawler_name(user_agent)
        self._read = read
        self._rules_of = lru_cache(maxsize=1024)(self._read_rules)

    def check(self, address: WebAddress) -> None:
        """
        Raises:
            DownloadError: we may not fetch it (download_robots_txt), or the host that should tell
                is not there.
        """
        if address.target == ROBOTS_TXT:
            return
        rules = self._rules_of(address.origin)
        if isinstance(rules, DownloadError):
            raise rules.with_traceback(None)
        if rules is not None and not rules.can_fetch(address.url, self._name):
            raise DownloadError(
                "download_robots_txt", f"{address.origin}{ROBOTS_TXT} disallows it to {self._name}"
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
    """The product's name in a User-Agent header: "isopair/0.1 (+https://...)" -> "isopair"."""
    return user_agent.partition("/")[0].split(" ")[0].lower()


def check_opt_out(headers: HTTPHeaderDict, *, user_agent: str) -> None:
    """Checks that a response's headers do not keep its content from us.

    X-Robots-Tag counts where it is for everybody or for us; TDM-Reservation is that of W3C's TDM
    Reservation Protocol.

    Raises:
        DownloadError: they do (download_opt_out).
    """
    for line in headers.getlist("X-Robots-Tag"):
        found = OPT_OUTS.intersection(_rules_for(crawler_name(user_agent), line))
        if found:
            raise DownloadError("download_opt_out", f"X-Robots-Tag: {min(found)}")
    if headers.get("TDM-Reservation", "").strip() == "1":
        raise DownloadError("download_opt_out", "TDM-Reservation: 1")


def _rules_for(name: str, line: str) -> set[str]:
    """The rules of one X-Robots-Tag that are for this crawler.

    "noai, otherbot: noindex, nofollow": a name holds until the next one.
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
