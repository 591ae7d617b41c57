"""Bytes for people. Decimal units, as disks and memory caps are named (`600MB` = 600,000,000 bytes)."""

from __future__ import annotations

import re

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS |= {_letter: 1000**_power, f"{_letter}B": 1000**_power, f"{_letter}IB": 1024**_power}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)\s*", re.IGNORECASE)


def format_bytes(count: int | float) -> str:
    """`1234567` -> `1.2 MB`."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" or abs(value) >= 99.5 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def parse_bytes(text: str) -> int:
    """`600MB`, `1.5 GiB`, `2g`, `1000000` -> bytes; ValueError says what is accepted."""
    match = _SIZE.fullmatch(text)
    unit = match.group(2).upper() if match else None
    if match is None or unit not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write it like 600MB, 1.5GB or 2GiB")
    return int(float(match.group(1)) * _UNITS[unit])
