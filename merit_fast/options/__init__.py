"""Options: declared as fields of records with a help text, read from strict YAML and ``key=value``.

Every stage declares its options here; ``pipeline`` and ``cli`` read them.
"""
