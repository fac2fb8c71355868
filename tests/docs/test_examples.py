"""The files in examples/ run on a tiny model."""

import json
import runpy
import sys

from safetensors import safe_open
from support.docs.pages import ROOT

EXAMPLES = ROOT / "examples"


def test_every_example_is_tested():
    names = {file.name for file in EXAMPLES.iterdir() if not file.name.startswith("__")}
    assert names == {"run.yml", "recipe.yml", "trainer.py", "first_steps.ipynb"}


def test_run(workspace):
    """The fixture has run it; pages may have split again since."""
    split = json.loads((workspace / "split_of_run.json").read_text())
    assert {row["name"] for row in split["datasets"]} == {"capitals", "codes", "plurals"}
    assert {row["group"] for row in split["datasets"]} == {0, 1}
    assert (workspace / "runs/mine/report/report.html").stat().st_size > 0


def test_recipe(working_directory, call):
    code, _, error = call("merge", "from_recipe", "--mergekit", EXAMPLES / "recipe.yml")
    assert code == 0, error
    (file,) = (working_directory / "from_recipe").glob("*.safetensors")
    with safe_open(file, "pt") as tensors:
        dtypes = {str(tensors.get_tensor(name).dtype) for name in tensors.keys()}  # noqa: SIM118
    assert dtypes == {"torch.bfloat16"}


def test_trainer(working_directory, monkeypatch, capsys):
    words = [
        "trainer.py",
        "BASE",
        "trained",
        "data/capitals.jsonl",
        "--steps",
        "2",
        "--batch-size",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(EXAMPLES / "trainer.py"), run_name="__main__")
    assert "rms_norm x 5, swiglu x 2, rope x 2, head x 1" in capsys.readouterr().out
    before = read_tensor(working_directory / "BASE")
    after = read_tensor(working_directory / "trained")
    assert after.shape == before.shape and not after.equal(before)


def read_tensor(model):
    """One weight of a model's directory."""
    name = "model.layers.1.mlp.down_proj.weight"
    for file in model.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118
                return tensors.get_tensor(name)
    raise AssertionError(f"{model}: holds no {name}")


def test_notebook(working_directory):
    notebook = json.loads((EXAMPLES / "first_steps.ipynb").read_text())
    names = {}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert names["history"][-1] < names["history"][0]
    assert names["sketches"].shape == (3, 65536)
    assert names["cosines"].diagonal().allclose(names["cosines"].new_ones(3))
