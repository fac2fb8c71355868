"""A head whose rows lie in two processes: the results and gradients of one process."""

import os

import pytest
import torch
from support.kernels.loss_cases import batch
from support.paths import ROOT
from support.warm import run_python

from merit_fast.errors import BackendUnavailableError
from merit_fast.kernels.cross_entropy import VocabularyShard, linear_cross_entropy
from merit_fast.kernels.sketch import CountSketch


@pytest.mark.process
def test_two_processes_give_one_process_s_results_and_refuse_what_does_not_fit(tmp_path):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = ["-m", "support.kernels.vocabulary_ranks", tmp_path]
    result = run_python(command, environment=environment, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    for check in ("check_one_process_s_results", "check_refusals", "check_fsdp2"):
        assert result.stdout.count(check) == 2, result.stdout


def test_an_argument_that_does_not_fit_is_refused_before_any_process_is_asked():
    of = batch()
    shard = VocabularyShard(None, first_row=700, num_rows=1003)
    with pytest.raises(ValueError, match="got first_row 700, 1003 rows and num_rows 1003"):
        linear_cross_entropy(of.hidden, of.weight, of.labels, vocabulary=shard)
    shard = VocabularyShard(None, first_row=0, num_rows=1003)
    with pytest.raises(BackendUnavailableError, match="'eager' computes no part of a vocabulary"):
        linear_cross_entropy(of.hidden, of.weight, of.labels, vocabulary=shard, backend="eager")
    sketch = {"sketch": CountSketch(4096), "sketch_name": "w", "sketch_out": torch.zeros(37, 4096)}
    with pytest.raises(ValueError, match="sketch and vocabulary do not go together"):
        linear_cross_entropy(of.hidden, of.weight, of.labels, vocabulary=shard, **sketch)
