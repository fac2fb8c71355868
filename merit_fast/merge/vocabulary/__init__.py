"""Vocabularies of the models: rows of embedding and head matched by the text of their tokens."""
