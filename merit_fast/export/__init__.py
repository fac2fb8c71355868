"""Writes the groups of a split as rows and configurations for other training stacks."""

from merit_fast.export.groups import FORMATS, export_groups

__all__ = ["FORMATS", "export_groups"]
