"""State dicts merged where they are: the bits of the file merge; what disagrees is named."""

import pytest
import torch
from support.merge.merges import WEIGHTS, load, merge

from merit_fast.errors import InputError
from merit_fast.merge import merge_state_dicts


def state(seed, **changes):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 3, generator=generator).bfloat16()
    tensors = {
        "a.weight": weight,
        "norm": torch.randn(7, generator=generator),
        "steps": torch.arange(4),
        "head.weight": weight,
    }
    return {**tensors, **changes}


def test_state_dicts_give_the_bits_of_the_file_merge(branches, tmp_path):
    merge(branches, WEIGHTS, tmp_path / "out")
    merged = merge_state_dicts([load(path) for path in branches], WEIGHTS)
    expected = load(tmp_path / "out")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_state_dicts_step_from_a_base_and_share_what_is_shared():
    models = [state(1), state(2)]
    base = state(3)
    merged = merge_state_dicts(models, [0.25, 0.75], base, scale=0.5)
    assert list(merged) == list(models[0])
    for name in ("a.weight", "norm"):
        a, b, start = (model[name].double() for model in (*models, base))
        expected = 0.5 * 0.25 * a + 0.5 * 0.75 * b + 0.5 * start
        assert torch.equal(merged[name], expected.to(models[0][name].dtype))
    assert merged["head.weight"] is merged["a.weight"]
    assert (
        torch.equal(merged["steps"], torch.arange(4)) and merged["steps"] is not models[0]["steps"]
    )
    head = torch.zeros(5, 3).bfloat16()
    untied = merge_state_dicts([state(1), state(2, **{"head.weight": head})], [0.5, 0.5])
    assert untied["head.weight"] is not untied["a.weight"]


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_base_of_state_dicts_has_any_float_dtype(scale):
    models = [state(1), state(2)]
    base = {name: tensor.double() for name, tensor in state(3).items() if name != "steps"}
    base["steps"] = torch.arange(4)
    merged = merge_state_dicts(models, base=base, scale=scale)
    for name in ("a.weight", "norm"):
        mean = (models[0][name].double() + models[1][name].double()) / 2
        expected = scale * mean + (1 - scale) * base[name]
        assert merged[name].dtype == models[0][name].dtype
        assert torch.equal(merged[name], expected.to(merged[name].dtype))


def test_state_dicts_of_different_dtypes_need_one_by_name():
    models = [state(1), {name: t.float() for name, t in state(2).items() if name != "steps"}]
    models[1]["steps"] = torch.arange(4)
    rule = "^model 1: a.weight: dtype must be torch.bfloat16 .*float32; dtype= chooses one$"
    with pytest.raises(InputError, match=rule):
        merge_state_dicts(models)
    merged = merge_state_dicts(models, dtype="float16")
    mean = (models[0]["norm"].double() + models[1]["norm"].double()) / 2
    assert merged["norm"].dtype == torch.float16 and torch.equal(merged["norm"], mean.half())


def test_parameters_of_live_models_are_merged_without_a_graph():
    models = [torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)]
    merged = merge_state_dicts([dict(model.named_parameters()) for model in models], [0.5, 0.5])
    assert not merged["weight"].requires_grad
    models[0].load_state_dict(merged)
    assert torch.equal(models[0].weight, merged["weight"])


@pytest.mark.parametrize(
    "changes,message",
    [
        (
            {"norm": torch.zeros(8)},
            r"^model 1: norm: shape must be \[7\] as in model 0, got \[8\]$",
        ),
        (
            {"norm": torch.zeros(7, dtype=torch.int64)},
            r"^model 1: norm: dtype must be torch.float32 as in model 0",
        ),
        (
            {"norm": torch.zeros(7, device="meta")},
            r"^model 1: norm: must be on cpu as in model 0, is on meta$",
        ),
        ({"norm": 3}, r"^model 1: norm: must be a tensor, got int$"),
        (
            {"steps": torch.zeros(4, dtype=torch.int64)},
            r"^model 1: steps: a torch.int64 tensor cannot be averaged",
        ),
        ({"more": torch.zeros(1)}, r"^model 1: more: is not in model 0$"),
    ],
)
def test_state_dicts_that_disagree_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        merge_state_dicts([state(1), state(2, **changes)], [0.5, 0.5])


def test_a_missing_name_or_base_is_named():
    short = state(2)
    del short["norm"]
    with pytest.raises(InputError, match="^model 1: norm: is missing, model 0 has it$"):
        merge_state_dicts([state(1), short], [0.5, 0.5])
    with pytest.raises(InputError, match="^base: norm: is missing"):
        merge_state_dicts([state(1)], [1.0], short, scale=2.0)
    with pytest.raises(InputError, match="with a scale needs a base model"):
        merge_state_dicts([state(1)], [1.0], scale=2.0)
    with pytest.raises(InputError, match="weights: must be a list of at least one number"):
        merge_state_dicts([], [])
