"""Processes of this machine, by /proc."""

from pathlib import Path


def is_alive(process: Path) -> bool:
    """Whether a process of /proc is there and no zombie."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
