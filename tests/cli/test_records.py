"""A record behaves as the frozen dataclass of the same fields, which is the reference here."""

import copy
import dataclasses
import inspect
import pickle
from typing import Any

import pytest

from merit_fast.records import MISSING, field, fields, is_record, record, replace, to_dict


@record
class Point:
    x: int
    y: float = 2.5
    tags: list[str] = field(default_factory=list)
    label: str = field(default="p", metadata={"help": "a label"})

    @property
    def double(self) -> int:
        return 2 * self.x


@record
class Named(Point):
    name: str = "n"
    y: float = 7.0

    def __post_init__(self) -> None:
        if self.x < 0:
            raise ValueError(f"x must not be negative, got {self.x}")


@record(eq=False)
class ByIdentity:
    x: int


@record(many=True)
class Many:
    __slots__ = ("name", "size")

    name: str
    size: int


@record
class Detailed(Many):
    parts: tuple[int, ...] = ()


@record
class Noted:
    x: int
    notes: tuple[str, ...] = field(default=(), kw_only=True)


@record
class NotedMore(Noted):
    z: int


@record
class Empty:
    pass


@dataclasses.dataclass(frozen=True)
class OfPoint:
    x: int
    y: float = 2.5
    tags: list[str] = dataclasses.field(default_factory=list)
    label: str = dataclasses.field(default="p", metadata={"help": "a label"})


@dataclasses.dataclass(frozen=True)
class OfNamed(OfPoint):
    name: str = "n"
    y: float = 7.0

    def __post_init__(self) -> None:
        if self.x < 0:
            raise ValueError(f"x must not be negative, got {self.x}")


PAIRS = [(Point, OfPoint), (Named, OfNamed)]
CALLS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((1,), {}),
    ((1, 2.0, ["a"], "l"), {}),
    ((), {"x": 3}),
    ((1,), {"label": "q"}),
    ((1, 4.0), {"tags": []}),
]


@pytest.mark.parametrize("made,reference", PAIRS)
@pytest.mark.parametrize("values,named", CALLS)
def test_values_repr_and_copies_are_those_of_the_dataclass(made, reference, values, named):
    one = made(*values, **named)
    expected = reference(*values, **named)
    assert to_dict(one) == vars(expected) == dataclasses.asdict(one)
    assert repr(one) == repr(expected).replace("Of", "")
    assert one == made(*values, **named)
    assert one != expected
    for copied in (copy.copy(one), copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert copied == one
    assert replace(one, x=8) == dataclasses.replace(one, x=8) == made(**{**to_dict(one), "x": 8})


@pytest.mark.parametrize("made,reference", PAIRS)
@pytest.mark.parametrize(
    "values,named",
    [((), {}), ((1, 2, 3, 4, 5, 6), {}), ((1,), {"x": 1}), ((1,), {"z": 1})],
)
def test_wrong_calls_raise_where_the_dataclass_does(made, reference, values, named):
    with pytest.raises(TypeError):
        reference(*values, **named)
    with pytest.raises(TypeError, match=made.__name__):
        made(*values, **named)


@pytest.mark.parametrize("made,reference", PAIRS)
def test_dataclasses_and_inspect_know_a_record(made, reference):
    assert dataclasses.is_dataclass(made)
    assert dataclasses.is_dataclass(made(1))
    assert inspect.signature(made) == inspect.signature(reference)
    for own, known, expected in zip(
        fields(made), dataclasses.fields(made), dataclasses.fields(reference), strict=True
    ):
        assert own.name == known.name == expected.name
        assert own.type == known.type == expected.type
        assert dict(own.metadata) == dict(known.metadata) == dict(expected.metadata)
        assert known.default == expected.default
        assert (own.default is MISSING) == (expected.default is dataclasses.MISSING)
        assert known.default_factory == expected.default_factory


def test_fields_of_a_dataclass_read_as_those_of_a_record():
    for own, other in zip(fields(Point), fields(OfPoint), strict=True):
        for name in ("name", "type", "default", "default_factory"):
            assert getattr(own, name) == getattr(other, name)
    assert is_record(Point) and is_record(OfPoint) and is_record(OfPoint(1))
    assert not is_record(int) and not is_record(3)


def test_a_dataclass_may_extend_a_record():
    extended = dataclasses.make_dataclass("More", [("z", int, 4)], bases=(Point,), frozen=True)
    assert dataclasses.asdict(extended(1)) == {**to_dict(Point(1)), "z": 4}


def test_a_record_is_frozen_and_hashes_by_its_values():
    one = ByIdentity(1)
    assert one != ByIdentity(1) and hash(one) != hash(ByIdentity(1))
    assert hash(Many("a", 1)) == hash(Many("a", 1))
    assert {Many("a", 1): 1}[Many("a", 1)] == 1
    for made in (Many("a", 1), Detailed("a", 1), Noted(1)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            made.name = "b"
        with pytest.raises(dataclasses.FrozenInstanceError):
            del made.name
    assert Empty() == Empty()
    match Many("a", 1):
        case Many(name, size):
            assert (name, size) == ("a", 1)


def test_a_record_with_slots_has_no_dict_and_pickles():
    one = Many("a", size=1)
    assert not hasattr(one, "__dict__")
    assert repr(one) == "Many(name='a', size=1)"
    detailed = Detailed("a", 1, parts=(1, 2))
    for each in (one, detailed):
        assert pickle.loads(pickle.dumps(each)) == copy.copy(each) == each
    with pytest.raises(TypeError):
        Many("a")


@pytest.mark.parametrize("wrong", [{"default_factory": list}, {"default": 1, "kw_only": True}])
def test_a_compiled_init_refuses_what_it_does_not_do(wrong):
    with pytest.raises(TypeError, match="size: many goes with plain defaults only"):
        record(many=True)(
            type("Wrong", (), {"__annotations__": {"size": int}, "size": field(**wrong)})
        )
    with pytest.raises(TypeError, match="many goes without __post_init__"):
        record(many=True)(type("Wrong", (), {"__post_init__": print}))


def test_a_field_by_name_only_follows_those_of_subclasses():
    assert to_dict(NotedMore(1, 2)) == {"x": 1, "z": 2, "notes": ()}
    assert NotedMore(1, 2, notes=("a",)).notes == ("a",)


def test_the_rules_of_a_record_are_checked_at_every_change():
    with pytest.raises(ValueError, match="got -1"):
        Named(-1)
    with pytest.raises(ValueError, match="got -2"):
        replace(Named(1), x=-2)


def test_a_field_of_a_record_is_no_default_of_a_dataclass():
    with pytest.raises(ValueError, match="mutable default"):
        dataclasses.make_dataclass("Wrong", [("x", int, field(default=1))])


def test_functions_of_records_take_dataclasses_too():
    """A room that still has dataclasses may share a function with one that has records."""

    @dataclasses.dataclass(frozen=True)
    class Plain:
        x: int
        y: tuple[int, ...] = (1,)

    one = Plain(3)
    assert replace(one, x=8) == Plain(8)
    assert to_dict(one) == {"x": 3, "y": (1,)}
    assert [item.name for item in fields(one)] == ["x", "y"]
