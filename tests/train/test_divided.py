"""``train.shard: full``: the branch of whole models, from processes that hold a part of it."""

import json
import signal

import pytest
import torch
from support.paths import TESTS
from support.tiny import make_model, make_tokenizer
from support.train.divided import CASES, RESUMED, job_of
from support.training import read_metrics, weights
from support.warm import run_together

from merit_fast.progress import SilentProgress
from merit_fast.train.stage import train_branch

pytestmark = pytest.mark.process
MEASURED = ("timing.json", "metrics.jsonl")
# Sums of more than two gradients are added in another order; moments of rows that are no whole
# blocks of 256 have 32 bits where they are divided.
CLOSE = {"packed": 2e-6, "in_backward": 2e-6, "small_moments": 2e-3}


RANK = (
    f"import runpy, sys; sys.path.insert(0, {str(TESTS)!r});"
    "runpy.run_module('support.train.divided', run_name='__main__', alter_sys=True)"
)


def run_ranks(folder, size, *names):
    commands = [["-c", RANK, rank, size, folder, *names] for rank in range(size)]
    return run_together([[str(word) for word in command] for command in commands], timeout=240)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All runs of two processes, behind one that is killed."""
    path = tmp_path_factory.mktemp("divided")
    for name, tied in (("tied", True), ("untied", False)):
        make_model(path / name, tie_word_embeddings=tied)
        make_tokenizer(path / name)
    for name, original in (("experts", True), ("stacked", False)):
        make_experts(path / name, original)
        make_tokenizer(path / name)
    results = run_ranks(path, 2, "killed")
    assert results[0].returncode == -signal.SIGKILL, results
    assert results[1].returncode not in (0, -signal.SIGKILL), results
    results = run_ranks(path, 2, "resumed", "in_backward", "unused", "two_copies", *CASES)
    assert [result.returncode for result in results] == [0, 0], results
    return path


def make_experts(folder, original):
    """A Mixtral whose experts are stored one by one, as on the hub, or stacked."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        **dict(vocab_size=400, hidden_size=72, intermediate_size=40, num_hidden_layers=2),
        **dict(num_attention_heads=9, num_key_value_heads=3, num_local_experts=3),
        **dict(num_experts_per_tok=2, bos_token_id=None, eos_token_id=1, pad_token_id=1),
        output_router_logits=True,
    )
    model = MixtralForCausalLM(config)
    model.save_pretrained(folder, save_original_format=original, max_shard_size="100KB")


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def metrics(directory):
    lines = [{**line, "seconds": 0} for line in read_metrics(directory)]
    return [{k: v for k, v in line.items() if k != "norm"} for line in lines], [
        line["norm"] for line in lines if "norm" in line
    ]


def assert_same_branch(ours, theirs):
    """Every file has the same bytes; a norm is a sum in another order."""
    first, second = files(ours), files(theirs)
    assert first.keys() == second.keys()
    for name in first.keys() - {*MEASURED}:
        assert first[name] == second[name], name
    assert metrics(ours)[0] == metrics(theirs)[0]
    assert metrics(ours)[1] == pytest.approx(metrics(theirs)[1], rel=1e-12)


def assert_close_branch(ours, theirs, tolerance):
    losses = [json.loads((path / "losses.json").read_text()) for path in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    assert metrics(ours)[1] == pytest.approx(metrics(theirs)[1], rel=100 * tolerance)
    ends = [weights(path) for path in (ours, theirs)]
    assert ends[0].keys() == ends[1].keys()
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["kept_best", "layers_twice", "lora", "experts", "stacked"])
def test_two_processes_write_the_bytes_of_whole_models(folder, name):
    assert_same_branch(folder / f"{name}.divided", folder / f"{name}.whole")


@pytest.mark.parametrize("name", CLOSE)
def test_other_orders_of_sums_differ_by_rounding(folder, name):
    assert_close_branch(folder / f"{name}.divided", folder / f"{name}.whole", CLOSE[name])


def test_a_killed_run_resumes_to_the_bytes_of_an_unbroken_one(folder):
    assert_same_branch(folder / "resumed2", folder / "unbroken")


def test_a_killed_run_resumes_with_other_numbers_of_processes(folder):
    results = run_ranks(folder, 3, "resumed")
    assert [result.returncode for result in results] == [0, 0, 0], results
    assert_close_branch(folder / "resumed3", folder / "unbroken", 2e-6)
    start, config = RESUMED
    one = folder / "killed"
    train_branch(job_of(folder / start, config), config, one, SilentProgress())
    assert_close_branch(one, folder / "unbroken", 2e-6)
    assert not (one / "resume.safetensors").exists()
