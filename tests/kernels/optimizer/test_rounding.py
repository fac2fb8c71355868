"""FusedAdamW's rounding: stochastic bf16, 8-bit moments, masters in two halves."""

import pytest
import torch
from support.kernels.optimizer_runs import BACKENDS, bits, make_parameters, train
from torch.nn import functional as F

from merit_fast.kernels.optimizer import _eager, _ops

BOTH = pytest.mark.parametrize("backend", BACKENDS)


def test_stochastic_rounding_is_unbiased_exact_where_it_can_be_and_never_infinite():
    count = 1 << 17
    draws = _eager.random_bits(count, 12345)[0] >> 16
    values = torch.tensor([1.0 + 2.0**-9, -3.1415927, 1e-3, 1e-40, 0.3])
    for value in values:
        rounded = _eager.stochastic_bf16(value.expand(count).contiguous(), draws).double()
        below = rounded.min()
        above = rounded.max()
        gap = float(above - below)
        assert below < value.double() < above and rounded.unique().numel() == 2
        assert abs(float(rounded.mean() - value.double())) < 4 * gap * 0.5 / count**0.5
    kept = torch.tensor(
        [0.0, -0.0, 1.5, -256.0, float("inf"), -float("inf"), float("nan"), 2.0**-133]
    )
    for draw in (0, 1, 0x7FFF, 0xFFFF):
        assert torch.equal(
            bits(_eager.stochastic_bf16(kept, torch.full((8,), draw))), bits(kept.bfloat16())
        )
    largest = torch.full((2,), torch.finfo(torch.float32).max) * torch.tensor([1.0, -1.0])
    assert _eager.stochastic_bf16(largest, torch.tensor([0xFFFF, 0xFFFF])).isfinite().all()


@BOTH
def test_8_bit_moments_stay_near_what_they_stand_for(backend):
    (exact, of_exact), (ours, of_ours) = (
        train("fp32", 20, backend=backend, moments=m) for m in ("fp32", "int8")
    )
    start = make_parameters("fp32")
    for a, b, s in zip(exact, ours, start, strict=True):
        if a.numel() < 100:
            continue
        state = of_ours.state[b]
        for name, second in (("exp_avg", False), ("exp_avg_sq", True)):
            assert state[name].itemsize == 1 and state[f"{name}_scale"].numel() == -(
                -a.numel() // 256
            )
            codes = state[name].flatten()
            plain = _eager.decoded(codes, state[f"{name}_scale"], second=second)
            truth = of_exact.state[a][name].flatten()
            assert (plain - truth).norm() < 0.05 * truth.norm()
        assert (a - b).norm() < 0.1 * (a - s).norm()


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the native kernels were not built")
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e-12, 1.0, 1e15])
def test_8_bit_codes_have_the_bits_of_the_definition_at_every_size(size, rounding):
    """Blocks of all sizes, with zeros, tiny and huge neighbours, and lengths of no whole block."""
    spread = torch.randn(3000, generator=torch.Generator().manual_seed(1)) * size
    spread[::7] = 0.0
    spread[1::11] *= 1e-6
    spread[700:720] *= 1e4
    gradients = [spread, spread[:333], spread[:7], torch.zeros(300)]
    runs = [
        train("fp32", 4, gradients=gradients, backend=b, moments="int8", rounding=rounding)
        for b in ("eager", "cpu")
    ]
    for ours, theirs in zip(*(parameters for parameters, _ in runs), strict=True):
        states = [
            optimizer.state[p] for p, (_, optimizer) in zip((ours, theirs), runs, strict=True)
        ]
        assert torch.equal(bits(ours.detach()), bits(theirs.detach()))
        for name in ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale"):
            assert torch.equal(bits(states[0][name]), bits(states[1][name])), name


@pytest.mark.parametrize("second", [False, True], ids=["m", "v"])
def test_8_bit_codes_are_neighbours_and_their_mean_over_all_draws_is_the_value(second):
    """The mean is a second moment's up to 0.1 / k^2 of the step from code k to the next one."""
    power, steps, dtype = (4, 255, torch.uint8) if second else (2, 127, torch.int8)
    draws = torch.arange(1 << 16) << 16
    low = torch.tensor([0, 1, 2, 5, 30, 70, 125, steps - 1], dtype=torch.float64)
    for share in (0.0, 1e-3, 0.02, 0.3, 0.5, 0.9, 0.999):
        gaps = ((low + 1) ** power - low**power) / steps**power
        for k, gap in zip(low.tolist(), gaps.tolist(), strict=True):
            if second and k == 0:
                continue  # a value above zero never rounds to zero
            value = torch.tensor((k / steps) ** power + share * gap).float()
            blocks = torch.cat([value.expand(len(draws)).view(-1, 128), torch.zeros(512, 128)], 1)
            blocks[:, 128] = 1.0
            random = F.pad(draws.view(-1, 128), (0, 128)).flatten()
            codes = torch.empty(blocks.numel(), dtype=dtype)
            _eager.encode(blocks.flatten(), codes, torch.empty(512), second=second, bits=random)
            codes = codes.view(512, 256)[:, :128].double()
            assert set(codes.unique().tolist()) <= {k, k + 1}, (k, share)
            error = float(((codes / steps) ** power).mean()) - float(value)
            bound = 2.0**-14 + (0.1 / k**2 if second else 0.0)
            assert abs(error) <= bound * gap, (k, share, error / gap)


@pytest.mark.parametrize("second", [False, True], ids=["m", "v"])
def test_8_bit_codes_without_draws_are_the_nearest(second):
    power, steps, dtype = (4, 255, torch.uint8) if second else (2, 127, torch.int8)
    share = torch.rand(4096, generator=torch.Generator().manual_seed(0)) * 0.99 + 0.01
    values = share**power
    values[::256] = 1.0
    codes = torch.empty(4096, dtype=dtype)
    scale = torch.empty(16)
    _eager.encode(values, codes, scale, second=second, bits=None)
    grid = (torch.arange(steps + 1).double() / steps) ** power
    errors = ((codes.double() / steps) ** power - values.double()).abs()
    nearest = (grid[None] - values.double()[:, None]).abs().amin(1)
    gap = grid[codes.long()] - grid[(codes.long() - 1).clamp(min=0)]
    assert ((errors - nearest) <= 0.05 / codes.double().clamp(min=1) * gap + 1e-12).all()
    assert (scale == 1).all()


def test_a_tiny_second_moment_next_to_a_large_one_never_becomes_zero():
    values = torch.rand(256) * 1e-14
    values[3] = 1.0
    values[5] = 0.0
    codes = torch.empty(256, dtype=torch.uint8)
    scale = torch.empty(1)
    for draw in (None, 0, 0x7FFF0000, 0x80000000, 0xFFFFFFFF):
        random = None if draw is None else torch.full((256,), draw)
        _eager.encode(values, codes, scale, second=True, bits=random)
        assert (codes > 0).sum() == 255 and codes[5] == 0
        assert codes[3] == 255 or (draw is not None and codes[3] == 254)


@BOTH
def test_a_split_master_is_the_fp32_master_bit_for_bit(backend):
    (a, of_a), (b, of_b) = (train("bf16", 10, backend=backend, master=m) for m in ("fp32", "split"))
    for x, y in zip(a, b, strict=True):
        master = of_a.state[x]["master"]
        assert torch.equal(
            _eager.full_weight(y.detach().flatten(), of_b.state[y]["low_bits"].flatten()),
            master.flatten(),
        )
        assert torch.equal(x, master.bfloat16())
        ties = master.view(torch.int32) & 0xFFFF == 0x8000
        assert torch.equal(x[~ties], y[~ties])


@pytest.mark.parametrize(
    "raw", [0x3F808000, 0x3F818000, 0x3F807FFF, 0x7F7FFFFF, 0x7F800000, -0x00400001, 0x00018000]
)
def test_16_bits_tell_every_master_of_a_weight(raw):
    weight = torch.empty(1, dtype=torch.bfloat16)
    low = torch.empty(1, dtype=torch.int16)
    master = torch.tensor([raw], dtype=torch.int32).view(torch.float32)
    _eager._store_weight(master, weight, low, None)
    back = _eager.full_weight(weight, low)
    assert torch.equal(bits(back), bits(master)) and bool(weight.isnan()) == bool(master.isnan())


def split_in_two(tensors, at):
    """The tensors of one parameter, cut at an element into two."""
    return [part for tensor in tensors for part in (tensor[:at], tensor[at:])]


@BOTH
@pytest.mark.parametrize("first", [0, 2**32 - 300, 2**40 + 5])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
def test_two_parts_of_a_parameter_round_as_the_whole_one(backend, kind, first):
    """A part says where it begins; also across the elements whose index needs 33 bits."""
    size, at = 1500, 512
    numbers = torch.Generator().manual_seed(3)

    def tensors():
        numbers.manual_seed(3)
        weight = torch.randn(size, generator=numbers).bfloat16()
        grad = torch.randn(size, generator=numbers).bfloat16()
        if kind == "int8":
            codes = [torch.zeros(size, dtype=dtype) for dtype in (torch.int8, torch.uint8)]
            return [[weight], [grad], [codes[0]], [codes[1]]], [torch.zeros(6), torch.zeros(6)]
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[kind]
        return [
            [weight],
            [grad],
            [torch.zeros(size, dtype=dtype)],
            [torch.zeros(size, dtype=dtype)],
        ], []

    def update(columns, scales, firsts):
        count = len(firsts)
        _ops.adamw(
            *columns, scales, [], [], None, [1e-3, 1.0, 0.0] * count, [77] * count, firsts,
            [0.999, 0.9, 0.999, 1e-8], True, False, backend,
        )  # fmt: skip

    whole, whole_scales = tensors()
    update(whole, whole_scales, [first])
    parts, scales = tensors()
    halves = [split_in_two(column, at) for column in parts]
    update(halves, split_in_two(scales, at // 256), [first, first + at])
    moved, moved_scales = tensors()
    update(moved, moved_scales, [first + 1])
    for column, other in zip(whole, parts, strict=True):
        assert torch.equal(bits(column[0]), bits(other[0]))
    assert not torch.equal(whole[0][0], moved[0][0])
