"""What may be called: no spelling of a private address, no name that leads to one; and what the operator lists."""

from __future__ import annotations

import ipaddress
import socket

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from powergrad.addresses import AddressRefused, AllowList, Target, addresses_of, allowed, checked, is_public, target

NOBODY = AllowList()
FOURS = st.integers(0, 2**32 - 1).map(ipaddress.IPv4Address) | st.ip_addresses(v=4).map(lambda found: ipaddress.IPv4Address(int(found)))
SIXES = st.ip_addresses(v=6)
PRIVATE = (
    "0.0.0.0",
    "10.1.2.3",
    "100.64.0.1",
    "100.100.100.200",
    "127.0.0.1",
    "127.255.255.254",
    "168.63.129.16",
    "169.254.169.254",
    "172.31.255.255",
    "192.0.0.192",
    "192.168.1.1",
    "198.19.0.1",
    "203.0.113.7",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::7f00:1",
    "fe80::1",
    "fec0::1",
    "fc00::1",
    "fd00:ec2::254",
    "ff02::1",
    "100::1",
    "2001:db8::1",
    "3fff::1",
    "64:ff9b:1::1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "64:ff9b::127.0.0.1",
    "64:ff9b::169.254.169.254",
    "2002:7f00:1::",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2",
)


def refused(url: str, allow: AllowList = NOBODY) -> str:
    with pytest.raises(AddressRefused) as caught:
        target(url, allow=allow)
    return str(caught.value)


def literal(address: str) -> str:
    return f"https://[{address}]/" if ":" in address else f"https://{address}/"


@pytest.mark.parametrize("address", PRIVATE)
def test_an_address_that_is_not_public_is_refused_as_a_literal_and_behind_a_name(address: str) -> None:
    assert "not a public address" in refused(literal(address))
    name = target("https://hooks.example/", allow=NOBODY)
    with pytest.raises(AddressRefused, match="not a public address"):
        checked(name, [address], allow=NOBODY)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8"])
def test_a_public_address_may_be_called(address: str) -> None:
    assert target(literal(address), allow=NOBODY).port == 443
    assert allowed("hooks.example", 443, NOBODY, resolve=lambda *_: [address]) == (address,)


@given(st.one_of(FOURS, SIXES, st.sampled_from(PRIVATE).map(ipaddress.ip_address)))
@example(ipaddress.ip_address("192.88.99.1"))
def test_what_is_called_public_is_global_by_the_standard_library_too(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    assume(is_public(address))
    translated = address.version == 6 and address in ipaddress.ip_network("64:ff9b::/96")
    inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if translated else getattr(address, "ipv4_mapped", None) or address
    assert inner.is_global
    told = {"private": inner.is_private, "loopback": inner.is_loopback, "link-local": inner.is_link_local}
    told |= {"multicast": inner.is_multicast, "reserved": inner.is_reserved}
    assert [what for what, is_so in told.items() if is_so] == []


@given(FOURS)
@example(ipaddress.IPv4Address("127.0.0.1"))
def test_an_ipv6_address_that_stands_for_an_ipv4_one_is_no_more_public_than_that(four: ipaddress.IPv4Address) -> None:
    number = int(four)
    for six in (0xFFFF << 32 | number, 0x64FF9B << 96 | number):
        assert is_public(ipaddress.IPv6Address(six)) == is_public(four)
    for six in (number, 0x2002 << 112 | number << 80, 0x20010000 << 96 | number ^ 0xFFFFFFFF, 0x20010000 << 96 | number << 64):
        assert not is_public(ipaddress.IPv6Address(six))


@st.composite
def spellings(draw: st.DrawFn) -> tuple[ipaddress.IPv4Address, str]:
    """An address, and one of the ways in which inet_aton reads it."""
    address = draw(FOURS)
    number, count = int(address), draw(st.integers(1, 4))
    last = 32 - 8 * (count - 1)
    pieces = [number >> 24 - 8 * i & 0xFF for i in range(count - 1)] + [number & (1 << last) - 1]
    forms = st.sampled_from(["{:d}", "0x{:x}", "0X{:X}", "0{:o}", "0x0{:x}", "00{:o}"])
    return address, ".".join(draw(forms).format(piece) for piece in pieces)


@given(spellings())
@example((ipaddress.IPv4Address("127.0.0.1"), "2130706433"))
@example((ipaddress.IPv4Address("127.0.0.1"), "0x7f.1"))
@example((ipaddress.IPv4Address("127.0.0.1"), "017700000001"))
def test_no_spelling_of_an_address_that_the_system_understands_gets_through(given_as: tuple[ipaddress.IPv4Address, str]) -> None:
    address, spelling = given_as
    assert ipaddress.IPv4Address(socket.inet_aton(spelling)) == address  # the spelling is a real one
    try:
        found = target(f"https://{spelling}/", allow=NOBODY)
    except AddressRefused:
        return
    assert found.host == spelling == str(address)
    assert is_public(address)


@given(st.text(min_size=1, max_size=60))
@example("a.example\\@127.0.0.1")
@example("a.example#@127.0.0.1")
@example("a.example/@127.0.0.1")
@example("127.0.0.1%2f.example")
@example("[::1]x")
@example("１２７.0.0.1")
def test_whatever_stands_in_a_url_is_read_or_refused_and_what_is_read_has_a_plain_host(text: str) -> None:
    try:
        found = target(f"https://{text}", allow=NOBODY)
    except AddressRefused:
        return
    assert found.host.isascii()
    assert not set(found.host) & set("@/\\?#%[] \t\r\n")
    assert found.path.startswith("/")


@pytest.mark.parametrize(
    ("url", "rule"),
    [
        ("https://user:pass@hooks.example/", "no user and no password"),
        ("https://@hooks.example/", "no user and no password"),
        ("http://hooks.example/", "http is for listed hosts only"),
        ("https://hooks.example:8443/", "port 8443"),
        ("https://hooks.example:0/", "must be 1 to 65535"),
        ("https://hooks.example:99999/", "must be 1 to 65535"),
        ("https://localhost/", "this machine itself"),
        ("https://LOCALHOST./", "this machine itself"),
        ("https://a.localhost/", "this machine itself"),
        ("https://a..example/", "not a host name"),
        ("https://-a.example/", "not a host name"),
        ("https://[::1%25lo]/", "must be a name or an address"),
        ("https://[::1/", "not a URL"),
        ("https:///path", "must be a name or an address"),
        ("ftp://hooks.example/", "must be https"),
        ("https://hooks.example/a b", "ASCII"),
        ("https://hooks.example/\n", "ASCII"),
        ("https://hooks\u3002example/", "ASCII"),
    ],
)
def test_a_refusal_names_the_rule(url: str, rule: str) -> None:
    assert rule in refused(url)


def test_one_private_address_among_public_ones_is_enough_to_refuse() -> None:
    with pytest.raises(AddressRefused):
        allowed("hooks.example", 443, NOBODY, resolve=lambda *_: ["8.8.8.8", "10.0.0.1"])


def test_a_name_without_an_address_is_refused() -> None:
    with pytest.raises(AddressRefused, match="no address"):
        allowed("hooks.example", 443, NOBODY, resolve=lambda *_: [])


def test_a_refused_name_does_not_tell_what_it_resolves_to() -> None:
    with pytest.raises(AddressRefused) as caught:
        allowed("db.corp", 443, NOBODY, resolve=lambda *_: ["10.11.12.13"])
    assert "10.11" not in str(caught.value)


def test_path_and_query_are_kept_and_the_fragment_is_not() -> None:
    found = target("HTTPS://Hooks.Example./a/b?c=d&e#f", allow=NOBODY)
    assert found == Target("https", "hooks.example", 443, "/a/b?c=d&e", must_be_listed=False)
    assert found.authority == "hooks.example"


LISTED = AllowList.parse("hooks.corp, ci.corp:8080, 10.0.0.0/8, 192.168.7.7:9000, [fd00::]/8, [::1]:7000")


@pytest.mark.parametrize(
    ("host", "port", "address"),
    [
        ("hooks.corp", 80, "192.168.1.1"),
        ("HOOKS.corp", 8443, "127.0.0.1"),
        ("ci.corp", 8080, "192.168.1.1"),
        ("other.corp", 81, "10.9.9.9"),
        ("10.2.3.4", 80, "10.2.3.4"),
        ("192.168.7.7", 9000, "192.168.7.7"),
        ("[fd12::1]", 80, "fd12::1"),
        ("[::1]", 7000, "::1"),
        ("[::ffff:10.0.0.1]", 80, "::ffff:a00:1"),
    ],
)
def test_a_listed_host_may_be_called_on_any_listed_port_by_http_too(host: str, port: int, address: str) -> None:
    found = target(f"http://{host}:{port}/", allow=LISTED)
    assert checked(found, [address], allow=LISTED) == (address,)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://ci.corp:8081/", "192.168.1.1"),
        ("http://xhooks.corp/", "192.168.1.1"),
        ("http://hooks.corp.example/", "192.168.1.1"),
        ("http://192.168.7.7/", "192.168.7.7"),
        ("http://[::1]/", "::1"),
        ("http://hooks.example/", "8.8.8.8"),  # public, but neither http nor the port is listed
        ("https://hooks.example:8443/", "8.8.8.8"),
        ("https://hooks.example/", "192.168.1.1"),
    ],
)
def test_what_is_not_listed_is_not_called_because_something_is(url: str, address: str) -> None:
    with pytest.raises(AddressRefused):
        checked(target(url, allow=LISTED), [address], allow=LISTED)


@pytest.mark.parametrize("text", ["a b", "10.0.0.1/8", "1.2.3", "x:0", "x:99999", "x:y", "[::1", "fd00::/129", "https://x", "*.corp"])
def test_a_list_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be a name, an address or a network"):
        AllowList.parse(f"hooks.corp,{text}")


def test_the_environment_is_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POWERGRAD_ALLOWED_HOSTS", "hooks.corp")
    assert AllowList.of_environment().names("hooks.corp", 1)
    monkeypatch.setenv("POWERGRAD_ALLOWED_HOSTS", "")
    assert AllowList.of_environment() == NOBODY


def test_the_systems_resolver_gives_plain_addresses() -> None:
    found = addresses_of("localhost", 443)
    assert found
    assert all(ipaddress.ip_address(one).is_loopback for one in found)
