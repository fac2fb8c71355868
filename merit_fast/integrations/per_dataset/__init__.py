"""Losses, tokens and sketches per dataset while a Trainer trains on mixed and packed batches.

Input: a transformers Trainer whose rows say their dataset. Output: logged figures, branch.json,
sketches/. Callers: scripts of users, ``integrations/trl``.
"""
