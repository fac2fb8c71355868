"""Declares options: a config is a record whose fields carry their help text.

    groups: int = option(4, "number of groups")

``parser`` reads such a record from YAML; ``cli.flags`` makes command-line flags of its fields.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from merit_fast.errors import InputError, show
from merit_fast.records import MISSING, field

REQUIRED = MISSING  # as the default of an option that has none


def option(
    default: Any,
    help: str,
    *,
    flag: str | None = None,
    form: str | None = None,
    choices: Sequence[str] = (),
    omit_default: bool = False,
    spellings: Mapping[str, str] | None = None,
) -> Any:
    """Declares a record's field with its help text.

    Args:
        default: may be a list or tuple (stored as a tuple); REQUIRED: there is none.
        help: one line for ``--help`` and the docs.
        flag: name of the command-line flag; None: ``--field-name``; "": only YAML sets this field.
        form: the value as ``--help`` shows it, such as ``I/N``; None: made from the annotation.
        choices: words that ``--help`` lists, where the annotation does not spell them out.
        omit_default: whether ``to_plain`` leaves the field out while it has its default, so that
            fingerprints of older files stay as they are.
        spellings: other words for the field's words, which ``parse`` replaces: {bfloat16: bf16}.
    """
    if isinstance(default, list):
        default = tuple(default)
    metadata = {
        "help": help,
        "flag": flag,
        "form": form,
        "choices": tuple(choices),
        "omit_default": omit_default,
        "spellings": dict(spellings or {}),
    }
    return field(default=default, metadata=metadata)


def require(holds: bool, key: str, rule: str, value: Any) -> None:
    """Checks the rule of one field in ``__post_init__``; ``parse`` adds file and section.

    Raises:
        InputError: the rule does not hold.
    """
    if not holds:
        raise InputError(f"{key}: must be {rule}, got {show(value)}")
