"""Text similarity: the vectors are those of TF-IDF, averaged over datasets."""

import math
import tracemalloc

import numpy as np
import pytest

from merit_fast.split.text_cluster import (
    _word_counts,
    dataset_similarity,
    text_vectors,
)

WORDS = {
    "sea": "ship sail harbour anchor wave",
    "sky": "cloud wing pilot rocket storm",
    "pan": "bread butter oven salt",
}


def rows(topic, number, seed):
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS[topic].split(), 6)) for _ in range(number)]


def test_inner_products_are_cosines_of_tf_idf():
    texts = ["red red fish", "blue fish", "one blue bird 1984", "The red bird and the 3rd fish"]
    # "one" is no number; "the" and "and" are stop words; 1984 and 3rd are numbers.
    words = ["red", "fish", "blue", "one", "bird"]
    texts_with = [sum(word in text.lower().split() for text in texts) for word in words]
    idf = [math.log((1 + 4) / (1 + number)) + 1 for number in texts_with]
    table = np.array(
        [
            [text.lower().split().count(w) * i for w, i in zip(words, idf, strict=True)]
            for text in texts
        ]
    )
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    vectors = text_vectors(texts)
    assert vectors @ vectors.T == pytest.approx(table @ table.T, abs=1e-9)


def test_words_of_many_texts_are_counted_without_keeping_the_texts():
    row, column, value, shape = _word_counts(f"zebra word{i % 7} ape zebra" for i in range(100_000))
    assert shape == (100_000, 9)
    words = ["ape", "word0", "word1", "word2", "word3", "word4", "word5", "word6", "zebra"]
    entries = {(int(r), words[c]): v for r, c, v in zip(row, column, value, strict=True) if r == 12}
    assert entries == {(12, "zebra"): 2, (12, "word5"): 1, (12, "ape"): 1}
    tracemalloc.start()
    _word_counts(f"{'zebra ' * 500} word{i % 7}" for i in range(2000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6  # of 6 MB


def test_few_directions_are_those_of_the_singular_value_decomposition():
    texts = rows("sea", 20, 0) + rows("sky", 20, 1) + rows("pan", 20, 2)
    full = text_vectors(texts, 100)  # rows of length 1: tf-idf itself, turned
    left, singular, _ = np.linalg.svd(full)
    expected = left[:, :3] * singular[:3]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    vectors = text_vectors(texts, 3)
    assert vectors.shape == (60, 3) and vectors @ vectors.T == pytest.approx(
        expected @ expected.T, abs=1e-4
    )


def test_datasets_about_the_same_things_are_alike():
    texts = {
        "sea1": rows("sea", 30, 0),
        "sky": rows("sky", 30, 1),
        "sea2": rows("sea", 30, 2),
        "empty": ["", "12 34"],
    }
    names, similarity = dataset_similarity(texts)
    assert names == ["empty", "sea1", "sea2", "sky"]
    assert similarity[1, 2] > 0.5 > 0.1 > abs(similarity[1, 3])
    assert np.allclose(similarity[0], 0)


def test_texts_without_words_have_no_direction():
    assert text_vectors(["", "1 2"]).shape == (2, 0)
    names, similarity = dataset_similarity({"b": ["7", "the"], "a": ["", ""]})
    assert names == ["a", "b"] and np.array_equal(similarity, np.zeros((2, 2)))
