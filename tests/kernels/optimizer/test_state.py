"""FusedAdamW's states: exact resume, loading from torch and into it, refusals."""

import copy

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
def test_torch_goes_on_from_our_state_and_we_from_torchs(backend):
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
    eight.load_state_dict(state)
    back = FusedAdamW(parameters, moments="fp32")
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
