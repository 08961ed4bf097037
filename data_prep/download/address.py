"""Parsing of web addresses for requests, and a check that an IP address is public."""

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
    """A URL cannot be downloaded.

    Args:
        reason: stable identifier under which the failure is counted.
        detail: description of the failure, without the URL, which may contain a password.
        is_transient: True if a retry may succeed.
        status: HTTP status of the response; None without a response.
        retry_after_seconds: delay that the server requests.
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
    """A percent-encoded http or https URL, with its password in a separate field."""

    scheme: str
    host: str
    port: int
    target: str  # path and query
    authorization: str | None  # value of the header Authorization

    @property
    def origin(self) -> str:
        """Scheme, host and port."""
        port = "" if self.port == DEFAULT_PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{self.host}{port}"

    @property
    def url(self) -> str:
        """The URL without user name and password."""
        return self.origin + self.target


def parse_address(url: str) -> WebAddress:
    """Parses an absolute http or https URL, and percent-encodes characters where necessary.

    Raises:
        DownloadError: if the text is not such a URL (download_bad_url).
    """
    if len(url) > MAX_URL_CHARACTERS:
        raise DownloadError(
            "download_bad_url", f"{len(url)} characters; expected at most {MAX_URL_CHARACTERS}"
        )
    try:
        parts = parse_url(url.strip())
    except (LocationParseError, UnicodeError, ValueError):
        raise DownloadError("download_bad_url", "not a valid URL") from None
    if parts.scheme not in DEFAULT_PORTS:
        raise DownloadError(
            "download_bad_url", f"expected http:// or https://, found {parts.scheme}"
        )
    if not parts.host:
        raise DownloadError("download_bad_url", "the URL has no host")
    if parts.port == 0:
        raise DownloadError("download_bad_url", "the URL has port 0")
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
    """Resolves the target of a redirect; a password is kept only if the host stays the same.

    Args:
        address: address that redirects.
        location: value of the header Location, with bytes decoded as Latin-1 by http.client.

    Raises:
        DownloadError: if the target is not an http or https URL (download_bad_url).
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
    """Returns True for a public IP address, including public IPv4 addresses embedded in IPv6."""
    address = ipaddress.ip_address(ip_address.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        wrapped = address.ipv4_mapped or address.sixtofour
        if address in NAT64:
            wrapped = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if wrapped is not None:
            return is_public(str(wrapped))
    return address.is_global and not address.is_multicast
