"""A rule's operations on views: from the tensors of a file to the tensors in memory."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from merit_fast.merge.read.names.boxes import (
    View,
    chunk,
    concatenate,
    interleave,
    split,
    stack,
    transpose,
)
from merit_fast.merge.read.names.rules import Rule

Shape = tuple[int, ...]
Groups = dict[str, list[View]]  # pattern -> views


class ConversionError(ValueError):
    """A rule that cannot be followed; the message has no file."""


def convert(
    rule: Rule,
    sources: Mapping[int, Sequence[View]],
    name: str,
    config: Mapping[str, Any],
    shape_of: Callable[[str], Shape | None],
) -> dict[str, View]:
    """The tensors in memory that a rule makes of its sources.

    Args:
        sources: views by the number of the rule's source, in natural order of their names.
        name: of the first tensor that comes out.
        config: of config.json.
        shape_of: gives the shape of a tensor in memory by its name, or None.

    Returns:
        views by name, as ``WeightConverter.convert`` of transformers gives tensors.

    Raises:
        ConversionError: an operation is unknown or does not fit the shapes.
    """
    groups = {rule.sources[number]: list(sources[number]) for number in sorted(sources)}
    for operation in rule.operations:
        apply = _OPERATIONS.get(operation["kind"])
        if apply is None:
            raise ConversionError(f"{operation['kind']} is not known")
        try:
            groups = apply(groups, operation, _Context(rule, name, config, shape_of))
        except (IndexError, ValueError) as error:
            raise ConversionError(str(error) or operation["kind"]) from None
    first = next((key for key in groups if key in name), None)
    if first is None:
        raise ConversionError(f"{', '.join(groups)} is no part of {name}")
    head, _, tail = name.partition(first)
    return {head + key + tail: _only(views) for key, views in groups.items()}


class _Context:
    def __init__(
        self,
        rule: Rule,
        name: str,
        config: Mapping[str, Any],
        shape_of: Callable[[str], Shape | None],
    ) -> None:
        self.rule = rule
        self.name = name
        self.config = config
        self.shape_of = shape_of

    @property
    def target(self) -> str:
        """The only tensor that comes out."""
        if len(self.rule.targets) != 1:
            raise ConversionError(f"one tensor must come out, got {', '.join(self.rule.targets)}")
        return self.rule.targets[0]

    def key(self, source: str) -> str:
        """The pattern of a tensor that one operation of several makes from one source."""
        is_single = len(self.rule.targets) == 1 and len(self.rule.sources) == 1
        return self.rule.targets[0] if is_single else source


def _merge_modulelist(groups: Groups, operation: Mapping[str, Any], context: _Context) -> Groups:
    merged = {}
    for source, views in groups.items():
        for view in views:
            _require_shape(view, views[0].shape)
        target = context.target if len(groups) == 1 else source
        merged[target] = [stack(views, operation["dim"])]
    return merged


def _concatenate(groups: Groups, operation: Mapping[str, Any], context: _Context) -> Groups:
    dim = operation["dim"]
    views = [view for source in context.rule.sources for view in groups.get(source, ())]
    for view in views:
        shape = views[0].shape
        _require_shape(view, (*shape[:dim], view.shape[dim], *shape[dim + 1 :]))
    return {context.target: [concatenate(views, dim)]}


def _chunk(groups: Groups, operation: Mapping[str, Any], context: _Context) -> Groups:
    if operation.get("num_shards_attribute"):
        raise ConversionError("a number of pieces from the config is not known")
    view = _only(_only(list(groups.values())))
    pieces = chunk(view, operation["dim"], len(context.rule.targets))
    return {target: [piece] for target, piece in zip(context.rule.targets, pieces, strict=True)}


def _split(groups: Groups, operation: Mapping[str, Any], context: _Context) -> Groups:
    dim = operation["dim"]
    view = _only(_only(list(groups.values())))
    targets = context.rule.targets
    shapes = [context.shape_of(context.name.replace(targets[0], target)) for target in targets]
    sizes = [shape[dim] for shape in shapes if shape is not None]
    if len(sizes) != len(targets) or sum(sizes) != view.shape[dim]:
        raise ConversionError("the sizes of its pieces are not known")
    pieces = split(view, dim, sizes)
    return {target: [piece] for target, piece in zip(targets, pieces, strict=True)}


def _transpose(groups: Groups, operation: Mapping[str, Any], context: _Context) -> Groups:
    source, views = next(iter(groups.items()))
    view = _only(views)
    first = operation["dim0"]
    second = operation["dim1"]
    key = context.key(source) if len(context.rule.targets) > 1 else context.target
    if operation.get("check_dims"):
        expected = context.shape_of(context.name) or _expected(context, view)
        if expected == view.shape:
            return {key: [view]}
    return {key: [transpose(view, first, second)]}


def _expected(context: _Context, view: View) -> Shape | None:
    """The shape of experts in memory, [E, out, in], by the hidden size in the config."""
    text = context.config.get("text_config")
    hidden = (text if isinstance(text, dict) else context.config).get("hidden_size")
    is_down = context.name.endswith("down_proj")
    fits = view.shape[-2 if is_down else -1] == hidden
    return view.shape if fits else None


def _interleave(groups: Groups, operation: Mapping[str, Any], context: _Context) -> Groups:
    view = _only(_only(list(groups.values())))
    if view.shape[operation["dim"]] % 2:
        raise ConversionError(f"an even size is needed, got {list(view.shape)}")
    return {context.rule.targets[0]: [interleave(view, operation["dim"], operation["inverse"])]}


def _permute_for_rope(groups: Groups, operation: Mapping[str, Any], context: _Context) -> Groups:
    config = context.config
    section = config.get(operation.get("subconfig_key") or "")
    heads = (section if isinstance(section, dict) else config).get("num_attention_heads", 1)
    names = operation.get("permute_layer_names")
    turned = {}
    for source, views in groups.items():
        if names is not None and not any(name in source for name in names):
            turned[context.key(source)] = views
            continue
        view = _only(views)
        if not isinstance(heads, int) or heads < 1 or view.shape[0] % (2 * heads):
            raise ConversionError(f"{heads} attention heads do not divide {list(view.shape)}")
        pieces = [interleave(head, 0, operation["inverse"]) for head in chunk(view, 0, heads)]
        turned[context.key(source)] = [concatenate(pieces, 0)]
    return turned


def _fuse_text_and_vision(
    groups: Groups, operation: Mapping[str, Any], context: _Context
) -> Groups:
    """Each source's list is cut into one part per target; parts of all sources are joined."""
    targets = context.rule.targets
    joined: Groups = {}
    for number, target in enumerate(targets):
        stacked = []
        for source in context.rule.sources:
            views = groups[source]
            size = -(-len(views) // len(targets))
            part = views[number * size : (number + 1) * size]
            for view in part:
                _require_shape(view, part[0].shape)
            stacked.append(stack(part, operation["stack_dim"]))
        joined[target] = [concatenate(stacked, operation["concat_dim"])]
    return joined


_OPERATIONS: Mapping[str, Callable[[Groups, Mapping[str, Any], _Context], Groups]] = {
    "MergeModulelist": _merge_modulelist,
    "Concatenate": _concatenate,
    "Chunk": _chunk,
    "Split": _split,
    "Transpose": _transpose,
    "Interleave": _interleave,
    "PermuteForRope": _permute_for_rope,
    "ErnieFuseAndSplitTextVisionExperts": _fuse_text_and_vision,
}


def _only(values: Sequence[Any]) -> Any:
    if len(values) != 1:
        raise ConversionError(f"one tensor is needed, got {len(values)}")
    return values[0]


def _require_shape(view: View, shape: Shape) -> None:
    if view.shape != shape:
        raise ConversionError(f"shapes must agree, got {list(shape)} and {list(view.shape)}")
