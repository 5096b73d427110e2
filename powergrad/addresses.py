"""Which addresses may be called on somebody's behalf: public ones, and the private ones that the operator lists.

A URL in a job is called from inside the operator's network, so that one which leads to this machine, to a neighbour or to a cloud's
metadata would hand its sender what they cannot reach themselves. A name is resolved once, every address that it has is held against the
rule, and the connection goes to one of exactly these: a name that means something else a moment later gains nothing.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from urllib.parse import urlsplit

VARIABLE = "POWERGRAD_ALLOWED_HOSTS"
PORTS = {"http": 80, "https": 443}
HTTPS = frozenset({"https"})

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Resolve = Callable[[str, int], Sequence[str]]
"""A host's addresses, most wanted first. Raises OSError."""

# IANA's special-purpose registry, spelled out: what `ipaddress` calls global has changed between versions of Python
_NOT_PUBLIC_4 = (
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",  # carrier-grade NAT, where one cloud keeps its metadata
    "127.0.0.0/8",
    "168.63.129.16/32",  # Azure's own server of each virtual machine: a public number that never leaves the host
    "169.254.0.0/16",  # link-local: the metadata of most clouds
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/4",
    "240.0.0.0/4",
)
_NOT_PUBLIC_6 = (
    "2001::/23",  # protocol assignments; Teredo, which may lead anywhere, among them
    "2001:db8::/32",
    "2002::/16",  # 6to4, which may lead anywhere too
    "3fff::/20",
)
_PUBLIC_6 = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")
_SPECIAL: tuple[Network, ...] = tuple(ip_network(one) for one in (*_NOT_PUBLIC_4, *_NOT_PUBLIC_6))

_AUTHORITY = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<host>[A-Za-z0-9._-]+))(?::(?P<port>[0-9]{1,5}))?")
_NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(?:\.(?!-)[a-z0-9_-]{1,63}(?<!-))*")
_NUMBER = re.compile(r"(?:.*\.)?(?:0x[0-9a-f]*|[0-9]+)")  # a last label that inet_aton would read as a number
_ENTRY = re.compile(r"(?:\[(?P<six>[^\]]+)\](?P<length>/\d+)?|(?P<rest>[^:]+))(?::(?P<port>\d{1,5}))?")


class AddressRefused(ValueError):
    """The rule forbids to call this host; nothing was sent to it."""


@dataclass(frozen=True)
class Entry:
    """One line of the allow-list: a name, or a network of addresses. port: None is every port."""

    host: str | Network
    port: int | None


@dataclass(frozen=True)
class AllowList:
    """What may be called although it is not public, by plain http and on any port too."""

    entries: tuple[Entry, ...] = ()

    @classmethod
    def parse(cls, text: str) -> AllowList:
        """From `hooks.corp,10.0.0.0/8:8080,[fd00::]/8,127.0.0.1`: names, addresses and networks, each with or without a port.

        Raises ValueError.
        """
        return cls(tuple(_entry(part.strip()) for part in text.split(",") if part.strip()))

    @classmethod
    def of_environment(cls) -> AllowList:
        """As POWERGRAD_ALLOWED_HOSTS says now. Raises ValueError."""
        try:
            return _parsed(os.environ.get(VARIABLE, ""))
        except ValueError as error:
            raise ValueError(f"{VARIABLE}: {error}") from None

    @property
    def has_networks(self) -> bool:
        return any(not isinstance(entry.host, str) for entry in self.entries)

    def names(self, host: str, port: int) -> bool:
        """Whether the host is listed by its name."""
        return any(entry.host == host and entry.port in (None, port) for entry in self.entries)

    def covers(self, address: Address, port: int) -> bool:
        """Whether the address lies in a network that is listed."""
        real = _real(address)
        networks = (entry.host for entry in self.entries if not isinstance(entry.host, str) and entry.port in (None, port))
        return any(real in network for network in networks)


@dataclass(frozen=True)
class Target:
    """A URL that nothing speaks against so far: its name has still to be resolved, and its addresses to be `checked`."""

    scheme: str
    host: str
    """Lower case, without brackets or a last dot."""
    port: int
    path: str
    """With the query; begins with a slash."""
    must_be_listed: bool
    """Being public is not enough: plain http, or another port."""

    @property
    def authority(self) -> str:
        """As the Host header names it."""
        return _bracketed(self.host) + ("" if self.port == PORTS[self.scheme] else f":{self.port}")

    def __str__(self) -> str:
        return f"{self.scheme}://{_bracketed(self.host)}:{self.port}"


def target(url: str, *, allow: AllowList, schemes: frozenset[str] = HTTPS) -> Target:
    """What a URL asks to be called, if that is not forbidden whatever its name may resolve to.

    schemes: by which a public host may be called, on their usual port. Raises AddressRefused.
    """
    found = _parts(url, schemes)
    if (address := _literal(found.host)) is not None:
        checked(found, [str(address)], allow=allow)
    elif not (allow.names(found.host, found.port) or allow.has_networks):  # a network may turn out to hold the name's addresses
        if found.host == "localhost" or found.host.endswith(".localhost"):
            raise AddressRefused(f"{found}: this machine itself: {_way_out(found)}")
        if found.must_be_listed:
            raise AddressRefused(f"{found}: {_unusual(found, schemes)}: {_way_out(found)}")
    return found


def checked(found: Target, addresses: Iterable[str], *, allow: AllowList) -> tuple[str, ...]:
    """The addresses, each of which may be connected to. Raises AddressRefused if there is one that may not, or none at all."""
    kept = tuple(dict.fromkeys(addresses))
    if not kept:
        raise AddressRefused(f"{found}: has no address")
    if allow.names(found.host, found.port):
        return kept
    for address in map(ip_address, kept):
        if allow.covers(address, found.port):
            continue
        if not is_public(address):
            # which one it is stays unsaid: names of the operator's own network are not to be looked up through us
            raise AddressRefused(f"{found}: not a public address: {_way_out(found)}")
        if found.must_be_listed:
            raise AddressRefused(f"{found}: only https on port 443 reaches public hosts: {_way_out(found)}")
    return kept


def addresses_of(host: str, port: int) -> list[str]:
    """What the system's resolver says, most wanted first. Raises OSError."""
    return list(dict.fromkeys(str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))


def allowed(host: str, port: int, allow: AllowList, *, resolve: Resolve = addresses_of) -> tuple[str, ...]:
    """The addresses at which a host may be called by https. Raises AddressRefused, OSError."""
    found = target(f"https://{_bracketed(host)}:{port}/", allow=allow)
    return checked(found, resolve(found.host, port), allow=allow)


def is_public(address: Address) -> bool:
    """Whether the whole internet means the same host by it. An IPv6 address that only stands for an IPv4 one is judged as that."""
    real = _real(address)
    if isinstance(real, IPv6Address) and real not in _PUBLIC_6:
        return False
    return not any(real in network for network in _SPECIAL if network.version == real.version)


def _real(address: Address) -> Address:
    """The IPv4 address behind a mapped or translated (NAT64) one; else the address itself."""
    if not isinstance(address, IPv6Address):
        return address
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address


def _parts(url: str, schemes: frozenset[str]) -> Target:
    """Strict where parsers differ: what one reads as a path, another must not read as a host."""
    if re.search(r"[^!-~]|\\", url):
        raise AddressRefused("the URL must be ASCII, without spaces, control characters or backslashes")
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise AddressRefused(f"not a URL: {error}") from None
    if parts.scheme not in PORTS:
        raise AddressRefused(f"{parts.scheme[:20]}: must be https (or http, for hosts that {VARIABLE} lists)")
    if "@" in parts.netloc:
        raise AddressRefused("must hold no user and no password before the host")
    authority = _AUTHORITY.fullmatch(parts.netloc)
    if authority is None:
        raise AddressRefused(f"{parts.netloc[:100]!r}: must be a name or an address, with or without a port")
    host = authority["six"] or authority["host"].lower().removesuffix(".")
    port = int(authority["port"] or PORTS[parts.scheme])
    if not 0 < port < 2**16:
        raise AddressRefused(f"port {port}: must be 1 to 65535")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    must_be_listed = parts.scheme not in schemes or port != PORTS[parts.scheme]
    return Target(parts.scheme, _canonical(host, is_six=authority["six"] is not None), port, path, must_be_listed)


def _canonical(host: str, *, is_six: bool) -> str:
    if is_six:
        try:
            return str(IPv6Address(host))
        except ValueError:
            raise AddressRefused(f"{host[:64]!r}: not an IPv6 address") from None
    if _NUMBER.fullmatch(host):
        try:
            return str(IPv4Address(host))
        except ValueError:
            raise AddressRefused(f"{host[:64]!r}: an IPv4 address must be four decimal numbers, such as 192.0.2.7") from None
    if len(host) > 253 or not _NAME.fullmatch(host):
        raise AddressRefused(f"{host[:64]!r}: not a host name")
    return host


def _literal(host: str) -> Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _unusual(found: Target, schemes: frozenset[str]) -> str:
    if found.scheme not in schemes:
        return f"{found.scheme} is for listed hosts only, use {' or '.join(sorted(schemes))}"
    return f"port {found.port}: public hosts are called on port {PORTS[found.scheme]} only"


def _way_out(found: Target) -> str:
    return f"the operator may list {_bracketed(found.host)}:{found.port} in {VARIABLE}"


@lru_cache(maxsize=8)
def _parsed(text: str) -> AllowList:
    return AllowList.parse(text)


def _entry(text: str) -> Entry:
    rule = "must be a name, an address or a network, with or without a port: hooks.corp:8080, 10.0.0.0/8, [fd00::]/8"
    try:
        return Entry(ip_network(text), None)  # IPv6 without brackets too, which can have no port
    except ValueError:
        parts = _ENTRY.fullmatch(text)
    if parts is None or (port := int(parts["port"] or 1)) >= 2**16 or port == 0:
        raise ValueError(f"{text!r}: {rule}")
    try:
        host = _listed(parts["rest"], parts["six"], parts["length"])
    except ValueError as error:
        raise ValueError(f"{text!r}: {rule} ({error})") from None
    return Entry(host, port if parts["port"] else None)


def _listed(rest: str | None, six: str | None, length: str | None) -> str | Network:
    if six is not None:
        return ip_network(six + (length or ""))
    assert rest is not None, "one of the two matched"
    if "/" in rest or _NUMBER.fullmatch(rest.lower()):
        return ip_network(rest)
    return _canonical(rest.lower().removesuffix("."), is_six=False)
