"""Reads YAML files that people write: safe values only, no key twice in one mapping."""

from pathlib import Path
from typing import Any

import yaml

from merit_fast.errors import InputError

_MAX_DEPTH = 100  # lists and mappings inside each other


def read_yaml(file: Path) -> Any:
    """Reads the file's value; None if it is empty.

    Raises:
        InputError: the file cannot be read, is not YAML, is nested more than 100 deep or holds
            several documents; names the line.
    """
    documents = read_yaml_documents(file)
    if len(documents) > 1:
        raise InputError(f"{file}: must hold one document, got {len(documents)} between --- lines")
    return documents[0] if documents else None


def read_yaml_documents(file: Path) -> list[Any]:
    """Reads the values of all documents of a file, which lines of --- part.

    Raises:
        InputError: the file cannot be read, is not YAML or is nested more than 100 deep; names the
            line.
    """
    try:
        return _load_all(file.read_text(encoding="utf-8"))
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


def _load_all(text: str) -> list[Any]:
    """Values of all documents. Counts depth first, as the loader recurses into each level."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.events.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.events.CollectionEndEvent):
            depth -= 1
        if depth > _MAX_DEPTH:
            problem = f"must be nested at most {_MAX_DEPTH} deep"
            mark: Any = event.start_mark
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
    return list(yaml.load_all(text, Loader=_StrictLoader))


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
