"""An exported configuration, read back as a mixture, gives the examples of the run's groups."""

import pytest
import yaml

from merit_fast.data import load_mixture, load_tokenizer
from merit_fast.pipeline.config import read_run_config

# what the stacks ignore, and this package asks to list
OTHERS = ["dataset", "id", "merit_id", "instruction", "output", "question", "answer", "messages"]
OTHERS += ["conversations", "system"]


def examples(run, names, part):
    chosen = [entry for entry in run.mixture if entry.name in names]
    found = load_mixture(chosen, load_tokenizer(run.model), run.data, part=part)
    return sorted(
        (example.input_ids.tolist(), example.labels.tolist())
        for dataset in found
        for example in dataset.examples
    )


@pytest.mark.parametrize(
    ("stack", "file_name"),
    [("axolotl", None), ("llamafactory", None), ("llamafactory", "dataset_info.json")],
)
def test_a_group_read_back_gives_its_examples(
    export, plain_run, marked_run, tmp_path, stack, file_name
):
    config = marked_run if stack == "axolotl" else plain_run
    out, report = export(config, stack)
    run = read_run_config(config)
    for group in report["groups"]:
        number = group["group"]
        source = {"from": str(out / (file_name or group["config"]))}
        if file_name:
            wanted = yaml.safe_load((out / group["config"]).read_text())["dataset"].split(",")
            source["only"] = wanted
        values = {
            "model": run.model,
            "mixture": [source],
            "data": {"ignore_columns": OTHERS, "leaks": "keep"},
        }
        file = tmp_path / f"back_{number}.yml"
        file.write_text(yaml.safe_dump(values))
        back = read_run_config(file)
        names = {entry.name for entry in back.mixture}
        assert examples(back, names, "train") == examples(run, set(group["datasets"]), "train")
        if not file_name:
            assert examples(back, names, "eval") == examples(run, set(group["datasets"]), "eval")
