"""Numbers of bytes in options."""

import re

from merit_fast.options.fields import require

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_bytes(key: str, text: str) -> int:
    """Reads 400M, 5G, 5GB, 32MiB or a plain number, in powers of 1024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    count = int(float(match.group(1)) * _UNITS[match.group(2).upper()]) if match else 0
    require(count > 0, key, "a number of bytes such as 32M or 5G", text)
    return count
