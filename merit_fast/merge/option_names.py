"""Options in error messages, named as the caller typed them: --dtype, dtype= or merge.dtype."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from merit_fast.errors import InputError

Form = Literal["command line", "python", "yaml"]


class OptionError(InputError):
    """Bad input that an option can settle. An entrance names the option in its own form.

    Args:
        rule: the message without the remedy.
        option: the field of ``MergeConfig``, or ``base``.
        remedy: a clause in which {} stands for the option.
        value: what the option must be set to, where that is known.
        form: where the option is typed.
    """

    def __init__(
        self, rule: str, option: str, remedy: str, value: str = "", form: Form = "yaml"
    ) -> None:
        super().__init__(f"{rule}; {remedy.format(_name(option, value, form))}")
        self._parts = (rule, option, remedy, value)
        self._form = form

    def __reduce__(self) -> tuple[Any, ...]:
        return OptionError, (*self._parts, self._form)

    def named(self, form: Form) -> "OptionError":
        """This error with the option's name in another form."""
        return OptionError(*self._parts, form)


@contextmanager
def options_named(form: Form) -> Iterator[None]:
    """Names options in this form in every error of the block; an outer block's form wins."""
    try:
        yield
    except OptionError as error:
        raise error.named(form) from None


def _name(option: str, value: str, form: Form) -> str:
    if form == "python":
        return f"{option}={value}"
    if form == "yaml" and option != "base":  # a run's YAML always has a base
        return f"merge.{option}" + (f"={value.lower()}" if value else "")
    flag = f"--{option.replace('_', '-')}"
    return flag if value in ("", "True") else f"{flag} {value}"
