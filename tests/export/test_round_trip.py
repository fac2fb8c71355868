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


@pytest.mark.parametrize("stack", ["axolotl", "llamafactory"])
def test_a_group_read_back_gives_its_examples(export, plain_run, marked_run, tmp_path, stack):
    config = marked_run if stack == "axolotl" else plain_run
    out, report = export(config, stack)
    run = read_run_config(config)
    for group in report["groups"]:
        number = group["group"]
        source = {"from": str(out / "dataset_info.json")}
        if stack == "axolotl":
            exported = yaml.safe_load((out / group["config"]).read_text())
            del exported["test_datasets"]  # held-out files of their own, which no entry names
            (out / group["config"]).write_text(yaml.safe_dump(exported))
            source = {"from": str(out / group["config"])}
        else:
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
