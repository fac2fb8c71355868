"""Frozen records: dataclasses whose classes cost microseconds to make.

``dataclasses`` writes and compiles the methods of every class, about a millisecond each, and
imports ``inspect``. The merge command makes some 80 such classes, so its modules use ``record``,
whose methods all classes share. Everything else behaves as in ``dataclass(frozen=True)``:
``dataclasses.fields``, ``replace``, ``asdict`` and ``is_dataclass`` take records too.
"""

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any, TypeVar, dataclass_transform, overload

__all__ = ["MISSING", "Field", "field", "fields", "is_record", "record", "replace", "to_dict"]

T = TypeVar("T")


class _Missing:
    """The default of a field that has none."""

    def __repr__(self) -> str:
        return "MISSING"


MISSING: Any = _Missing()


class Field:
    """One field of a record.

    Attributes:
        name, type: its name and its annotation.
        default: its default, or MISSING.
        default_factory: makes its default, or MISSING.
        metadata: facts for those who read the fields.
        kw_only: whether its value is given by name only.
    """

    __slots__ = ("default", "default_factory", "kw_only", "metadata", "name", "type")
    __hash__ = None  # type: ignore[assignment]  # ``dataclass`` refuses it as a default value

    def __init__(
        self,
        default: Any,
        default_factory: Any,
        metadata: Mapping[str, Any],
        kw_only: bool = False,
    ) -> None:
        self.name = ""
        self.type: Any = None
        self.default = default
        self.default_factory = default_factory
        self.metadata = metadata
        self.kw_only = kw_only


def field(
    *,
    default: Any = MISSING,
    default_factory: Any = MISSING,
    metadata: Mapping[str, Any] | None = None,
    kw_only: bool = False,
) -> Any:
    """Declares a field; arguments as in ``dataclasses.field``."""
    return Field(default, default_factory, metadata or {}, kw_only)


@overload
def record(cls: type[T], /) -> type[T]: ...
@overload
def record(*, eq: bool = True, many: bool = False) -> Callable[[type[T]], type[T]]: ...


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def record(cls: type[T] | None = None, /, *, eq: bool = True, many: bool = False) -> Any:
    """Makes a class a frozen record, as ``dataclasses.dataclass(frozen=True, eq=eq)``.

    A class that lists all its fields in ``__slots__`` has slots.

    Args:
        cls: the class.
        eq: whether records of equal values are equal.
        many: whether a process makes thousands of them: ``__init__`` is then compiled for the
            class, as in ``dataclasses``, and takes half the time of the one that all share.
    """
    if cls is None:
        return lambda cls: _made(cls, eq, many)
    return _made(cls, eq, many)


def is_record(value: Any) -> bool:
    """Whether a value is a record or its class, or a dataclass or its class."""
    return hasattr(value, "__record_fields__") or hasattr(value, "__dataclass_fields__")


def fields(record: Any) -> tuple[Field, ...]:
    """The fields of a record or of its class, in order; of a dataclass too."""
    if not hasattr(record, "__record_fields__"):
        return _fields_of_dataclass(record)
    listed: tuple[Field, ...] = tuple(record.__record_fields__.values())
    return listed


def replace(record: T, /, **changes: Any) -> T:
    """A copy of a record, or of a dataclass, with some fields of other values; checks its rules."""
    if not hasattr(record, "__record_fields__"):
        from dataclasses import replace

        return replace(record, **changes)  # type: ignore[type-var]
    for name in record.__record_fields__:
        if name not in changes:
            changes[name] = getattr(record, name)
    return type(record)(**changes)


def to_dict(record: Any) -> dict[str, Any]:
    """Field names and values of a record or dataclass; records among the values stay records."""
    return {item.name: getattr(record, item.name) for item in fields(record)}


def _fields_of_dataclass(cls: Any) -> tuple[Field, ...]:
    import dataclasses

    listed = []
    for known in dataclasses.fields(cls):
        absent = dataclasses.MISSING
        default = MISSING if known.default is absent else known.default
        factory = MISSING if known.default_factory is absent else known.default_factory
        item = Field(default, factory, known.metadata)
        item.name = known.name
        item.type = known.type
        listed.append(item)
    return tuple(listed)


def _declared(cls: Any) -> dict[str, Field]:
    """The fields of a class and its bases by name, with class attributes as in a dataclass."""
    listed: dict[str, Field] = {}
    for base in reversed(cls.__mro__[1:]):
        listed |= base.__dict__.get("__record_fields__", {})
    slots = cls.__dict__.get("__slots__", ())
    for name, annotation in cls.__annotations__.items():
        default = MISSING if name in slots else cls.__dict__.get(name, MISSING)
        item = default if isinstance(default, Field) else Field(default, MISSING, {})
        item.name = name
        item.type = annotation
        listed[name] = item
        if item.default is not MISSING:
            setattr(cls, name, item.default)
        elif isinstance(default, Field):
            delattr(cls, name)
    if any(item.kw_only for item in listed.values()):  # they follow those with a position
        listed = dict(sorted(listed.items(), key=lambda named: named[1].kw_only))
    return listed


def _made(cls: Any, eq: bool, many: bool) -> Any:
    """Gives a class its fields and the methods of all records."""
    listed = _declared(cls)
    cls.__record_fields__ = listed
    cls.__record_values__ = staticmethod(_getter(tuple(listed)))
    cls.__match_args__ = tuple(listed)  # type: ignore[misc]
    cls.__init__ = _compiled_init(cls, listed) if many else _init
    cls.__setattr__ = _refuse_set
    cls.__delattr__ = _refuse_delete
    cls.__replace__ = replace
    if "__repr__" not in cls.__dict__:
        cls.__repr__ = _repr
    if eq:
        cls.__eq__ = _equal
        cls.__hash__ = _hash
    if "__slots__" in cls.__dict__:
        cls.__getstate__ = _state
        cls.__setstate__ = _take_state
    for name in ("__dataclass_fields__", "__dataclass_params__", "__signature__"):
        setattr(cls, name, _OfDataclass(name, eq))
    return cls


def _getter(names: tuple[str, ...]) -> Callable[[Any], tuple[Any, ...]]:
    """A function that gives the values of these attributes."""
    if len(names) > 1:
        return attrgetter(*names)
    return lambda record: tuple([getattr(record, name) for name in names])


_set = object.__setattr__


def _init(self: Any, /, *values: Any, **named: Any) -> None:
    listed = self.__record_fields__
    if len(values) == len(listed) and not named:
        for name, value in zip(listed, values, strict=True):
            _set(self, name, value)
    else:
        _init_some(self, listed, values, named)
    if hasattr(self, "__post_init__"):
        self.__post_init__()


def _init_some(
    self: Any, listed: Mapping[str, Field], values: tuple[Any, ...], named: dict[str, Any]
) -> None:
    """Sets values by position and name, and the defaults of all other fields."""
    label = type(self).__qualname__
    if len(values) > len(listed):
        raise TypeError(f"{label} takes {len(listed)} values, got {len(values)}")
    for place, (name, item) in enumerate(listed.items()):
        if place < len(values):
            if name in named:
                raise TypeError(f"{label} got two values of {name!r}")
            value = values[place]
        elif name in named:
            value = named.pop(name)
        elif item.default is not MISSING:
            value = item.default
        elif item.default_factory is not MISSING:
            value = item.default_factory()
        else:
            raise TypeError(f"{label} lacks a value of {name!r}")
        _set(self, name, value)
    if named:
        raise TypeError(f"{label} has no field {next(iter(named))!r}")


def _compiled_init(cls: Any, listed: Mapping[str, Field]) -> Any:
    """``_init`` for these fields, without loops."""
    known: dict[str, Any] = {"set": _set}
    heads = []
    if hasattr(cls, "__post_init__"):
        raise TypeError(f"{cls.__qualname__}: many goes without __post_init__")
    for name, item in listed.items():
        if item.default_factory is not MISSING or item.kw_only:
            raise TypeError(f"{cls.__qualname__}.{name}: many goes with plain defaults only")
        if item.default is not MISSING:
            known[f"default_{name}"] = item.default
        heads.append(name if item.default is MISSING else f"{name}=default_{name}")
    body = "".join(f"\n set(self, {name!r}, {name})" for name in listed)
    exec(f"def __init__(self, {', '.join(heads)}):{body}", known)
    return known["__init__"]


def _repr(self: Any) -> str:
    values = (f"{name}={getattr(self, name)!r}" for name in self.__record_fields__)
    return f"{type(self).__qualname__}({', '.join(values)})"


def _equal(self: Any, other: Any) -> Any:
    if other.__class__ is not self.__class__:
        return NotImplemented
    return self.__record_values__(self) == self.__record_values__(other)


def _hash(self: Any) -> int:
    return hash(self.__record_values__(self))


def _refuse_set(self: Any, name: str, value: Any) -> None:
    from dataclasses import FrozenInstanceError

    raise FrozenInstanceError(f"cannot assign to field {name!r}")


def _refuse_delete(self: Any, name: str) -> None:
    from dataclasses import FrozenInstanceError

    raise FrozenInstanceError(f"cannot delete field {name!r}")


def _state(self: Any) -> Any:
    return self.__record_values__(self)


def _take_state(self: Any, values: tuple[Any, ...]) -> None:
    for name, value in zip(self.__record_fields__, values, strict=True):
        _set(self, name, value)


class _OfDataclass:
    """An attribute that a record has as a dataclass, made when ``dataclasses`` asks for it."""

    def __init__(self, name: str, eq: bool) -> None:
        self.name = name
        self.eq = eq

    def __get__(self, instance: Any, cls: Any) -> Any:
        import dataclasses
        import inspect

        declared = []
        for item in cls.__record_fields__.values():
            known = {"default": item.default, "default_factory": item.default_factory}
            given = {key: value for key, value in known.items() if value is not MISSING}
            made: Any = dataclasses.field(metadata=item.metadata, kw_only=item.kw_only, **given)
            declared.append((item.name, item.type, made))
        twin: Any = dataclasses.make_dataclass(cls.__name__, declared, frozen=True, eq=self.eq)
        cls.__dataclass_fields__ = twin.__dataclass_fields__
        cls.__dataclass_params__ = twin.__dataclass_params__
        cls.__signature__ = inspect.signature(twin)
        return getattr(cls, self.name)
