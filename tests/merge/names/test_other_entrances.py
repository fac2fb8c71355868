"""Names meet in every entrance: models in memory, distributed checkpoints, the command line."""

import pytest
import torch.distributed.checkpoint as dcp
from support.merge.names.models import (
    assert_average,
    load_whole,
    make,
    parameters,
    write_hub_form,
    write_memory_form,
    write_tensors,
)

from merit_fast.cli.main import main
from merit_fast.merge import load_merged, merge_models


@pytest.mark.parametrize("case", ["gemma3", "qwen3_moe"])
def test_load_merged_has_the_parameters_of_the_average(case, tmp_path):
    models = [make(case, seed) for seed in (0, 1)]
    paths = [
        write_hub_form(models[0], tmp_path / "a"),
        write_memory_form(models[1], tmp_path / "b"),
    ]
    loaded = load_merged(paths, [0.3, 0.7])
    assert_average(loaded.state_dict(), models, [0.3, 0.7])


@pytest.mark.parametrize("case", ["gemma3", "qwen3_moe"])
@pytest.mark.filterwarnings("ignore")
def test_a_distributed_checkpoint_meets_published_names(case, tmp_path):
    models = [make(case, seed) for seed in (0, 1)]
    hub = write_hub_form(models[0], tmp_path / "hub")
    models[1].config.architectures = [type(models[1]).__name__]
    models[1].config.save_pretrained(tmp_path / "dcp")
    dcp.save(parameters(models[1]), checkpoint_id=tmp_path / "dcp", no_dist=True)
    merge_models([hub, tmp_path / "dcp"], [0.3, 0.7], out=tmp_path / "out")
    assert_average(load_whole(type(models[0]), tmp_path / "out"), models, [0.3, 0.7])


def test_the_command_says_what_was_renamed_and_where_towers_come_from(
    tmp_path, capsys, monkeypatch
):
    models = [make("gemma3", seed) for seed in (0, 1)]
    hub = write_hub_form(models[0], tmp_path / "hub")
    towers = ("model.vision_tower.", "model.multi_modal_projector.")
    kept = {n: t for n, t in parameters(models[1]).items() if not n.startswith(towers)}
    part = write_tensors(models[1], tmp_path / "part", kept)
    words = ["merit-fast", "merge", str(tmp_path / "out"), "--model", str(part), "--base", str(hub)]
    words += ["--method", "task_arithmetic", "--missing", "base"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    shown = capsys.readouterr().out
    assert f"{part}: tensors have the names of {hub}" in shown
    assert "come from the base: vision_tower" in shown
    assert load_whole(type(models[0]), tmp_path / "out")
