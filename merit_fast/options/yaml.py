"""Reads YAML files that people write: safe values only, no key twice in one mapping."""

from pathlib import Path
from typing import Any

import yaml

from merit_fast.errors import InputError


def read_yaml(file: Path) -> Any:
    """Reads the file's value; None if it is empty.

    Raises:
        InputError: the file cannot be read or is not YAML; names the line.
    """
    try:
        return yaml.load(file.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except FileNotFoundError:
        raise InputError(f"{file}: does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{file}: cannot be read: {reason}") from None
    except RecursionError:
        raise InputError(f"{file}: is nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", error)
        raise InputError(f"{file}{line}: is not valid YAML: {problem}") from None


class _StrictLoader(yaml.SafeLoader):
    """Refuses two equal keys in one mapping, where SafeLoader keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        plain = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in plain]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                mark = plain[index].start_mark
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} appears twice", mark
                )
        return super().construct_mapping(node, deep)
