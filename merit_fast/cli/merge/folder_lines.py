"""Lines of a merge's summary about folders and files."""

from typing import Any

_MOST_NAMES = 12


def folder_lines(summary: dict[str, Any]) -> list[str]:
    """A line for the parts of a folder of several models, and one for the files left out."""
    lines = []
    if parts := summary.get("parts"):
        lines.append(f"  parts: {', '.join(parts)}")
    if left_out := summary.get("left_out"):
        more = f" and {len(left_out) - _MOST_NAMES} more" if len(left_out) > _MOST_NAMES else ""
        lines.append(f"  left out: {', '.join(left_out[:_MOST_NAMES])}{more}")
    return lines
