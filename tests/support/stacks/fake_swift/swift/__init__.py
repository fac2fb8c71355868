"""Stands in for ms-swift: the modules that an engine asks and runs."""
