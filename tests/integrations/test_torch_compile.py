"""torch_compile=True in the Trainer and in TRL: the numbers of the model that is not compiled.

The backend is eager, or aot_eager where the backward pass matters: the graphs are those of
inductor, without its C++.
"""

from types import SimpleNamespace

import pytest
import torch
from support import architectures
from support.checks import assert_close
from support.sketch.trainer_runs import PROJ_DIM, llama, losses, rows, trainer
from torch._dynamo.utils import counters

from merit_fast import patch_model
from merit_fast.integrations import MeritCallback, fused_adamw, use_loss
from merit_fast.integrations.sketch_files import read_states
from merit_fast.integrations.stacks.callback import StackCallback
from merit_fast.integrations.trainer import SketchCallback


@pytest.fixture(autouse=True)
def _compiler_without_memory():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    llama().save_pretrained(folder)
    return folder


def compiled(backend):
    return {} if backend is None else {"torch_compile": True, "torch_compile_backend": backend}


def run_of(folder, start, backend, patched, watched=True, **options):
    """A run with every line of the page on the Trainer, and its callback."""
    torch._dynamo.reset()
    counters.clear()
    model = llama()
    if patched:
        patch_model(model)
    data = rows(8, mixed=True)
    run = trainer(folder, data, model, max_grad_norm=0.0, **compiled(backend), **options)
    run.optimizer_cls_and_kwargs = fused_adamw(run.args, max_norm=1.0)
    if patched:
        use_loss(run, z_loss=1e-3)
    callback = MeritCallback(start=start, sketch_every=2, proj_dim=PROJ_DIM)
    if watched:
        callback.attach(run)
    run.train()
    return run, callback


@pytest.mark.parametrize("patched", [True, False], ids=["patched", "plain"])
def test_a_compiled_trainer_gives_losses_weights_counts_and_sketches(tmp_path, start, patched):
    plain, expected = run_of(tmp_path / "plain", start, None, patched)
    run, callback = run_of(tmp_path / "compiled", start, "eager", patched)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs and not counters["graph_break"]
    assert losses(run) == pytest.approx(losses(plain), rel=1e-6)
    for mine, other in zip(run.model.parameters(), plain.model.parameters(), strict=True):
        assert_close(mine.detach(), other.detach())
    for name, value in expected.counts.items():
        assert callback.counts[name].loss_sum == pytest.approx(value.loss_sum, rel=1e-6)
        assert callback.counts[name].num_correct == value.num_correct
        assert callback.counts[name].num_target_tokens == value.num_target_tokens
    states = read_states(tmp_path / "compiled" / "sketches")
    for name, state in read_states(tmp_path / "plain" / "sketches").items():
        assert_close(states[name].block_sums, state.block_sums)
    run_of(tmp_path / "unwatched", start, "eager", patched, watched=False)
    assert counters["stats"]["unique_graphs"] == graphs  # the callback compiles nothing


def test_an_evaluation_of_a_compiled_model_tells_its_datasets(tmp_path, start):
    data = rows(8, mixed=True)
    metrics = []
    for backend in (None, "eager"):
        run = trainer(tmp_path, data, held_out=data, **compiled(backend))
        MeritCallback(start=start).attach(run)
        metrics.append(run.evaluate())
    names = [key for key in metrics[0] if "merit" in key]
    assert len(names) == 6
    assert [metrics[1][key] for key in names] == pytest.approx([metrics[0][key] for key in names])


def test_sketches_and_counts_of_compiled_backward_passes_are_the_same(tmp_path, start):
    states = []
    for backend in (None, "aot_eager"):  # whose backward pass is compiled too
        run = trainer(tmp_path / str(backend), rows(), **compiled(backend))
        sketches = SketchCallback(proj_dim=PROJ_DIM).attach(run)
        counts = StackCallback(start=start)
        run.add_callback(counts)
        counts.watch(run.model)
        run.train()
        states.append(sketches.sketcher.state)
        assert counts.counts.num_examples == 8
        assert counts.counts.num_target_tokens == sum(len(row["labels"]) - 2 for row in rows())
    assert counters["stats"]["unique_graphs"]
    for name, state in states[0].items():
        assert_close(states[1][name].block_sums, state.block_sums)


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "theirs"])
def test_a_compiled_sft_trainer_tells_the_same_under_packing(tmp_path, ours):
    pytest.importorskip("trl", reason="trl is not installed")
    from support.stacks.trl_runs import sft_run
    from support.tiny import make_model, make_tokenizer

    from merit_fast.integrations.trl import MeritSFTTrainer

    make_tokenizer(tmp_path)
    make_model(tmp_path, num_hidden_layers=1)
    runs = []
    for backend in (None, "eager"):
        options = {"packing": True, "learning_rate": 1e-3, "kwargs": {"head": ours}}
        run = sft_run(MeritSFTTrainer, tmp_path, tmp_path, **compiled(backend), **options)
        if ours:
            patch_model(run.model)
        run.train()
        runs.append(run)
    assert counters["stats"]["unique_graphs"]
    plain, run = runs
    assert losses(run) == pytest.approx(losses(plain), rel=1e-6)
    for name, value in plain.merit.counts.items():
        assert run.merit.counts[name].loss_sum == pytest.approx(value.loss_sum, rel=1e-6)
        assert run.merit.counts[name].num_correct == value.num_correct


def test_a_reference_model_that_is_compiled_already_gets_our_head():
    """DPO and GRPO prepare their reference model before anybody can call use_head."""
    utils = pytest.importorskip("trl.trainer.utils", reason="trl is not installed")
    from merit_fast.integrations.trl import use_head

    model = architectures.make("llama")
    utils.add_fused_lm_head(model)
    torch.manual_seed(0)
    ids = torch.randint(3, architectures.VOCABULARY, (2, 7))
    inputs = {"input_ids": ids, "labels": ids, "fused_lm_head": True}
    expected = model(**inputs).log_probs
    theirs = model.forward
    reference = torch.compile(model, backend="eager")
    main = architectures.make("llama")
    utils.add_fused_lm_head(main)
    assert use_head(SimpleNamespace(model=main, ref_model=reference)) == 2
    assert model.forward is not theirs
    assert_close(reference(**inputs).log_probs.detach(), expected.detach())
