"""Amounts for people: sizes in powers of ten, times and money."""

import re
from decimal import Decimal

DURATION = re.compile(r"(\d{1,4})([smhd])|0")
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def size(num_bytes: float) -> str:
    """Return a size in bytes, in powers of ten."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:,.{2 if unit == 'GB' else 1}f} {unit}"
    return f"{num_bytes:,.0f} B"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:,.1f}"


def duration_s(written: str) -> int | None:
    """Return the seconds of a duration such as 90s, 30m, 12h or 7d, and of 0; None where it is none."""
    found = DURATION.fullmatch(written)
    return None if found is None else int(found[1] or 0) * SECONDS[found[2] or "s"]


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, which takes an "s" unless the number is 1."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def usd(value: Decimal | None) -> str:
    """Return an amount to the cent, and below a dollar to a hundredth of a cent; "?" where it is not known."""
    if value is None:
        return "?"
    if value >= 1 or not value:
        return f"${value:,.2f}"
    if value >= Decimal("0.01"):
        return f"${value:.4f}".removesuffix("00")
    return f"${plain(value)}" if value >= Decimal("0.000001") else "below $0.000001"


def per_second(value: Decimal | None) -> str:
    """Return a number for each second with two digits behind the point, or two that count; "?" for None."""
    if value is None:
        return "?"
    return f"{value:,.2f}" if value >= Decimal("0.1") else plain(value)


def percent(share: Decimal) -> str:
    return f"{(100 * share).quantize(Decimal('0.01')).normalize():f} %"


def plain(value: Decimal) -> str:
    """Return two digits that count, without an exponent."""
    return f"{Decimal(f'{value:.2g}'):f}"
