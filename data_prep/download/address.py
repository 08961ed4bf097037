"""Web addresses: their parts, fit for requests, and which hosts are on the public internet."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes, urljoin

from urllib3.exceptions import LocationParseError
from urllib3.util import make_headers, parse_url

from data_prep.sources.pair import BadItemError

DEFAULT_PORTS = {"http": 80, "https": 443}
MAX_URL_CHARACTERS = 16_384
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv4 addresses written as IPv6 (RFC 6052)


class DownloadError(BadItemError):
    """A URL gives no media.

    Args:
        reason: stable word for counting.
        detail: what happened. Holds no URL: it may hold a password.
        is_transient: may it end otherwise at another time?
        status: of the response, if there was one.
        retry_after_seconds: wait that the server asks for.
    """

    def __init__(
        self,
        reason: str,
        detail: str,
        *,
        is_transient: bool = False,
        status: int | None = None,
        retry_after_seconds: float | None = None,
    ):
        super().__init__(reason, detail)
        self.is_transient = is_transient
        self.status = status
        self.retry_after_seconds = retry_after_seconds


@dataclass(frozen=True, slots=True)
class WebAddress:
    """An http or https URL, percent-encoded, its password kept apart."""

    scheme: str
    host: str
    port: int
    target: str  # path and query
    authorization: str | None  # value of the header

    @property
    def origin(self) -> str:
        port = "" if self.port == DEFAULT_PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{self.host}{port}"

    @property
    def url(self) -> str:
        """Without user name and password."""
        return self.origin + self.target


def parse_address(url: str) -> WebAddress:
    """The parts of an absolute http or https URL; characters that need it are percent-encoded.

    Raises:
        DownloadError: it is something else (download_bad_url).
    """
    if len(url) > MAX_URL_CHARACTERS:
        raise DownloadError(
            "download_bad_url", f"{len(url)} characters; at most {MAX_URL_CHARACTERS} are fetched"
        )
    try:
        parts = parse_url(url.strip())
    except (LocationParseError, UnicodeError, ValueError):
        raise DownloadError("download_bad_url", "not readable as a URL") from None
    if parts.scheme not in DEFAULT_PORTS:
        raise DownloadError(
            "download_bad_url", f"expected http:// or https://, found {parts.scheme}"
        )
    if not parts.host:
        raise DownloadError("download_bad_url", "the URL names no host")
    if parts.port == 0:
        raise DownloadError("download_bad_url", "port 0")
    return WebAddress(
        scheme=parts.scheme,
        host=parts.host,
        port=parts.port or DEFAULT_PORTS[parts.scheme],
        target=parts.request_uri,
        authorization=None if parts.auth is None else _basic_authorization(parts.auth),
    )


def _basic_authorization(user_and_password: str) -> str:
    decoded = unquote_to_bytes(user_and_password).decode("latin-1")
    return make_headers(basic_auth=decoded)["authorization"]


def redirected_address(address: WebAddress, location: str) -> WebAddress:
    """Where a redirect leads. A password goes on only to the host that it was given for.

    Args:
        location: value of the header Location, as http.client gives it: bytes taken as Latin-1.

    Raises:
        DownloadError: it leads to no http or https URL (download_bad_url).
    """
    text = location.encode("latin-1", "replace").decode("utf-8", "replace")
    try:
        target = parse_address(urljoin(address.url, text))
    except ValueError as error:
        raise DownloadError("download_bad_url", f"redirect: {error}") from None
    if target.authorization is None and target.origin == address.origin:
        return WebAddress(
            target.scheme, target.host, target.port, target.target, address.authorization
        )
    return target


def is_public(ip_address: str) -> bool:
    """Whether an IP address is on the public internet, also where one is wrapped in another."""
    address = ipaddress.ip_address(ip_address.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        wrapped = address.ipv4_mapped or address.sixtofour
        if address in NAT64:
            wrapped = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if wrapped is not None:
            return is_public(str(wrapped))
    return address.is_global and not address.is_multicast
