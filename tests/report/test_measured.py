"""The first sentences after an evaluation: who won, by how much, and how sure that is."""

from dataclasses import replace

import pytest
from support.report.manifests import Page, make_evaluation, make_split, write

from merit_fast.manifests.schemas import Comparison, EvaluateManifest
from merit_fast.report.measured import measured_sentences
from merit_fast.report.tables import comparison_rows, results_rows


def evaluation(seeds=1, **losses):
    """Arms with these mixture losses; text loss and chat NLL rise in the order given."""
    whole = make_evaluation(make_split(4, 2))
    arms = {
        arm: replace(
            whole.arms["joint"],
            loss=loss,
            text_loss=3.0 + 0.1 * i,
            chat_nll=0.5 + 0.1 * i,
            num_seeds=1 if arm == "base" else seeds,
        )
        for i, (arm, loss) in enumerate(losses.items())
    }
    return EvaluateManifest(arms, {}, {})


def compared(found, first, second, item_error, seed_error=None, measure="loss"):
    row = Comparison(
        first,
        second,
        measure,
        getattr(found.arms[first], measure) - getattr(found.arms[second], measure),
        item_error,
        seed_error,
        100,
        1 if seed_error is None else 3,
    )
    return replace(found, comparisons=(*found.comparisons, row))


def test_the_first_sentence_names_the_winner_even_if_it_is_joint():
    found = compared(evaluation(base=4.5, joint=1.08, merit=1.47), "merit", "joint", 0.012)
    first, *_ = measured_sentences(found)
    assert first == (
        "On the mixture, joint has the lowest loss, 1.080: 0.390 (± 0.012 by row) below merit."
    )
    assert measured_sentences(found)[-1] == (
        "Every arm was trained once: one seed has no error bar between trainings."
    )


def test_a_difference_within_two_errors_is_no_win():
    found = compared(evaluation(base=4.5, joint=1.08, merit=1.1), "merit", "joint", 0.005, 0.02)
    assert measured_sentences(found)[0] == (
        "On the mixture, joint has the lowest loss, 1.080, but merit (1.100) cannot be told from "
        "it: the difference is 0.020 (± 0.005 by row, ± 0.020 by seed)."
    )


def test_a_difference_without_a_comparison_claims_no_certainty():
    first, *_ = measured_sentences(evaluation(base=4.5, joint=1.08, merit=1.47))
    assert first.endswith("merit follows with 1.470, a difference without an error bar.")


def test_merit_is_named_wherever_it_ends():
    found = evaluation(base=4.5, joint=1.0, random=1.2, merit=1.5)
    found = compared(found, "merit", "joint", 0.1)
    assert measured_sentences(found)[1] == (
        "The loss of merit, 1.500, is number 3: 0.500 (± 0.100 by row) above that of joint."
    )
    only = measured_sentences(evaluation(base=4.5, merit=1.5))
    assert not any("number" in sentence for sentence in only)


def test_retention_is_compared_among_trained_arms():
    found = compared(
        evaluation(base=4.5, joint=1.08, merit=1.47), "joint", "merit", 0.01, measure="text_loss"
    )
    text, chat = measured_sentences(found)[1:3]
    assert text == (
        "On general text, joint has the lowest text loss, 3.100 (base 3.000): "
        "0.100 (± 0.010 by row) below merit."
    )
    assert chat.startswith("On the base model's own answers, joint has the lowest chat NLL, 0.600")


def test_an_arm_without_a_finite_loss_does_not_win():
    found = evaluation(base=4.5, joint=float("nan"), merit=1.5)
    assert measured_sentences(found)[0].startswith("On the mixture, merit has the lowest loss")


def test_seeds_are_counted():
    same = measured_sentences(evaluation(3, base=4.5, joint=1.0, merit=1.5))
    assert same[-1] == "Every arm was trained with 3 seeds; errors by seed are between these."
    mixed = evaluation(3, base=4.5, joint=1.0, merit=1.5)
    mixed.arms["joint"] = replace(mixed.arms["joint"], num_seeds=1)
    assert measured_sentences(mixed)[-1].startswith("Seeds of training: joint 1, merit 3;")


def test_the_page_opens_with_it_and_calls_the_advice_older(tmp_path):
    split = make_split(6, 2)
    found = compared(make_evaluation(split), "merit", "joint", 0.01)
    text = Page(write(tmp_path / "r.html", split, found)).text.replace("\u00a0", " ")
    first = measured_sentences(found)[0]
    assert text.index(first) < text.index("Before training, from the split only:")
    assert text.index(first) < text.index("Results")


def test_errors_over_seeds_and_the_spread_of_controls_are_in_the_table():
    found = evaluation(2, base=4.5, joint=1.0, random=1.2, random2=1.4, random3=1.6, merit=1.5)
    found.arms["merit"] = replace(found.arms["merit"], errors={"loss": 0.0123, "exact_match": 0.02})
    columns, rows = results_rows(found)
    cells = {row[0]: dict(zip(columns, row, strict=True)) for row in rows}
    assert list(cells) == [
        "base",
        "joint",
        "random",
        "random2",
        "random3",
        "random ×3 ± sd",
        "merit",
    ]
    assert cells["merit"]["loss"] == "1.500 ± 0.012"
    assert cells["merit"]["exact match %"].endswith(" ± 2.0")
    assert cells["joint"]["loss"] == "1.000"
    spread = cells["random ×3 ± sd"]
    assert spread["loss"] == "1.400 ± 0.200" and spread["train s"] == "–"
    assert "seeds" not in columns  # the same for every arm: in the caption
    found.arms["joint"] = replace(found.arms["joint"], num_seeds=1)
    columns, rows = results_rows(found)
    assert [row[-1] for row in rows] == ["1", "1", "2", "2", "2", "–", "2"]


def test_comparisons_bracket_what_is_not_told_apart():
    found = evaluation(base=4.5, joint=1.0, merit=1.01)
    found = compared(found, "merit", "joint", 0.02)
    found = compared(found, "merit", "base", 0.02, 0.03)
    found = compared(found, "merit", "joint", 0.02, measure="chat_nll")
    assert comparison_rows(found) == (
        ("comparison", "loss", "chat NLL"),
        (
            ("merit − joint", "(+0.010 ± 0.020)", "+0.100 ± 0.020"),
            ("merit − base", "-3.490 ± 0.020 ± 0.030", "–"),
        ),
    )


def test_two_arms_have_one_row_of_comparisons_whichever_came_first():
    found = evaluation(base=4.5, joint=1.0, merit=1.01)
    found = compared(found, "merit", "joint", 0.001)
    found = compared(found, "joint", "merit", 0.02, measure="chat_nll")
    (row,) = comparison_rows(found)[1]
    assert row == ("merit − joint", "+0.010 ± 0.001", "+0.100 ± 0.020")


@pytest.mark.parametrize("measure", ["loss", "exact_match", "text_loss", "chat_nll"])
def test_comparisons_name_every_measure(measure):
    found = compared(
        evaluation(base=4.5, joint=1.0, merit=2.0), "merit", "joint", None, measure=measure
    )
    (_, cell) = comparison_rows(found)[1][0]
    assert cell.startswith("(")  # no error: not told apart
