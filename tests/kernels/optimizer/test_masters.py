"""Masters of bf16 weights: float32, split in 16 or 8 bits, and weights written by someone else."""

import pytest
import torch
from support.kernels.optimizer_runs import BACKENDS, bits, make_parameters, set_gradients, train

from merit_fast.kernels.optimizer import FusedAdamW, _eager, _ops

BOTH = pytest.mark.parametrize("backend", BACKENDS)


def masters(parameters, optimizer):
    return [
        _eager.full_weight(_eager.flat(p.detach()), _eager.flat(optimizer.state[p]["low_bits"]))
        for p in parameters
    ]


def one_step(backend, weight, low, rounding, key=1):
    """A step of rate 0 and no decay: only the master's rounding is left."""
    count = len(weight)
    moments = [torch.zeros(count), torch.ones(count)]
    _ops.adamw(
        [weight], [torch.ones(count).bfloat16()], moments[:1], moments[1:], [], [low], [], None,
        [0.0, 1.0, 0.0], [key], [0], [1.0, 0.9, 0.999, 1e-8], rounding == "stochastic", False,
        backend,
    )  # fmt: skip


@BOTH
@pytest.mark.parametrize("rounding,units", [("nearest", 0.5), ("stochastic", 1.0)])
def test_an_8_bit_remainder_keeps_24_bits_of_the_master(backend, rounding, units):
    """One step is off by at most this part of the master's 16th significant bit."""
    options = {"backend": backend, "rounding": rounding}
    exact, of_exact = train("bf16", 1, master="fp32", **options)
    ours, of_ours = train("bf16", 1, master="split8", **options)
    for x, y, master in zip(exact, ours, masters(ours, of_ours), strict=True):
        assert of_ours.state[y]["low_bits"].dtype == torch.int8
        truth = of_exact.state[x]["master"].flatten().double()
        unit = torch.exp2(torch.floor(torch.log2(truth.abs())) - 15)
        assert ((master.double() - truth).abs() <= units * unit).all()
        kept = master.view(torch.int32)
        assert not (kept & 0xFF).any()
        nearest = ((kept + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
        assert torch.equal(bits(y.detach().flatten()), bits(nearest))


@BOTH
def test_24_bits_that_nothing_moves_stay(backend):
    """Among them every remainder of 8 bits, the largest numbers, infinities and zeros."""
    numbers = torch.Generator().manual_seed(0)
    raw = torch.randint(-(2**31), 2**31 - 1, (4096,), generator=numbers) & ~0xFF
    edges = [0, 0x100, 0x7F7FFF00, 0x7F800000, 0x7F7F8000, -0x00800000, -0x80000000, 0x00008000]
    raw = torch.cat([raw, torch.tensor(edges)]).to(torch.int32)
    raw = raw[(raw & 0x7FFFFFFF) <= 0x7F800000]
    weight = ((raw + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
    low = (raw >> 8).to(torch.int8)
    assert torch.equal(bits(_eager.full_weight(weight, low)), bits(raw.view(torch.float32)))
    for rounding in ("nearest", "stochastic"):
        one_step(backend, weight, low, rounding)
        assert torch.equal(bits(_eager.full_weight(weight, low)), bits(raw.view(torch.float32)))


@BOTH
def test_a_remainder_rounds_without_bias_and_makes_nothing_infinite(backend):
    """Steps of a tenth of the last kept bit add up: none of them survives rounding to nearest."""
    moved = {}
    for rounding in ("nearest", "stochastic"):
        weight = torch.nn.Parameter(torch.ones(1 << 14, dtype=torch.bfloat16))
        optimizer = FusedAdamW(
            [weight], lr=0.1 * 2.0**-15, master="split8", rounding=rounding, backend=backend
        )
        for _ in range(20):
            weight.grad = -torch.ones_like(weight)
            optimizer.step()
        moved[rounding] = float((masters([weight], optimizer)[0] - 1).double().mean()) / 2**-15
    assert moved["nearest"] == 0
    assert abs(moved["stochastic"] - 2.0) < 0.05
    largest = torch.full((64,), 0x7F7F, dtype=torch.int16).view(torch.bfloat16)
    low = torch.full((64,), 127, dtype=torch.int8)
    for rounding in ("nearest", "stochastic"):
        one_step(backend, largest, low, rounding)
        assert _eager.full_weight(largest, low).isfinite().all()


def test_a_remainder_of_another_width_is_refused():
    parameters, optimizer = train("bf16", 1, master="split")
    with pytest.raises(ValueError, match="low_bits"):
        FusedAdamW(parameters, master="split8").load_state_dict(optimizer.state_dict())


@BOTH
def test_a_weight_written_by_someone_else_becomes_its_master(backend):
    """Element by element: what still is its master rounded keeps all the master's bits."""
    runs = []
    for outside in (False, True):
        parameters, optimizer = train("bf16", 3, master="fp32", backend=backend)
        states = [optimizer.state[p] for p in parameters]
        if outside:
            with torch.no_grad():
                parameters[3][:2] = 5.0
                states[2]["master"][7] = float("nan")
        else:
            with torch.no_grad():
                parameters[3][:2] = 5.0
                states[3]["master"][:2] = 5.0
                states[2]["master"][7] = parameters[2][7].float()
        train("bf16", 2, 3, parameters, optimizer)
        runs.append((parameters, states))
    for a, b in zip(*(run[0] for run in runs), strict=True):
        assert torch.equal(bits(a), bits(b))
    for a, b in zip(*(run[1] for run in runs), strict=True):
        assert torch.equal(bits(a["master"]), bits(b["master"]))


@BOTH
def test_the_op_names_the_tensors_whose_weights_won(backend):
    def won(change):
        weights = [p.detach().flatten() for p in make_parameters("bf16")]
        shadows = make_parameters("bf16")
        set_gradients(shadows, 0)
        grads = [p.grad.flatten() for p in shadows]
        masters = [w.float() + w.float().abs() * 2.0**-12 for w in weights]
        change(weights, masters)
        count = len(weights)
        return _ops.adamw(
            weights, grads, [torch.zeros_like(m) for m in masters],
            [torch.zeros_like(m) for m in masters], [], masters, [], None,
            [1e-3, 1.0, 0.0] * count, [0] * count, [0] * count, [1.0, 0.9, 0.999, 1e-8],
            False, False, backend,
        ).tolist()  # fmt: skip

    def last(weights, masters):
        weights[3][-1] = 9.0

    def broken(weights, masters):
        weights[2][256] = masters[2][256] = float("nan")

    expected = [False] * 6
    assert won(lambda weights, masters: None) == expected
    assert won(broken) == expected
    assert won(last) == [False, False, False, True, False, False]
