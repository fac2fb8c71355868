"""Readers of the containers in which rows lie; each yields raw rows and their places."""
