"""Checks of FusedAdamW that several processes run together."""
