"""Writes a first YAML for the files that a user has; ``merit-fast init`` calls it.

``scan`` finds files and pairs them, ``rows`` reads every row once, ``write`` makes the YAML.
"""

from merit_fast.init.write import Draft, draft_config

__all__ = ["Draft", "draft_config"]
