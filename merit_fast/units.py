"""Writes counts, bytes and times for people: three digits and a unit, such as 184 M or 58 GiB."""

_COUNTS = ("", " k", " M", " G", " T")
_BYTES = (" B", " KiB", " MiB", " GiB", " TiB")


def human_count(number: float) -> str:
    """``number`` with three digits and a power of 1000: 0.25, 28, 12.3 k, 184 M.

    A unit follows it after a space: ``f"{human_count(n)} tokens/s"``.
    """
    return _scaled(number, 1000, _COUNTS)


def human_bytes(number: float) -> str:
    """A number of bytes with three digits and a power of 1024: 512 B, 6.14 MiB, 58 GiB."""
    return _scaled(number, 1024, _BYTES)


def human_time(seconds: float) -> str:
    """A duration with its two largest units: 0.42 s, 12 s, 3 min 5 s, 2 h 10 min."""
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _scaled(number: float, base: int, names: tuple[str, ...]) -> str:
    power = 0
    while abs(number) >= 999.5 and power < len(names) - 1:
        number /= base
        power += 1
    digits = f"{number:.3g}" if abs(number) < 999.5 else f"{number:,.0f}"
    return digits + names[power]
