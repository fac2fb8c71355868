"""Trees of texts: joined and taken apart again, with positions and views of an own reference."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merit_fast.data.dataset import IGNORED_LABEL, Example
from merit_fast.data.tree import build, build_within, expand, positions, visible


def text(ids, *targets):
    labels = np.full(len(ids), IGNORED_LABEL, np.int32)
    for first, past in targets:
        labels[first:past] = ids[first:past]
    return np.array(ids, np.int32), labels


def predictions(ids, labels):
    """Every target with the tokens before it."""
    return [tuple(ids[: i + 1].tolist()) for i in range(1, len(ids)) if labels[i] != IGNORED_LABEL]


def predictions_of_tree(example: Example):
    """Every target with the tokens that the token before it in the example sees."""
    seen = visible(example.tree, len(example.input_ids))
    depth = positions(example.tree, len(example.input_ids))
    found = []
    for i in np.flatnonzero(example.labels != IGNORED_LABEL):
        before = np.flatnonzero(seen[i - 1])
        assert depth[before].tolist() == list(range(len(before)))  # a text, in its order
        assert depth[i] == len(before)
        found.append((*example.input_ids[before].tolist(), int(example.labels[i])))
    return found


@st.composite
def texts_with_shared_beginnings(draw):
    texts = []
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.sampled_from(texts))[0] if texts else []
        kept = draw(st.integers(0, len(start)))
        ids = [*start[:kept], *draw(st.lists(st.integers(0, 2), min_size=1, max_size=6))]
        marks = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        texts.append((ids, [False, *marks[1:]]))
    return [
        (np.array(ids, np.int32), np.where(marks, ids, IGNORED_LABEL).astype(np.int32))
        for ids, marks in texts
    ]


@given(texts_with_shared_beginnings())
@settings(max_examples=300, deadline=None)
def test_no_prediction_is_lost_or_changed(texts):
    wanted = sorted(found for ids, labels in texts for found in predictions(ids, labels))
    example = build(texts)
    assert len(example.input_ids) <= sum(len(ids) for ids, _ in texts)
    apart = expand(example)
    got = sorted(found for each in apart for found in predictions(each.input_ids, each.labels))
    assert got == wanted
    leaves = [each.input_ids.tolist() for each in apart]
    assert all(any(ids.tolist() == leaf[: len(ids)] for leaf in leaves) for ids, _ in texts)
    if example.tree is not None:
        assert sorted(predictions_of_tree(example)) == wanted
        behind = example.tree.parents[1:] == np.arange(len(example.tree.parents) - 1)
        opens_with_target = example.labels[example.tree.starts[1:]] != IGNORED_LABEL
        assert not (opens_with_target & ~behind).any()


@given(texts_with_shared_beginnings(), st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_limited_examples_hold_the_same_predictions(texts, limit):
    wanted = sorted(found for ids, labels in texts for found in predictions(ids, labels))
    examples = build_within(texts, limit)
    longest = max(len(ids) for ids, _ in texts)
    assert all(len(example.input_ids) <= max(limit, longest) for example in examples)
    apart = [each for example in examples for each in expand(example)]
    assert wanted == sorted(f for each in apart for f in predictions(each.input_ids, each.labels))


def test_texts_that_continue_each_other_are_one_plain_text():
    first, second = text([1, 2, 3, 4], (2, 4)), text([1, 2, 3, 4, 5, 6], (5, 6))
    example = build([first, second])
    assert example.tree is None
    assert example.input_ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert example.labels.tolist() == [IGNORED_LABEL, IGNORED_LABEL, 3, 4, IGNORED_LABEL, 6]
    assert expand(example) == [example]


def test_an_answer_that_history_rewrites_costs_its_own_tokens_only():
    prompt = [10, 11, 12]
    first = text([*prompt, 20, 21, 22], (3, 6))  # thinking 20, answer 21, end 22
    second = text([*prompt, 21, 22, 13, 30, 22], (6, 8))
    third = text([*prompt, 21, 22, 13, 30, 99, 14, 31], (9, 10))  # another end in history
    example = build([first, second, third])
    assert example.input_ids.tolist() == [*prompt, 20, 21, 22, 21, 22, 13, 30, 22, 99, 14, 31]
    assert example.tree.starts.tolist() == [0, 3, 6, 10, 11]
    assert example.tree.parents.tolist() == [-1, 0, 0, 2, 2]
    assert positions(example.tree, 14).tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 7, 8, 9]
    pairs = zip([first, second, third], expand(example), strict=True)
    assert all(
        one[0].tolist() == other.input_ids.tolist() and one[1].tolist() == other.labels.tolist()
        for one, other in pairs
    )


@pytest.mark.parametrize("texts", [[], [text([])], [text([1, 2], (0, 2))]])
def test_refuses_what_is_no_text(texts):
    with pytest.raises(ValueError, match="^build: needs "):
        build(texts)
