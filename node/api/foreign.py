"""Which requests come from a web page elsewhere: the rules about Host, Origin and what browsers say themselves. Pure.

A page on the internet can make a browser send requests to this machine (DNS rebinding, cross-site requests). It cannot
choose Host, Origin or Sec-Fetch-Site, nor send a cross-site body of type application/json without a preflight that
nobody answers. See OWASP, "Cross-site request forgery", https://www.w3.org/TR/fetch-metadata/ and the Fetch standard.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from typing import NamedTuple

# `name`, `name:port`, `[v6]:port`; no user info, no zone, no path. A name that ends in a dot is that name.
_HOST = re.compile(r"(?:\[([0-9a-f:.]{2,45})\]|([a-z0-9_-]+(?:\.[a-z0-9_-]+)*)\.?)(?::\d{1,5})?", re.ASCII)
_PORTS = {"http": ":80", "https": ":443"}


class Refusal(NamedTuple):
    """Why a request is refused: HTTP status, code and a sentence for the user."""

    status: int
    code: str
    message: str


FOREIGN_PAGE = Refusal(403, "foreign_origin", "a web page of another origin may not use this endpoint")


def refusal_of(
    target: str,
    hosts: Sequence[str],
    origins: Sequence[str],
    site: str | None,
    known_hosts: frozenset[str],
    *,
    is_visit: bool,
) -> Refusal | None:
    """Why this request may not come in; None if it may.

    `target` is what stands in the request line; `hosts` and `origins` are all headers of these names, `site` is
    Sec-Fetch-Site. `known_hosts`: names, in lower case, under which this endpoint is meant to be reached, beside
    IP addresses and localhost. `is_visit`: a person may follow a link from anywhere to what is asked for.
    """
    if not target.startswith("/"):
        return Refusal(400, "invalid_target", "the request's target must be a path")
    if len(hosts) != 1:
        return Refusal(400, "invalid_host", "the request must have one Host header")
    if not is_own_host(hosts[0], known_hosts):
        message = f"the host {hosts[0][:100]!r} is not a name of this node; use its address, or name it with --listen"
        return Refusal(403, "foreign_host", message)
    if origins and (len(origins) > 1 or not _same(origins[0], hosts[0])):
        return FOREIGN_PAGE
    # A page served from another port of this machine is "same-site": a stranger, too.
    if site is not None and site not in ("same-origin", "none") and not is_visit:
        return FOREIGN_PAGE
    return None


def is_own_host(header: str, known_hosts: frozenset[str]) -> bool:
    """Whether a Host header names this node. Rebinding needs a DNS name; an IP literal is what the browser really
    connected to."""
    found = _HOST.fullmatch(header.lower())
    if found is None:
        return False
    literal, name = found.groups(default="")
    if name == "localhost" or name in known_hosts:
        return True
    try:
        return ipaddress.ip_address(literal or name).version == (6 if literal else 4)
    except ValueError:
        return False


def _same(origin: str, host: str) -> bool:
    scheme, separator, authority = origin.lower().partition("://")
    if not separator or scheme not in _PORTS:
        return False
    return authority.removesuffix(_PORTS[scheme]) == host.lower().removesuffix(_PORTS[scheme])
