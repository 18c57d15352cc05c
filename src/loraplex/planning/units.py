"""Sizes for people."""


def size(num_bytes: float) -> str:
    """Return a size for people, in powers of ten."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:,.{2 if unit == 'GB' else 1}f} {unit}"
    return f"{num_bytes:,.0f} B"
