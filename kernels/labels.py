"""The label of a token that has no loss, as transformers and torch's cross_entropy use it."""

IGNORED_LABEL = -100
