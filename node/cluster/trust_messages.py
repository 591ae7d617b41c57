"""What daemons say to each other about who belongs to the swarm."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from swarmd.transport.statements import MAX_DENIALS, Certificate, Denial, Handover, Succession


class TellDenials(Struct, frozen=True, tag="denials"):
    """Who is evicted: all that the sender knows, on a new link; what it has just learnt, later."""

    denials: Annotated[tuple[Denial, ...], Meta(max_length=MAX_DENIALS)]


class RenewCertificate(Struct, frozen=True, tag="trust.renew"):
    """From who rotates the token: your certificate (DER) under the new authority. Keep it, and accept both for now."""

    succession: Succession
    certificate: Certificate


class CertificateRenewed(Struct, frozen=True, tag="trust.renewed"):
    """It is kept."""


class SwitchAuthority(Struct, frozen=True, tag="trust.switch"):
    """From who rotates the token: show the new certificate now, and after a while accept the new authority only."""

    handover: Handover


class AuthoritySwitched(Struct, frozen=True, tag="trust.switched"):
    """It is shown from now on."""


TRUST_MESSAGES = (TellDenials, RenewCertificate, CertificateRenewed, SwitchAuthority, AuthoritySwitched)
