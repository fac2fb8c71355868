"""Turns a row of any known format into a conversation."""
