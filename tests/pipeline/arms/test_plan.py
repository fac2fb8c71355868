"""The plan of the arms: which branches are trained, which arms they make, which notes tell why."""

from dataclasses import replace

import pytest
from support.report.manifests import make_split
from support.runs import run_values

from merit_fast.data import Dataset
from merit_fast.merge.config import MergeConfig
from merit_fast.options.parser import parse
from merit_fast.pipeline.config import RunConfig
from merit_fast.pipeline.outputs import Outputs
from merit_fast.pipeline.plan import keeps_one_model

NAMES = ("capitals", "codes", "plurals", "opposites")


@pytest.fixture
def planned(tiny_model, tiny_mixture, tmp_path):
    """Plans a run: groups, options of train, merge and mixture, the controls that exist."""

    def plan(labels, train, *controls, num_splits=None, merge=None, mixture=None):
        values = run_values(tiny_model, mixture or tiny_mixture)
        values |= {"output": str(tmp_path / "out"), "merge": merge or {}}
        values["train"] = {"batch_size": 4, "dtype": "fp32", **train}
        config = parse(RunConfig, values, "test")
        groups = max(labels) + 1
        split = make_split(len(labels), max(groups, 2))
        rows = [
            replace(row, name=entry.name, group=label, num_examples=8)
            for row, entry, label in zip(split.datasets, config.mixture, labels, strict=True)
        ]
        outputs = Outputs(config, "merit-fast {stage}")
        outputs.__dict__["split_manifest"] = replace(
            split,
            groups=groups,
            datasets=tuple(rows),
            controls=controls,
            num_splits=num_splits,
        )
        return outputs

    return plan


def contents(outputs, arm):
    return {outputs.branch(b).fingerprint for b in outputs.branches.values() if b.arm == arm}


def test_no_control_is_trained_unless_asked_for(planned):
    plan = planned((0, 0, 1, 1), {}, (0, 1, 0, 1)).plan
    assert list(plan.arms) == ["merit"]
    assert list(plan.branches) == list(plan.merges["merit"]) == ["merit-0", "merit-1"]
    assert plan.notes == ()


@pytest.mark.parametrize(
    "controls,arms",
    [
        ({"random": 1}, ["iid", "random", "merit"]),
        ({"random": 1, "iid": 0}, ["random", "merit"]),
        ({"random": 2, "iid": 2}, ["iid2", "iid", "random2", "random", "merit"]),
        ({"iid": 1}, ["iid", "merit"]),
        (
            {"joint": True, "joint_short": True, "joint_low": 0.1},
            ["joint", "joint-short", "joint-low", "merit"],
        ),
    ],
)
def test_an_iid_control_comes_with_random_splits_unless_it_is_declined(planned, controls, arms):
    outputs = planned((0, 0, 1, 1), {"controls": controls}, (0, 1, 0, 1), (0, 1, 1, 0))
    assert list(outputs.plan.arms) == arms
    assert outputs.plan.notes == ()
    assert outputs.num_controls == max(1, controls.get("random", 0))


def test_every_seed_trains_every_arm_and_the_first_has_the_plain_names(planned):
    train = {"seeds": 2, "seed": 5, "controls": {"joint": True, "random": 1, "iid": 0}}
    outputs = planned((0, 0, 1, 1), train, (0, 1, 0, 1))
    plan = outputs.plan
    assert plan.arms["merit"] == ("merit", "merit.seed1")
    assert plan.arms["joint"] == ("joint", "joint.seed1")
    assert plan.merges["merit.seed1"] == ("merit-0.seed1", "merit-1.seed1")
    assert outputs.merge_path("merit.seed1").name == "merit.seed1"
    assert plan.first_merges == ["merit", "random"]
    assert len(plan.trained) == 10
    seeds = {name: outputs.recipe(branch).seed for name, branch in plan.branches.items()}
    assert {seeds[name] for name in ("merit-0", "joint", "random-1")} == {5}
    assert {seeds[name] for name in ("merit-0.seed1", "joint.seed1", "random-1.seed1")} == {6}


@pytest.mark.parametrize(
    "existing,num_splits,arms,note",
    [
        (1, 2, ["random"], "random: 1 of 3: only 1 other balanced split exists"),
        (2, 3, ["random2", "random"], "random: 2 of 3: only 2 other balanced splits exist"),
        (0, 1, [], "random: no other balanced split exists, so no random arm is trained"),
    ],
)
def test_fewer_random_splits_than_asked_for_are_told_in_one_note(
    planned, existing, num_splits, arms, note
):
    controls = ((0, 1, 0, 1), (0, 1, 1, 0))[:existing]
    train = {"controls": {"random": 3, "iid": 0}}
    plan = planned((0, 0, 1, 1), train, *controls, num_splits=num_splits).plan
    assert list(plan.arms) == [*arms, "merit"]
    assert plan.notes == (note,)


def test_a_group_that_two_arms_share_is_one_branch(planned):
    outputs = planned((0, 0, 1, 2), {"controls": {"random": 1, "iid": 0}}, (2, 1, 1, 0))
    plan = outputs.plan
    assert plan.owners["random-0"] == "merit-2"
    assert outputs.branch_path("random-0") == outputs.branch_path("merit-2")
    assert [branch.name for branch in plan.trained] == [
        "merit-0", "merit-1", "merit-2", "random-1", "random-2"]  # fmt: skip
    assert plan.merges["random"] == ("random-0", "random-1", "random-2")
    assert outputs.merge_inputs("random")[0].name == "merit-2"
    assert list(plan.arms) == ["random", "merit"]


def test_one_group_makes_one_model_of_every_arm(planned):
    train = {"controls": {"joint": True, "joint_short": True, "random": 1}, "seeds": 2}
    plan = planned((0, 0, 0, 0), train).plan
    assert [branch.name for branch in plan.trained] == ["merit-0", "merit-0.seed1"]
    assert list(plan.arms) == ["merit"]
    assert plan.notes[1:] == (
        "iid, joint, joint-short: the same model as merit, trained and shown once",
    )
    assert plan.notes[0].startswith("random: no other balanced split exists")


def test_joint_of_one_group_is_interpolated_from_the_branch_that_holds_it(planned):
    plan = planned((0, 0, 0, 0), {"controls": {"joint": True}, "seeds": 2}).plan
    assert plan.measured_arms == {"merit": ("merit", "merit.seed1")}
    assert plan.joint == ("merit-0", "merit-0.seed1")


def test_a_merge_that_changes_a_single_branch_is_shown_next_to_joint(planned):
    train = {"controls": {"joint": True}}
    plan = planned((0, 0, 0, 0), train, merge={"scale": 0.5}).plan
    assert list(plan.arms) == ["joint", "merit"] and plan.notes == ()
    assert [branch.name for branch in plan.trained] == ["merit-0"]
    assert plan.owners["joint"] == "merit-0"
    assert not keeps_one_model(MergeConfig(dtype="bf16"))
    assert not keeps_one_model(MergeConfig(normalize=False, weights=(0.5,)))
    assert keeps_one_model(MergeConfig(weights="uniform"))


def test_a_branch_is_known_by_its_rows_and_not_by_names(planned, tiny_mixture):
    train = {"controls": {"iid": 1}}
    before = planned((0, 0, 1, 1), train)
    flipped = planned((1, 1, 0, 0), train)
    mixture = [{**entry, "name": f"my-{entry['name']}"} for entry in tiny_mixture]
    renamed = planned((0, 0, 1, 1), train, mixture=mixture)
    for outputs in (flipped, renamed):
        for arm in ("merit", "iid"):
            assert contents(outputs, arm) == contents(before, arm)
    assert contents(before, "merit") != contents(before, "iid")
    other = planned((0, 1, 0, 1), train)
    assert not contents(other, "merit") & contents(before, "merit")
    edited = [{**tiny_mixture[0], "max_examples": 3}, *tiny_mixture[1:]]
    assert len(contents(planned((0, 0, 1, 1), train, mixture=edited), "merit")
               & contents(before, "merit")) == 1  # fmt: skip


def test_every_iid_control_deals_all_rows_in_its_own_order(planned):
    outputs = planned((0, 0, 1, 1), {"controls": {"iid": 2}})
    datasets = [Dataset(name, tuple(range(9))) for name in NAMES]
    shares = {}
    for name, branch in outputs.branches.items():
        chosen = branch.choose(datasets, outputs.config.split)
        shares[name] = [dataset.examples for dataset in chosen]
        assert branch.num_rows(dict.fromkeys(NAMES, 9), outputs.config.split) == sum(
            map(len, shares[name])
        )
    for arm in ("iid", "iid2"):
        for i in range(len(NAMES)):
            dealt = [*shares[f"{arm}-0"][i], *shares[f"{arm}-1"][i]]
            assert sorted(dealt) == list(range(9))
    assert shares["iid-0"] != shares["iid2-0"] and shares["iid-0"] != shares["iid2-1"]


def test_joint_short_takes_the_steps_of_the_longest_branch_of_merit(planned):
    controls = {"joint": True, "joint_short": True, "joint_low": 0.25}
    outputs = planned((0, 1, 1, 1), {"epochs": 2, "controls": controls})
    short = outputs.branches["joint-short"]
    assert short.steps == 2 * 3 * 8 // 4  # epochs, datasets, rows, rows per step
    assert short.rows == outputs.branches["joint"].rows and short.start == "base"
    low = outputs.recipe(outputs.branches["joint-low"])
    assert low.learning_rate == 0.25 * outputs.config.train.learning_rate
    assert len({outputs.branch(branch).fingerprint for branch in outputs.branches.values()}) == 5
