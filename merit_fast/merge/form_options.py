"""Options of a merge about the form of its inputs and its output."""

from typing import Any, Literal

from merit_fast.options.fields import option, require
from merit_fast.records import record


@record
class FormOptions:
    """Options that concern distributed checkpoints."""

    form: Literal["safetensors", "distcp"] | None = option(
        None,
        "form of the output; None: safetensors. distcp: a distributed checkpoint of torch, in the "
        "first model's shards",
        omit_default=True,
    )
    subtree: str | None = option(
        None,
        "keys, joined by dots, that lead to the model in a distributed checkpoint's state dict",
        form="KEY[.KEY ...]",
        omit_default=True,
    )
    config_from: str | None = option(
        None,
        "directory that gives config.json and the tokenizer",
        form="DIR",
        omit_default=True,
    )

    def check_form(self, **others: Any) -> None:
        """Raises InputError if one of these options of safetensors goes with form distcp."""
        for name, value in others.items():
            allowed = self.form != "distcp" or not value
            require(allowed, name, "absent with form distcp", value)
