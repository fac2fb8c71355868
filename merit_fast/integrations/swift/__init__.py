"""merit_fast in ms-swift: the plugin file for its ``--external_plugins``.

    swift sft --external_plugins $(python -m merit_fast.integrations.swift) --callbacks merit ...

ms-swift puts the plugin's folder first in Python's path, so the file has this folder to itself.
"""

from pathlib import Path

PLUGIN_FILE = Path(__file__).resolve().parent / "merit_swift.py"
