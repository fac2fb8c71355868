"""Joins texts that share their beginnings into one example, and takes such an example apart.

Templates that rewrite history show each answer after another text: the last one with its
thinking, earlier ones without. The trie of these texts holds what they share once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from merit_fast.data.dataset import IGNORED_LABEL, Example, Tree

Ints = NDArray[np.int32]


def build(texts: Sequence[tuple[Ints, Ints]]) -> Example:
    """Joins texts into one example; a plain one if each is the beginning of the next.

    A token that is a target in one of the texts is a target once in the example, after the same
    tokens. A token that is a target in two texts is there twice.

    Args:
        texts: (input_ids [T], labels [T]) of each text; labels[0] is IGNORED_LABEL.

    Raises:
        ValueError: no text, an empty one, or a target in front.
    """
    root = _Run(np.empty(0, np.int32), np.empty(0, np.int32))
    for input_ids, labels in texts:
        if not len(input_ids) or labels[0] != IGNORED_LABEL:
            raise ValueError("build: needs texts of at least one token, the first not a target")
        _insert(root, np.array(input_ids, np.int32), np.array(labels, np.int32))
    if not root.children:
        raise ValueError("build: needs at least one text")
    runs: list[tuple[_Run, int]] = []
    _lay_out(root, -1, runs)
    lengths = [len(run.ids) for run, _ in runs]
    starts = np.cumsum([0, *lengths[:-1]]).astype(np.int32)
    tree = Tree(starts, np.array([parent for _, parent in runs], np.int32))
    return Example(
        np.concatenate([run.ids for run, _ in runs]),
        np.concatenate([run.labels for run, _ in runs]),
        tree if len(runs) > 1 else None,
    )


def build_within(texts: Sequence[tuple[Ints, Ints]], limit: int) -> list[Example]:
    """Joins texts in their order into as few examples of at most ``limit`` tokens as that gives.

    A text longer than the limit is an example of its own.
    """
    if len(texts) == 1:
        return [Example(*texts[0])]
    whole = build(texts)
    if len(whole.input_ids) <= limit:
        return [whole]
    examples = [build(texts[:1])]
    first = 0  # text with which the last example begins
    for past in range(2, len(texts) + 1):
        joined = build(texts[first:past])
        if len(joined.input_ids) <= limit:
            examples[-1] = joined
        else:
            first = past - 1
            examples.append(build(texts[first:past]))
    return examples


def expand(example: Example) -> list[Example]:
    """Texts of an example, one per leaf of its tree; [example] without a tree.

    Every target of the example is a target of one of them, after the same tokens.
    """
    if example.tree is None:
        return [example]
    starts = example.tree.starts
    parents = example.tree.parents
    ends = np.append(starts[1:], len(example.input_ids))
    seen: set[int] = set()
    texts = []
    for leaf in sorted(set(range(len(starts))) - set(parents.tolist())):
        path = _path(parents, leaf)
        ids = [example.input_ids[starts[run] : ends[run]] for run in path]
        labels = [
            np.full(ends[run] - starts[run], IGNORED_LABEL, np.int32)
            if run in seen
            else example.labels[starts[run] : ends[run]]
            for run in path
        ]
        seen.update(path)
        texts.append(Example(np.concatenate(ids), np.concatenate(labels)))
    return texts


def positions(tree: Tree, length: int) -> NDArray[np.int32]:
    """[length] position of each token in its text: its depth.

    Args:
        tree: runs of tokens.
        length: T, tokens of the example.
    """
    ends = np.append(tree.starts[1:], length)
    first = np.zeros(len(tree.starts), np.int64)  # depth of each run's first token
    for run, parent in enumerate(tree.parents.tolist()):
        if parent >= 0:
            first[run] = first[parent] + ends[parent] - tree.starts[parent]
    run_of = _run_of(tree, length)
    return (np.arange(length) - tree.starts[run_of] + first[run_of]).astype(np.int32)


def visible(tree: Tree, length: int) -> NDArray[np.bool_]:
    """[length, length] True where the token of the row sees the token of the column."""
    num_runs = len(tree.starts)
    descends = np.eye(num_runs, dtype=bool)  # [run, run or ancestor]
    for run, parent in enumerate(tree.parents.tolist()):
        if parent >= 0:
            descends[run] |= descends[parent]
    run_of = _run_of(tree, length)
    order = np.arange(length)
    seen: NDArray[np.bool_] = descends[run_of[:, None], run_of[None, :]]
    return seen & (order[:, None] >= order[None, :])


class _Run:
    """Tokens in a row, and the runs that follow them; the first of those stands right behind."""

    def __init__(self, ids: Ints, labels: Ints, children: list[_Run] | None = None) -> None:
        self.ids = ids
        self.labels = labels
        self.children = children or []

    def split(self, at: int) -> None:
        """Cuts the run in two; the rest stays right behind, so that it may open with a target."""
        rest = _Run(self.ids[at:], self.labels[at:], self.children)
        self.ids = self.ids[:at]
        self.labels = self.labels[:at]
        self.children = [rest]


def _insert(root: _Run, ids: Ints, labels: Ints) -> None:
    shared, path = _longest_match(root, ids, labels, 0)
    last = path[-1] if path else root
    is_whole = shared == sum(len(run.ids) for run in path)
    if shared < len(ids) and not (is_whole and path and not last.children):
        shared = _last_non_target(labels, shared)
    run = root
    depth = 0
    for child in path:
        if depth == shared:
            break
        run = child
        if shared < min(len(ids), depth + len(run.ids)):
            run.split(shared - depth)
        length = min(len(run.ids), shared - depth)
        marks = labels[depth : depth + length]
        run.labels[:length] = np.where(marks != IGNORED_LABEL, marks, run.labels[:length])
        depth += length
    if shared == len(ids):
        return
    if run is root or run.children:
        run.children.append(_Run(ids[shared:], labels[shared:]))
    else:
        run.ids = np.concatenate([run.ids, ids[shared:]])
        run.labels = np.concatenate([run.labels, labels[shared:]])


def _longest_match(run: _Run, ids: Ints, labels: Ints, depth: int) -> tuple[int, list[_Run]]:
    """Tokens of a text that runs below ``run`` hold already, and these runs."""
    best: tuple[int, list[_Run]] = (depth, [])
    for child in run.children:
        length = min(len(child.ids), len(ids) - depth)
        here = slice(depth, depth + length)
        differs = child.ids[:length] != ids[here]
        is_target = labels[here] != IGNORED_LABEL
        differs |= (child.labels[:length] != IGNORED_LABEL) & is_target
        if child is not run.children[0]:
            differs[:1] |= is_target[:1]  # it stands apart from its parent
        match = depth + (int(differs.argmax()) if differs.any() else length)
        path = [child]
        if match == depth + len(child.ids):
            match, below = _longest_match(child, ids, labels, match)
            path += below
        if match > best[0]:
            best = (match, path)
    return best


def _last_non_target(labels: Ints, at: int) -> int:
    """The last place up to ``at`` that is no target: a run that stands apart may open there."""
    return int(np.flatnonzero(labels[: at + 1] == IGNORED_LABEL)[-1])


def _lay_out(run: _Run, parent: int, runs: list[tuple[_Run, int]]) -> None:
    for child in run.children:
        index = len(runs)
        runs.append((child, parent))
        _lay_out(child, index, runs)


def _path(parents: NDArray[np.int32], leaf: int) -> list[int]:
    return list(_upwards(parents, leaf))[::-1]


def _upwards(parents: NDArray[np.int32], run: int) -> Iterator[int]:
    while run >= 0:
        yield run
        run = int(parents[run])


def _run_of(tree: Tree, length: int) -> NDArray[np.int64]:
    """[length] run of each token."""
    return np.searchsorted(tree.starts, np.arange(length), side="right").astype(np.int64) - 1
