"""Renders a chat template with arguments and a clock that the configuration decides."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from merit_fast.errors import InputError, one_line

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]] | None

# a template is a program: it may fail in any of these ways
_FAILURES = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
_OWN_ARGUMENTS = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


class Refusal(InputError):
    """The template fails on these messages. The message of the error has no place in front."""


class LeftOut(Refusal):
    """The template renders these messages, but not everything that they carry."""


class Template:
    """A compiled chat template.

    Args:
        source: Jinja text.
        special_tokens: bos_token, eos_token and so on, by the names that templates use.
        date: the day that the template sees as today, such as 2024-07-26.

    Raises:
        InputError: the text is not Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, Any], date: str) -> None:
        import jinja2
        import jinja2.meta

        self.source = source
        self._today = datetime.fromisoformat(date)
        self._environment = _environment(self._clock)
        self._constants = {**special_tokens, "date_string": self._today.strftime("%d %b %Y")}
        try:
            self._template = self._environment.from_string(source)
            parsed = self._environment.parse(source)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(
                f"chat template, line {error.lineno}: must be Jinja: {one_line(error)}"
            ) from None
        self._variables = jinja2.meta.find_undeclared_variables(parsed)
        self._failures = (jinja2.TemplateError, *_FAILURES)

    @property
    def reads_date(self) -> bool:
        """Whether the text may depend on the day."""
        return "strftime_now" in self.source or "date_string" in self._variables

    def reads(self, name: str) -> bool:
        """Whether the template reads a further argument of this name."""
        return name in self._variables - _OWN_ARGUMENTS

    def require_reads(self, arguments: Mapping[str, Any], where: str) -> None:
        """Raises InputError for an argument that the template does not read."""
        for name in arguments:
            if not self.reads(name):
                read = ", ".join(sorted(self._variables - _OWN_ARGUMENTS)) or "none"
                raise InputError(
                    f"{where}: must be arguments that the chat template reads ({read}), got {name}"
                )

    def render(
        self,
        messages: Messages,
        tools: Tools,
        arguments: Mapping[str, Any],
        *,
        add_generation_prompt: bool,
    ) -> str:
        """Applies the template.

        Raises:
            Refusal: the template fails on these messages.
        """
        try:
            text: str = self._template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{**self._constants, **arguments},
            )
            return text
        except self._failures as error:
            raise Refusal(f"the chat template refuses this row: {one_line(error)}") from None

    def _clock(self, form: str) -> str:
        return self._today.strftime(form)


def _environment(clock: Any) -> Any:
    """Jinja as chat templates expect it; a sandbox, since a template comes with a model."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Renders the body of ``{% generation %}``, which marks an answer."""

        tags = {"generation"}

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class Sandbox(ImmutableSandboxedEnvironment):
        """Remembers which attributes are safe: the sandbox decides by type and name only."""

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            key = (type(obj), attr)
            if key not in safe:
                safe[key] = super().is_safe_attribute(obj, attr, value)
            return safe[key]

    safe: dict[tuple[type, str], bool] = {}
    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = clock
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)
