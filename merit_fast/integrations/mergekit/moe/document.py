"""A recipe of mergekit-moe as data. Strict: every key is read or refused."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merit_fast.errors import InputError, show
from merit_fast.integrations.mergekit.document import Reader, Reference
from merit_fast.options.parser import override

GATE_MODES = ("hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random")
_DRAWN = GATE_MODES[4:]  # they read no prompts
_TOP = (
    "base_model", "experts", "gate_mode", "dtype", "experts_per_token", "shared_experts",
    "architecture",
)  # fmt: skip
_EXPERT = (
    "source_model", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale",
)  # fmt: skip


@dataclass(frozen=True)
class Expert:
    """One dense model whose MLPs become an expert of every layer."""

    key: str
    source: Reference
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()
    residual_scale: float = 1.0


@dataclass(frozen=True)
class MoeDocument:
    """A recipe of mergekit-moe."""

    where: str
    base: Reference
    experts: tuple[Expert, ...]
    shared: tuple[Expert, ...]
    gate_mode: str
    experts_per_token: int
    architecture: str | None
    dtype: str | None

    @property
    def is_drawn(self) -> bool:
        """Whether the routers are random numbers."""
        return self.gate_mode in _DRAWN

    def error(self, key: str, rule: str) -> InputError:
        """An error about one key of the file."""
        return InputError(f"{self.where}: {key}: {rule}")


def is_moe(values: Any) -> bool:
    """Whether a YAML document is a recipe of mergekit-moe."""
    return isinstance(values, dict) and "experts" in values


def moe_document(values: Mapping[str, Any], where: str) -> MoeDocument:
    """The recipe that ``values`` hold.

    Raises:
        InputError: a key that mergekit does not have or we do not, a value of another kind, fewer
            experts than a token takes, or prompts that are absent or all alike.
    """
    reader = Reader(where, {})
    top = reader.mapping(values, "", _TOP)
    mode = top.get("gate_mode", GATE_MODES[0])
    if mode not in GATE_MODES:
        raise reader.error("gate_mode", f"must be one of {', '.join(GATE_MODES)}, got {show(mode)}")
    architecture = top.get("architecture")
    if architecture is not None and not isinstance(architecture, str):
        raise reader.error("architecture", f"must be a name, got {show(architecture)}")
    document = MoeDocument(
        where,
        reader.reference(top.get("base_model"), "base_model"),
        _experts(reader, top.get("experts"), "experts"),
        _experts(reader, top["shared_experts"], "shared_experts")
        if top.get("shared_experts")
        else (),
        mode,
        _count(reader, top.get("experts_per_token", 2)),
        architecture,
        reader.dtype({"dtype": top.get("dtype")}),
    )
    _check(document)
    return document


def seed_of(assignments: Sequence[str], where: str) -> tuple[int, list[str]]:
    """The seed of random routers among ``key=value`` texts, and the other texts."""
    others = [text for text in assignments if text.partition("=")[0] != "seed"]
    chosen = override({}, [text for text in assignments if text not in others])
    seed = chosen.get("seed", 0)
    if not isinstance(seed, int) or not 0 <= seed < 1 << 32:
        raise InputError(f"{where}: seed: must be between 0 and 2^32 - 1, got {show(seed)}")
    return seed, others


def _experts(reader: Reader, value: Any, key: str) -> tuple[Expert, ...]:
    items = reader.sequence(value, key)
    return tuple(_expert(reader, item, f"{key}[{i}]") for i, item in enumerate(items))


def _expert(reader: Reader, value: Any, key: str) -> Expert:
    fields = reader.mapping(value, key, _EXPERT)
    if fields.get("noise_scale"):
        rule = "must be absent or 0: experts are copied without noise"
        raise reader.error(f"{key}.noise_scale", f"{rule}, got {show(fields['noise_scale'])}")
    scale = fields.get("residual_scale")
    is_number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if scale is not None and not (is_number and abs(scale) < float("inf")):
        raise reader.error(f"{key}.residual_scale", f"must be a number, got {show(scale)}")
    return Expert(
        key,
        reader.reference(fields.get("source_model"), f"{key}.source_model"),
        _prompts(reader, fields.get("positive_prompts"), f"{key}.positive_prompts"),
        _prompts(reader, fields.get("negative_prompts"), f"{key}.negative_prompts"),
        1.0 if scale is None else float(scale),
    )


def _prompts(reader: Reader, value: Any, key: str) -> tuple[str, ...]:
    if value is None:
        return ()
    for prompt in value if isinstance(value, list) else [value]:
        if not isinstance(value, list) or not isinstance(prompt, str):
            raise reader.error(key, f"must be a list of texts, got {show(value)}")
    return tuple(value)


def _count(reader: Reader, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise reader.error("experts_per_token", f"must be at least 1, got {show(value)}")
    return int(value)


def _check(document: MoeDocument) -> None:
    count = len(document.experts)
    if count < document.experts_per_token:
        rule = f"must be at least experts_per_token, {document.experts_per_token}, got {count}"
        raise document.error("experts", rule)
    if document.is_drawn:
        return
    gated = [*document.experts, *(expert for expert in document.shared if expert.positive)]
    for expert in gated:
        if not expert.positive:
            rule = f"is required by gate_mode {document.gate_mode}"
            raise document.error(f"{expert.key}.positive_prompts", rule)
    prompts = {(expert.positive, expert.negative) for expert in document.experts}
    if len(prompts) == 1 and count > 1:
        raise document.error("experts", "must have prompts that differ, got the same for all")
