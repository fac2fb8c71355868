"""Similarity of datasets by the topics of their texts, without gradients. Pure NumPy.

The text vectors are those of c-BTM (Gururangan et al., arXiv 2303.14177): TF-IDF without numbers
and stop words, 100 directions of a truncated SVD, unit length. c-BTM clusters documents; here the
vectors are averaged over each dataset, so that whole datasets are compared as a split by gradients
compares them.
"""

import re
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.intp]

DIRECTIONS = 100
_WORD = re.compile(r"\b\w\w+\b")
_STOP_WORDS = """
about above after again all also am an and any are as at be because been before being below between
both but by can could did do does doing down during each few for from further had has have having
he her here hers him his how if in into is it its just me more most must my no nor not now of off
on once only or other our ours out over own same shall she should so some such than that the their
theirs them then there these they this those through to too under until up upon us very was we were
what when where which while who whom why will with would you your yours
"""
_STOP = frozenset(_STOP_WORDS.split())


def text_vectors(texts: Iterable[str], directions: int = DIRECTIONS) -> Array:
    """[n, R] unit vectors of the texts, R <= directions; a text without any word has zeros.

    tf-idf = count * (log((1 + n) / (1 + texts with the word)) + 1), rows scaled to unit length
    vectors = rows of tfidf @ v[:, :R], scaled to unit length       (u, s, v: its singular value
    decomposition)
    """
    row, column, value, shape = _word_counts(texts)
    frequency = np.bincount(column, minlength=shape[1])
    value *= np.log((1 + shape[0]) / (1 + frequency))[column] + 1
    value /= np.sqrt(np.bincount(row, value**2, minlength=shape[0]))[row]
    return _unit(_leading(row, column, value, shape, min(directions, *shape)))


def dataset_similarity(texts: Mapping[str, Sequence[str]]) -> tuple[list[str], Array]:
    """Names, sorted, and [N, N] inner products of the datasets' mean text vectors (not centred)."""
    names = sorted(texts)
    vectors = text_vectors(text for name in names for text in texts[name])
    ends = np.cumsum([len(texts[name]) for name in names])
    of_datasets = np.split(vectors, ends[:-1])
    nothing = np.zeros(vectors.shape[1])
    means = np.stack([rows.mean(0) if len(rows) else nothing for rows in of_datasets])
    return names, means @ means.T


def _word_counts(texts: Iterable[str]) -> tuple[Labels, Labels, Array, tuple[int, int]]:
    """Row, column and value of every entry of the table [texts, words], and the table's shape.

    Takes one text at a time; words are in the order of their letters.
    """
    numbers: dict[str, int] = {}
    sizes = array("q")
    column = array("q")
    value = array("d")
    for text in texts:
        count = Counter(_words(text))
        sizes.append(len(count))
        column.extend(numbers.setdefault(word, len(numbers)) for word in count)
        value.extend(count.values())
    place = {word: i for i, word in enumerate(sorted(numbers))}
    places = np.array([place[word] for word in numbers], np.intp)
    row = np.repeat(np.arange(len(sizes)), np.array(sizes, np.intp))
    columns = places[np.array(column, np.intp)]
    return row, columns, np.array(value), (len(sizes), len(numbers))


def _words(text: str) -> list[str]:
    return [
        word for word in _WORD.findall(text.lower()) if not word[0].isdigit() and word not in _STOP
    ]


def _leading(row: Labels, column: Labels, value: Array, shape: tuple[int, int], rank: int) -> Array:
    """[n, rank] u * s of the sparse matrix's leading directions.

    By subspace iteration (Halko et al. 2011).
    """

    def times(dense: Array) -> Array:
        return np.stack(
            [np.bincount(row, value * d[column], minlength=shape[0]) for d in dense.T], axis=1
        )

    def transposed_times(dense: Array) -> Array:
        return np.stack(
            [np.bincount(column, value * d[row], minlength=shape[1]) for d in dense.T], axis=1
        )

    if rank == 0:
        return np.zeros((shape[0], 0))
    width = min(rank + 10, *shape)
    basis = np.linalg.qr(times(np.random.default_rng(0).standard_normal((shape[1], width))))[0]
    for _ in range(6):
        basis = np.linalg.qr(times(np.linalg.qr(transposed_times(basis))[0]))[0]
    left, singular, _ = np.linalg.svd(transposed_times(basis).T, full_matrices=False)
    return np.asarray((basis @ left * singular)[:, :rank])


def _unit(rows: Array) -> Array:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(np.divide(rows, length, out=np.zeros_like(rows), where=length > 1e-12))
