"""Which addresses a node tells others."""

import ipaddress
from types import SimpleNamespace

import ifaddr

from swarmd.discovery.addresses import usable_addresses
from swarmd.discovery.records import MAX_ADDRESSES


def test_the_real_machine_has_loopback_last():
    addresses = usable_addresses()
    loopback = [ipaddress.ip_address(a.partition("%")[0]).is_loopback for a in addresses]
    assert any(loopback)
    assert loopback == sorted(loopback)


def test_order_and_scopes(monkeypatch):
    adapters = [
        SimpleNamespace(name="lo", ips=[SimpleNamespace(ip="127.0.0.1"), SimpleNamespace(ip=("::1", 0, 0))]),
        SimpleNamespace(
            name="eth0",
            ips=[
                SimpleNamespace(ip=("fe80::1", 0, 2)),
                SimpleNamespace(ip=("fd00::2", 0, 0)),
                SimpleNamespace(ip="192.0.2.2"),
                SimpleNamespace(ip="169.254.7.7"),
            ],
        ),
    ]
    monkeypatch.setattr(ifaddr, "get_adapters", lambda: adapters)
    assert usable_addresses() == ["192.0.2.2", "fd00::2", "fe80::1%eth0", "169.254.7.7", "127.0.0.1", "::1"]


def test_the_list_is_bounded(monkeypatch):
    ips = [SimpleNamespace(ip=f"10.0.{i // 250}.{i % 250 + 1}") for i in range(500)]
    monkeypatch.setattr(ifaddr, "get_adapters", lambda: [SimpleNamespace(name="many", ips=ips)])
    assert len(usable_addresses()) == MAX_ADDRESSES
