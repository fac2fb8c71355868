"""The newcomer's command, from its console script: a real model, real tasks, one JSON object."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.checks import tree_bytes
from support.warm import run_python

from merit_fast.model import DTYPES, settle_dtype

pytestmark = [pytest.mark.demo, pytest.mark.process, pytest.mark.slow]
SCRIPT = Path(sys.executable).with_name("merit-fast")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo")
    return directory, run(directory)


def from_the_shell(command, directory, environment):
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)


def run(directory, start=from_the_shell):
    # A proxy without a server: a demo that asks the network for anything fails.
    names = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
    closed = dict.fromkeys(names, "http://127.0.0.1:9")
    command = [SCRIPT, "demo", "--quick", "--json", "--out", "out"]
    result = start(command, directory, {**os.environ, **closed})
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_arms_learn_and_the_summary_is_whole(demo):
    _, summary = demo
    arms = summary["arms"]
    assert {"base", "joint", "merit"} == set(arms)
    for arm in arms.values():
        assert {"loss", "exact_match", "text_loss", "chat_nll", "answer_length_tokens"} <= set(arm)
    assert arms["joint"]["loss"] < 0.6 * arms["base"]["loss"]
    assert arms["merit"]["loss"] < 0.6 * arms["base"]["loss"]
    assert arms["joint"]["num_target_tokens"] == arms["merit"]["num_target_tokens"]
    assert set(summary["split"].values()) == {0, 1} and len(summary["split"]) == 8
    assert isinstance(summary["merging_gain"], float)


def test_merged_checkpoint_loads_and_generates(demo):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory, summary = demo
    path = directory / summary["merged"]
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert model.dtype == getattr(torch, DTYPES[settle_dtype("auto")])
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(written[0, inputs["input_ids"].shape[1] :])


def test_report_is_there_and_a_second_run_resumes_at_once(demo):
    directory, summary = demo
    assert "plotly" in (directory / summary["report"]).read_text()
    before = tree_bytes(directory / "out")
    assert run(directory, run_python) == summary
    assert tree_bytes(directory / "out") == before
