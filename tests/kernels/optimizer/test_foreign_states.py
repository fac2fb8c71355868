"""FusedAdamW takes over the states of bitsandbytes' and torchao's AdamW, or refuses in words."""

import copy
import warnings

import pytest
import torch

from merit_fast.kernels.optimizer import FusedAdamW

WRAPPED = "__bnb_optimizer_quant_state__"
SHAPES = ((20, 300), (7,))  # 6000 elements: 23.4 blocks


def parameters_of(dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]


def codes_of(shape, signed, block, seed):
    """A moment in bitsandbytes' form, and its values, one element after the other."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel()
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    qmap = torch.linspace(-1.0 if signed else 0.0, 1.0, 256)
    absmax = torch.rand(-(-count // block), generator=generator)
    values = torch.tensor(
        [qmap[int(code)] * absmax[i // block] for i, code in enumerate(codes.flatten())]
    )
    return {"state": codes, "qmap": qmap, "absmax": absmax}, values.view(shape)


def saved_by_bitsandbytes(block=256, wrapped=True, **group):
    """A state dict with one parameter of 8 bits and one, a small one, of 32."""
    first, exp_avg = codes_of(SHAPES[0], True, block, 1)
    second, exp_avg_sq = codes_of(SHAPES[0], False, block, 2)
    tensors = {f"{key}1": value for key, value in first.items()}
    tensors |= {f"{key}2": value for key, value in second.items()}
    small = {"state1": torch.full(SHAPES[1], 0.5), "state2": torch.full(SHAPES[1], 0.25)}
    states = {
        number: {"step": 9, WRAPPED: each} if wrapped else {"step": 9, **each}
        for number, each in enumerate((tensors, small))
    }
    options = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    own = {"alpha": 0.0, "t_alpha": None, "t_beta3": None, "params": [0, 1]}
    document = {"state": states, "param_groups": [{**options, **own, **group}]}
    moments = [(exp_avg, exp_avg_sq), (small["state1"], small["state2"])]
    return document, moments


@pytest.mark.parametrize("block, wrapped", [(256, True), (256, False), (2048, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_of_bitsandbytes_are_its_own_values_to_the_bit(block, wrapped, dtype):
    document, moments = saved_by_bitsandbytes(block, wrapped)
    kept = copy.deepcopy(document)
    parameters = parameters_of(dtype)
    optimizer = FusedAdamW(parameters)
    optimizer.load_state_dict(document)
    for parameter, pair in zip(parameters, moments, strict=True):
        state = optimizer.state[parameter]
        assert state["step"] == 9
        assert torch.equal(state["exp_avg"], pair[0]) and state["exp_avg"].dtype == torch.float32
        assert torch.equal(state["exp_avg_sq"], pair[1])
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-3, (0.9, 0.95), 0.1)
    assert document["state"].keys() == kept["state"].keys()  # the caller's dict stays
    assert document["state"][0].keys() == kept["state"][0].keys()


def test_the_next_step_is_that_of_torchs_adamw_with_these_moments():
    document, moments = saved_by_bitsandbytes()
    runs = []
    for make in (FusedAdamW, torch.optim.AdamW):
        parameters = parameters_of()
        optimizer = make(parameters)
        if make is FusedAdamW:
            optimizer.load_state_dict(copy.deepcopy(document))  # its tensors are updated in place
        else:
            theirs = copy.deepcopy(optimizer.state_dict())
            pairs = [dict(zip(("exp_avg", "exp_avg_sq"), pair, strict=True)) for pair in moments]
            theirs["state"] = {k: {"step": torch.tensor(9.0), **pairs[k]} for k in (0, 1)}
            theirs["param_groups"][0] |= {"betas": (0.9, 0.95), "weight_decay": 0.1}
            optimizer.load_state_dict(theirs)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        runs.append(parameters)
    for mine, other in zip(*runs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


def test_8_bit_moments_are_encoded_again_in_our_form():
    document, moments = saved_by_bitsandbytes()
    parameters = parameters_of()
    optimizer = FusedAdamW(parameters, moments="int8")
    optimizer.load_state_dict(document)
    state = optimizer.state[parameters[0]]
    assert state["exp_avg"].dtype == torch.int8 and state["exp_avg_sq"].dtype == torch.uint8
    plain = {"step": torch.tensor(9.0), "exp_avg": moments[0][0], "exp_avg_sq": moments[0][1]}
    twin = FusedAdamW(parameters, moments="int8")
    states = {**twin.state_dict(), "state": {0: plain}}
    twin.load_state_dict(states)
    for key in ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale"):
        assert torch.equal(state[key], twin.state[parameters[0]][key])


def changed(**values):
    """A change of the first parameter's tensors; None removes one."""

    def change(document):
        tensors = document["state"][0][WRAPPED]
        for key, value in values.items():
            tensors[key] = value
            if value is None:
                del tensors[key]

    return change


def of_ademamix(document):
    document["param_groups"][0]["alpha"] = 5.0


REFUSED = {
    "of one moment": (changed(state2=None), "not of its Adam: missing state2; unknown nothing"),
    "LAMB": (changed(unorm_vec=torch.zeros(1)), "missing nothing; unknown unorm_vec"),
    "not by blocks": (changed(max1=torch.zeros(1)), "missing nothing; unknown max1"),
    "AdEMAMix": (of_ademamix, r"is of AdEMAMix \(alpha=5.0\)"),
    "other codes": (changed(state1=torch.zeros(20, 300, dtype=torch.int8)), "uint8 or float32, is"),
    "other shape": (changed(state1=torch.zeros(300, 20)), r"state1 must be contiguous \[20, 300\]"),
    "transposed": (changed(state2=torch.zeros(300, 20).T), "is not contiguous torch.float32"),
    "no map": (changed(qmap2=None), r"qmap2 must be \[256\], is nothing"),
    "other blocks": (changed(absmax1=torch.ones(12)), r"absmax1 must be \[24 or 3\], is .* \[12\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_forms_are_refused_in_words_and_change_nothing(name):
    change, words = REFUSED[name]
    document, _ = saved_by_bitsandbytes()
    change(document)
    optimizer = FusedAdamW(parameters_of(), lr=3.0)
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(document)
    assert not optimizer.state and optimizer.param_groups[0]["lr"] == 3.0


class Codes(torch.Tensor):
    """Stands in for torchao's OptimState8bit: float16 values that decode themselves."""

    def dequantize(self, output_dtype=None):
        return 3.0 * self.as_subclass(torch.Tensor).float()


def test_tensors_that_decode_themselves_are_taken_by_their_own_word():
    values = torch.rand(SHAPES[0]).half()
    state = {"step": torch.tensor(4.0), "exp_avg": -values.as_subclass(Codes)}
    state["exp_avg_sq"] = values.as_subclass(Codes)
    group = {"lr": torch.tensor(0.25), "betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False}
    document = {"state": {0: state}, "param_groups": [{**group, "params": [0, 1]}]}
    document["param_groups"][0]["weight_decay"] = 0.1
    parameters = parameters_of()
    optimizer = FusedAdamW(parameters)
    with pytest.warns(UserWarning, match="does not tell AdamW from Adam; its weight decay of 0.1"):
        optimizer.load_state_dict(document)
    loaded = optimizer.state[parameters[0]]
    assert torch.equal(loaded["exp_avg"], -3.0 * values.float())
    assert torch.equal(loaded["exp_avg_sq"], 3.0 * values.float())
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert type(optimizer.param_groups[0]["lr"]) is float
    document["param_groups"][0]["weight_decay"] = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(document)


def stepped(optimizer, parameters, steps=3):
    for step in range(steps):
        torch.manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


def test_the_installed_bitsandbytes_gives_its_own_moments():
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    parameters = parameters_of()
    theirs = bnb.optim.AdamW8bit(parameters, weight_decay=0.1)
    stepped(theirs, parameters)
    optimizer = FusedAdamW(parameters)
    optimizer.load_state_dict(theirs.state_dict())
    for parameter in parameters:
        state = theirs.state[parameter]
        for number, key in ((1, "exp_avg"), (2, "exp_avg_sq")):
            truth = state[f"state{number}"]
            if truth.dtype == torch.uint8:
                truth = bnb.functional.dequantize_blockwise(
                    truth,
                    absmax=state[f"absmax{number}"],
                    code=state[f"qmap{number}"],
                    blocksize=256,
                )
            assert torch.equal(optimizer.state[parameter][key], truth)
    assert theirs.state[parameters[0]]["state1"].dtype == torch.uint8


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_the_installed_torchao_gives_its_own_moments(name):
    optim = pytest.importorskip("torchao.optim", reason="torchao is not installed")
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(16, 512)), torch.nn.Parameter(torch.randn(7))]
    theirs = getattr(optim, name)(parameters, weight_decay=0.0)
    for parameter in parameters:  # its step needs a compiler
        theirs.state[parameter] = {
            "step": torch.tensor(2.0),
            "exp_avg": theirs._new_buffer(parameter, True),
            "exp_avg_sq": theirs._new_buffer(parameter, False),
        }
        theirs.state[parameter]["exp_avg"].copy_(torch.randn_like(parameter))
        theirs.state[parameter]["exp_avg_sq"].copy_(torch.rand_like(parameter))
    optimizer = FusedAdamW(parameters)
    optimizer.load_state_dict(theirs.state_dict())
    for parameter in parameters:
        for key in ("exp_avg", "exp_avg_sq"):
            truth = theirs.state[parameter][key]
            truth = truth.dequantize() if parameter.numel() >= 4096 else truth
            assert torch.equal(optimizer.state[parameter][key], truth.float())
