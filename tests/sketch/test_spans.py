"""Spans of a dataset: whoever sketches them, in whatever order, the sums have the same bits."""

import numpy as np
import pytest
from support.runs import Notes
from support.sketch.staged import example

from merit_fast.data import Dataset
from merit_fast.errors import InputError
from merit_fast.manifests.sketch_state import SketchState
from merit_fast.sketch.config import SketchConfig
from merit_fast.sketch.mixture import stage as sketching
from merit_fast.sketch.mixture.dataset import DatasetSketcher
from merit_fast.sketch.mixture.stage import sketch_mixture

ROWS = 22  # with spans of 5: five spans, the last one short


def rows():
    numbers = np.random.default_rng(1)

    def drawn(count):
        return tuple(example(numbers.integers(5, 90, 7 + k % 3)) for k in range(count))

    shared = drawn(6)
    large = Dataset("large", (*drawn(ROWS - 6), *shared))
    small = Dataset("small", (*shared[:2], *drawn(2)))
    return [large, small]


def sketched(model, folder, earlier=(), only=None, share=None, datasets=None, **options):
    """Runs the stage; returns relative path -> bytes of its files, and the notes."""
    defaults = {"proj_dim": 4096, "dtype": "fp32", "batch_size": 3, "examples": "all", "span": 5}
    folder.mkdir(parents=True, exist_ok=True)
    progress = Notes()
    sketch_mixture(
        str(model),
        "fingerprint",
        datasets or rows(),
        1,
        SketchConfig(**(defaults | options)),
        folder,
        progress,
        earlier,
        only=only,
        share=share,
    )
    return files_of(folder), progress.notes


def files_of(folder):
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


PARTS = {"parts": {"layers": "layers"}}
STORE = {"store": True, "store_dim": 4096}


@pytest.mark.parametrize("options", [PARTS, STORE], ids=["parts", "store"])
@pytest.mark.parametrize("count", [2, 5, 7])
def test_shares_of_any_number_give_the_bytes_of_one_process(tiny_model, tmp_path, count, options):
    whole, _ = sketched(tiny_model, tmp_path / "whole", **options)
    folders = []
    for number in np.random.default_rng(count).permutation(count) + 1:
        folders.append(tmp_path / f"share-{number}")
        sketched(tiny_model, folders[-1], only="large", share=(int(number), count), **options)
    joined, notes = sketched(tiny_model, tmp_path / "joined", folders, **options)
    assert joined == whole
    assert "sketch: large: 5 of 5 spans are there already" in notes


def test_spans_add_up_to_the_sums_without_spans(tiny_model, tmp_path):
    """The sums differ by the order of float64 additions only; all that is counted is equal."""
    sketched(tiny_model, tmp_path / "spans")
    sketched(tiny_model, tmp_path / "one", span=ROWS)
    cut = SketchState.read(tmp_path / "spans/large.safetensors")
    one = SketchState.read(tmp_path / "one/large.safetensors")
    for name in ("block_counts", "block_weights", "length_counts", "shared_rows"):
        assert getattr(cut, name).tolist() == getattr(one, name).tolist()
    assert len(cut.shared_rows) == 2 and cut.num_target_tokens == one.num_target_tokens
    for name in ("block_sums", "other_sum", "block_square_norms"):
        difference = (getattr(cut, name) - getattr(one, name)).norm()
        assert float(difference / getattr(one, name).norm()) < 1e-6  # fp32 passes of other sizes
    assert cut.loss_sum == pytest.approx(one.loss_sum, rel=1e-6)


def test_a_dataset_of_one_span_has_the_bytes_and_the_fingerprint_of_any_longer_span(
    tiny_model, tmp_path
):
    first, _ = sketched(tiny_model, tmp_path / "first", span=ROWS)
    again, notes = sketched(tiny_model, tmp_path / "again", [tmp_path / "first"], span=2048)
    assert again == first and "sketch: 2 of 2 datasets are as before" in notes[0]


def test_other_spans_are_other_sums(tiny_model, tmp_path):
    sketched(tiny_model, tmp_path / "first")
    fresh, _ = sketched(tiny_model, tmp_path / "fresh", span=7)
    again, _ = sketched(tiny_model, tmp_path / "again", [tmp_path / "first"], span=7)
    assert again["large.safetensors"] == fresh["large.safetensors"]


def test_spans_that_are_there_need_no_model_and_damaged_ones_are_sketched_again(
    tiny_model, tmp_path, monkeypatch
):
    whole, _ = sketched(tiny_model, tmp_path / "whole")
    share = tmp_path / "share"
    sketched(tiny_model, share, only="large", share=(1, 1))
    small = tmp_path / "small"
    sketched(tiny_model, small, only="small")
    with monkeypatch.context() as patch:
        patch.setattr(sketching, "load_model_for", None)
        joined, _ = sketched(tiny_model, tmp_path / "joined", [share, small])
    assert joined == whole
    third = share / "spans/large/00002.safetensors"
    third.write_bytes(third.read_bytes()[:-8] + b"damaged!")
    counts = []
    real = DatasetSketcher.sketch
    monkeypatch.setattr(
        DatasetSketcher,
        "sketch",
        lambda *given: counts.append(len(given[1].indices)) or real(*given),
    )
    again, _ = sketched(tiny_model, tmp_path / "again", [share, small])
    assert again == whole and counts == [5]


def test_an_interrupted_dataset_resumes_at_its_next_span(tiny_model, tmp_path, monkeypatch):
    whole, _ = sketched(tiny_model, tmp_path / "whole")
    done = []
    real = DatasetSketcher.sketch

    def failing(*given):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(given[1])
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(DatasetSketcher, "sketch", failing)
        with pytest.raises(KeyboardInterrupt):
            sketched(tiny_model, tmp_path / "again")
    again, notes = sketched(tiny_model, tmp_path / "again")
    assert again == whole and "sketch: large: 3 of 5 spans are there already" in notes


def test_a_share_of_a_dataset_that_is_known_or_not_cut_does_nothing(
    tiny_model, tmp_path, monkeypatch
):
    sketched(tiny_model, tmp_path / "whole")
    monkeypatch.setattr(sketching, "load_model_for", None)
    files, notes = sketched(
        tiny_model, tmp_path / "known", [tmp_path / "whole"], only="large", share=(1, 5)
    )
    assert files == {} and "has no span that share 1 must sketch" in notes[0]
    assert sketched(tiny_model, tmp_path / "small", only="small", share=(1, 2))[0] == {}
    assert sketched(tiny_model, tmp_path / "far", only="large", share=(9, 9))[0] == {}


def test_with_a_precision_nothing_is_cut_and_a_span_has_an_example():
    config = SketchConfig(examples="all", span=5)
    assert [config.num_spans(count) for count in (0, 5, 6, 22)] == [1, 1, 2, 5]
    assert SketchConfig(examples=10, span=5).num_spans(22) == 2
    assert SketchConfig(examples="all", span=5, precision=0.1).num_spans(22) == 1
    with pytest.raises(InputError, match="span: must be at least 1, got 0"):
        SketchConfig(span=0)
