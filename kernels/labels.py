"""The label that takes no part in a loss. Imports nothing: data code shares it without torch."""

IGNORED_LABEL = -100
