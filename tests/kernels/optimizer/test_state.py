"""FusedAdamW's states: exact resume, loading from torch and into it, refusals."""

import copy
import warnings

import numpy as np
import pytest
import torch
from support.kernels.optimizer_runs import BACKENDS, OPTIONS, SETTINGS, assert_same_run, train

from merit_fast.kernels.optimizer import FusedAdamW

BOTH = pytest.mark.parametrize("backend", BACKENDS)
EVERY = pytest.mark.parametrize("dtype,options", OPTIONS, ids=str)


@EVERY
@BOTH
def test_a_resumed_run_gives_the_bits_of_an_unbroken_one(backend, dtype, options, tmp_path):
    whole = train(dtype, 6, backend=backend, **options)
    parameters, optimizer = train(dtype, 3, backend=backend, **options)
    torch.save(
        {"model": [p.detach() for p in parameters], "optimizer": optimizer.state_dict()},
        tmp_path / "run.pt",
    )
    saved = torch.load(tmp_path / "run.pt")
    again = [torch.nn.Parameter(value) for value in saved["model"]]
    resumed = FusedAdamW(again, **{**SETTINGS, **options}, backend=backend)
    resumed.load_state_dict(saved["optimizer"])
    assert_same_run(whole, train(dtype, 3, 3, again, resumed))


@BOTH
def test_torch_resumes_from_our_state_and_we_from_torchs(backend):
    whole, _ = train("fp32", 6, make=torch.optim.AdamW)
    for first, second in ((FusedAdamW, torch.optim.AdamW), (torch.optim.AdamW, FusedAdamW)):
        parameters, optimizer = train("fp32", 3, make=first)
        options = {"backend": backend} if second is FusedAdamW else {}
        other = second(parameters, lr=7.0, **options)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert other.param_groups[0]["lr"] == SETTINGS["lr"]
        train("fp32", 3, 3, parameters, other)
        for a, b in zip(parameters, whole, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_loaded_moments_take_the_kind_asked_for():
    parameters, optimizer = train("fp32", 3)
    state = copy.deepcopy(optimizer.state_dict())
    eight = FusedAdamW(parameters, moments="int8")
    with pytest.warns(UserWarning, match="moments 'fp32' .now 'int8'.; the seed is taken over"):
        eight.load_state_dict(state)
    back = FusedAdamW(parameters, moments="fp32")
    with pytest.warns(UserWarning, match="moments 'int8' .now 'fp32'."):
        back.load_state_dict(copy.deepcopy(eight.state_dict()))
    for p in parameters:
        assert (
            eight.state[p]["exp_avg"].dtype == torch.int8
            and back.state[p]["exp_avg"].dtype == torch.float32
        )
        for name in ("exp_avg", "exp_avg_sq"):
            truth = optimizer.state[p][name]
            assert (back.state[p][name] - truth).norm() <= 0.05 * truth.norm()


def test_states_that_do_not_fit_are_refused():
    parameters, optimizer = train("bf16", 1, master="fp32")
    with pytest.raises(ValueError, match="keeps 'master', master='split' needs 'low_bits'"):
        FusedAdamW(parameters, master="split").load_state_dict(optimizer.state_dict())
    amsgrad = torch.optim.AdamW(parameters, amsgrad=True)
    with pytest.raises(ValueError, match="has no amsgrad"):
        optimizer.load_state_dict(amsgrad.state_dict())


def test_copies_keep_their_options():
    parameters, optimizer = train("bf16", 1, moments="int8", seed=9)
    twin = copy.deepcopy(optimizer)
    assert twin.options == optimizer.options and twin.options.seed == 9
    twin.step()


def state_of(make, **options):
    """The state dict of another optimizer after a step."""
    parameters, optimizer = train("fp32", 1, make=make, **options)
    return parameters, optimizer.state_dict()


OTHER_RULES = [
    (torch.optim.Adam, {"weight_decay": 0.1}, "made with L2 decay .*weight_decay=0.1"),
    (torch.optim.AdamW, {"amsgrad": True}, "has no amsgrad"),
    (torch.optim.AdamW, {"maximize": True}, "has no maximize"),
    (torch.optim.RAdam, {}, "is of RAdam"),
    (torch.optim.NAdam, {"weight_decay": 0.0}, "is of RAdam or NAdam"),
    (torch.optim.Adamax, {}, "not AdamW's"),
    (torch.optim.Adagrad, {}, "not AdamW's"),
]


@pytest.mark.parametrize("make,options,words", OTHER_RULES, ids=str)
def test_states_of_other_rules_are_refused_and_change_nothing(make, options, words):
    parameters, state = state_of(make, **options)
    optimizer = FusedAdamW(parameters, lr=3.0)
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(state)
    assert not optimizer.state and optimizer.param_groups[0]["lr"] == 3.0


def test_adam_without_decay_is_adamw():
    parameters, state = state_of(torch.optim.Adam, weight_decay=0.0)
    optimizer = FusedAdamW(parameters)
    optimizer.load_state_dict(state)
    assert torch.equal(optimizer.state[parameters[0]]["exp_avg"], state["state"][0]["exp_avg"])


def test_the_seed_of_a_state_replaces_ours_and_other_options_are_named():
    parameters, optimizer = train("bf16", 1, seed=7, max_norm=1.0)
    other = FusedAdamW(parameters, seed=8, max_norm=2.0)
    with pytest.warns(UserWarning, match=r"max_norm 1.0 \(now 2.0\), seed 7 \(now 8\)"):
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.options.seed == 7 and other.options.max_norm == 2.0
    assert "fused_adamw" not in other.param_groups[0]


def test_a_state_that_fails_half_way_changes_nothing():
    parameters, optimizer = train("fp32", 2)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 9.0
    saved["state"][4]["exp_avg"] = torch.zeros(5)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="loaded exp_avg must be"):
        optimizer.load_state_dict(saved)
    assert_same_dicts(before, optimizer.state_dict())
    train("fp32", 1, 2, parameters, optimizer)


@pytest.mark.parametrize("wrong", [(7,), (1, 7), (2, 7), (1,)])
@pytest.mark.parametrize("moments", ["fp32", "bf16", "int8"])
def test_loaded_moments_of_another_shape_are_refused_and_change_nothing(moments, wrong):
    """Tensors of another shape are refused, also those that broadcast to the parameter's."""
    parameters, optimizer = train("fp32", 2, moments=moments)
    _, other = train("fp32", 2)
    saved = copy.deepcopy(other.state_dict())
    saved["state"][0]["exp_avg_sq"] = torch.ones(wrong)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="loaded exp_avg_sq must be"):
        optimizer.load_state_dict(saved)
    assert_same_dicts(before, optimizer.state_dict())


def test_a_state_of_an_unknown_kind_that_fails_changes_nothing():
    _, optimizer = train("fp32", 2)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][4]["exp_avg"] = None
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(AttributeError):
        optimizer.load_state_dict(saved)
    assert_same_dicts(before, optimizer.state_dict())


def test_numbers_of_numpy_are_saved_as_those_of_python():
    parameters = [torch.nn.Parameter(torch.ones(3))]
    optimizer = FusedAdamW(
        parameters, seed=np.int64(3), max_norm=np.float32(0.5), skip_nonfinite=np.bool_(True)
    )
    twin = FusedAdamW(parameters, seed=3, max_norm=0.5, skip_nonfinite=True)
    assert optimizer.state_dict() == twin.state_dict()
    with pytest.raises(TypeError):
        FusedAdamW(parameters, seed=1.5)


def assert_same_dicts(a, b):
    assert a["param_groups"] == b["param_groups"]
    for name, state in a["state"].items():
        assert all(torch.equal(state[key], b["state"][name][key]) for key in state)


def test_departed_parameters_leave_the_state_dict_in_words():
    parameters, optimizer = train("fp32", 1)
    optimizer.param_groups[0]["params"] = parameters[1:]
    with pytest.warns(UserWarning, match=r"in no group, of shapes \[3, 7\]"):
        state = optimizer.state_dict()
    assert len(state["state"]) == len(parameters) - 1
    assert len(optimizer.state) == len(parameters)


def test_a_parameter_put_in_the_place_of_another_does_not_lose_its_state():
    parameters, optimizer = train("fp32", 1)
    new = torch.nn.Parameter(parameters[0].detach().clone())
    optimizer.param_groups[0]["params"] = [new, *parameters[1:]]
    new.grad = torch.ones_like(new)
    with pytest.raises(ValueError, match=r"shape \[3, 7\] was replaced after the first step"):
        optimizer.step()


@BOTH
def test_a_step_with_a_nan_gradient_is_left_out_and_counted(backend):
    parameters, optimizer = train("bf16", 2, backend=backend, skip_nonfinite=True, zero_grad=True)
    before = copy.deepcopy((parameters, optimizer.state_dict()))
    for bad in (float("nan"), float("inf")):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        parameters[3].grad[5, 7] = bad
        optimizer.step()
        assert not any(parameter.grad.any() for parameter in parameters)
    assert all(torch.equal(a, b) for a, b in zip(before[0], parameters, strict=True))
    assert optimizer.num_skipped == 2 and not optimizer.grad_norm.isfinite()
    resumed = FusedAdamW(parameters, skip_nonfinite=True, zero_grad=True)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.num_skipped == 2
    train("bf16", 1, 2, parameters, optimizer)
    assert optimizer.num_skipped == 2 and optimizer.state[parameters[0]]["step"] == 3


def test_float16_parameters_are_refused_in_words():
    with pytest.raises(TypeError, match="got torch.float16, .* load the model in bfloat16"):
        FusedAdamW([torch.nn.Parameter(torch.ones(3, dtype=torch.float16))])


@BOTH
def test_weights_written_by_someone_else_win_over_their_masters_with_one_note(backend):
    parameters, optimizer = train("bf16", 2, backend=backend, master="fp32")
    with torch.no_grad():
        parameters[3].fill_(5.0)
    with pytest.warns(UserWarning, match="weights were written since the last step"):
        train("bf16", 1, 2, parameters, optimizer)
    assert (parameters[3] - 5.0).abs().max() < 0.2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parameters[2].data.fill_(3.0)
        train("bf16", 1, 3, parameters, optimizer)
    assert (parameters[2] - 3.0).abs().max() < 0.2
