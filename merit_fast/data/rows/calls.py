"""Tools, and an assistant's calls of them, in the one form that chat templates read."""

import re
from collections.abc import Mapping
from typing import Any

from merit_fast.data.rows.values import (
    is_empty,
    read_field,
    read_json,
    read_list,
    read_string,
    without_nulls,
)
from merit_fast.errors import InputError, show

_THOUGHT = re.compile(r"<think>.*</think>", re.DOTALL)


def read_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Calls with their arguments as objects, for templates write them as JSON.

    Args:
        value: a list or one call, or JSON text of either; each {"function": {"name",
            "arguments"}} with or without id and type, or {"name", "arguments"}.
        where: the place, for error messages.

    Raises:
        InputError: a call has no name, or arguments that are no object.
    """
    calls = read_json(value, where)
    if isinstance(calls, dict):
        calls = [calls]
    return [_read_call(call, f"{where}[{i}]") for i, call in enumerate(read_list(calls, where))]


def read_call_text(text: Any, where: str) -> tuple[str | None, list[dict[str, Any]]]:
    """Divides the content of a function_call turn into its thinking words, if any, and its calls.

    Raises:
        InputError: the text around the thinking words is not JSON of a call or a list of calls.
    """
    if not isinstance(text, str):
        return None, read_calls(text, where)
    thought = _THOUGHT.search(text)
    if thought is None:
        return None, read_calls(text, where)
    return thought.group(), read_calls(text[: thought.start()] + text[thought.end() :], where)


def read_tools(value: Any, where: str) -> tuple[Mapping[str, Any], ...] | None:
    """Tools of a row as {"type": "function", "function": {...}}; None where there are none.

    Args:
        value: a list, or JSON text of one; each tool with or without that wrapper.
        where: the place, for error messages.

    Raises:
        InputError: no such list, or a tool without a name.
    """
    tools = None if is_empty(value) else read_json(value, where)
    if is_empty(tools):
        return None
    return tuple(
        _read_tool(tool, f"{where}[{i}]") for i, tool in enumerate(read_list(tools, where))
    )


def _read_call(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: must be a call {{name, arguments}}, got {show(value)}")
    call = without_nulls(value)
    if "function" not in call:
        outer = {key: value for key, value in call.items() if key in ("id", "type")}
        inner = {key: value for key, value in call.items() if key not in outer}
        call = {**outer, "type": "function", "function": inner}
    if not isinstance(call["function"], dict):
        rule = "must be an object with the key name"
        raise InputError(f"{where}.function: {rule}, got {show(call['function'])}")
    function = without_nulls(call["function"])
    read_string(read_field(function, "name", f"{where}.function"), f"{where}.function.name")
    arguments = function.get("arguments")
    place = f"{where}.function.arguments"
    arguments = {} if is_empty(arguments) else read_json(arguments, place)
    if not isinstance(arguments, dict):
        raise InputError(
            f"{place}: must be an object or JSON text of one, got {show(function['arguments'])}"
        )
    return {**call, "function": {**function, "arguments": arguments}}


def _read_tool(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: must be a tool with a name, got {show(value)}")
    tool = without_nulls(value)
    if "function" not in tool and "name" in tool:
        tool.pop("type", None)
        tool = {"type": "function", "function": tool}
    function = read_field(tool, "function", where)
    read_string(read_field(function, "name", f"{where}.function"), f"{where}.function.name")
    if isinstance(function.get("parameters"), str):
        parameters = read_json(function["parameters"], f"{where}.function.parameters")
        function = {**function, "parameters": parameters}
    return {**tool, "function": function}
