"""How options are declared, read and checked: dataclass fields with a help text, strict YAML,
``key=value`` overrides.

Every stage declares its options with it; ``pipeline`` and ``cli`` read them.
"""
