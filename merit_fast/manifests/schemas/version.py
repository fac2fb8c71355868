"""Version of the JSON files; it rises with a change of their keys."""

SCHEMA_VERSION = 3  # 3: several controls, seeds and paired comparisons; run.json
