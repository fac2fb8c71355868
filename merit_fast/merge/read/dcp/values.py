"""Values of a pickle as plain data: calls and objects are recorded, never made."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function that a pickle names."""

    module: str
    name: str


@dataclass(slots=True, repr=False)
class Made:
    """What a pickle makes by a call: ``function(*args)``, or an object of a class."""

    function: Global
    args: Any
    is_object: bool
    state: Any = None

    def __repr__(self) -> str:
        return f"a {self.function.name}"


class Pairs(list[Any]):
    """A dict's keys and values in turn."""

    def __repr__(self) -> str:
        return f"a dict of {len(self) // 2}"

    def fields(self) -> dict[str, Any]:
        """The dict, for keys of text.

        Raises:
            ValueError: a key is no text, or stands twice.
        """
        keys = self[::2]
        if not all(type(key) is str for key in keys):
            raise ValueError("keys must be text")
        values = dict(zip(keys, self[1::2], strict=True))
        if len(values) != len(keys):
            raise ValueError("a key stands twice")
        return values


PERSISTENT = Global("", "storage")  # what a persistent id stands for in a file of torch.save
