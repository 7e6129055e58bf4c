"""Pictures from addresses of http and https, for servers that switch it on by an allow-list.

A name is resolved once and the connection goes to that very address, so that a second answer of the
name server cannot lead elsewhere. Every address of a name must be public, at every redirect. What a
client is told names no address.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Collection
from urllib.parse import SplitResult, urljoin, urlsplit

from lavit.serve.errors import ApiError

PORTS = {"http": 80, "https": 443}
REDIRECTS = 3
SECONDS = 10.0  # for all of it, and for each line of a header
MOVED = (301, 302, 303, 307, 308)


class Fetcher:
    """Gets files of at most `most_bytes` from the hosts of an allow-list."""

    def __init__(self, hosts: Collection[str], most_bytes: int) -> None:
        self.hosts = {host.lower().rstrip(".") for host in hosts}
        self.most_bytes = most_bytes

    def get(self, address: str) -> bytes:
        """The file at an address; blocks. Raises `ApiError`, which names no reason of the net."""
        until = time.monotonic() + SECONDS
        try:
            for _ in range(REDIRECTS + 1):
                status, found = self._once(address, until)
                if status not in MOVED:
                    break
                address = urljoin(address, found.decode("latin-1"))
            if status != 200:
                raise OSError(f"status {status}")
        except ApiError:
            raise
        except (OSError, ValueError, http.client.HTTPException) as error:
            said = "the picture cannot be fetched"
            raise ApiError(400, said, code="failed_to_download_image") from error
        return found

    def _once(self, address: str, until: float) -> tuple[int, bytes]:
        """Status and body of one answer; of a redirect, where it leads."""
        parts = urlsplit(address)
        port = self._check(parts)
        host = str(parts.hostname)
        pinned = public_address(host, port)
        connection = http.client.HTTPConnection(host, port, timeout=SECONDS)
        sock = socket.create_connection((pinned, port), timeout=_left(until))
        connection.sock = sock
        try:
            if parts.scheme == "https":
                context = ssl.create_default_context()
                connection.sock = sock = context.wrap_socket(sock, server_hostname=host)
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            headers = {"Accept": "image/*", "Connection": "close", "User-Agent": "lavit"}
            connection.request("GET", path, headers=headers)
            sock.settimeout(_left(until))
            answer = connection.getresponse()  # which takes the socket from the connection
            if answer.status in MOVED:
                return answer.status, (answer.getheader("Location") or "").encode("latin-1")
            return answer.status, self._body(answer, sock, until)
        finally:
            connection.close()

    def _check(self, parts: SplitResult) -> int:
        """The port of an address that may be fetched; others raise `ApiError`."""
        port = parts.port or PORTS.get(parts.scheme)
        host = (parts.hostname or "").lower().rstrip(".")
        usual = PORTS.get(parts.scheme) == port and not (parts.username or parts.password)
        if host not in self.hosts or not usual or port is None:
            said = "pictures of this address are not fetched"
            raise ApiError(400, said, code="invalid_image_url")
        return port

    def _body(self, answer: http.client.HTTPResponse, sock: socket.socket, until: float) -> bytes:
        found = bytearray()
        while True:
            left = _left(until)
            if sock.fileno() >= 0:
                sock.settimeout(left)
            piece = answer.read1(2**16)
            if not piece:
                return bytes(found)
            found += piece
            if len(found) > self.most_bytes:
                said = f"the picture's file is larger than {self.most_bytes} bytes"
                raise ApiError(400, said, code="image_file_too_large")


def public_address(host: str, port: int) -> str:
    """The first address of a name; raises `ApiError` unless every one of them is public."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(info[4][0]) for info in found]
    if not addresses or not all(map(is_public, addresses)):
        raise ApiError(400, "pictures of this address are not fetched", code="invalid_image_url")
    return addresses[0]


def is_public(address: str) -> bool:
    """True for an address of the public net; one that wraps another is none."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        wrapped = ip.ipv4_mapped or ip.sixtofour or ip.teredo
        if wrapped or ip in ipaddress.ip_network("64:ff9b::/96"):
            return False
    return ip.is_global and not ip.is_multicast


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
