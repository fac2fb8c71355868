"""FusedAdamW: against torch and float64, rounding, states that load both ways, exact resume, odd inputs."""

import copy
import itertools

import pytest
import torch
from checks import run_at_level
from optimizer_runs import SETTINGS, assert_same_run, bits, make_parameters, set_gradients, train

from merit_fast.kernels import dispatch
from merit_fast.kernels.optimizer import FusedAdamW, _eager

BACKENDS = ["eager"] + (["cpu"] if dispatch.native_module() is not None else [])
BOTH = pytest.mark.parametrize("backend", BACKENDS)
native = pytest.mark.skipif("cpu" not in BACKENDS, reason="the native kernels were not built")
# Every option at least once with every other kind it meets in the kernel.
OPTIONS = [
    ("fp32", {}),
    ("fp32", {"moments": "bf16", "average_decay": "mean", "zero_grad": True, "betas": (0.3, 0.9)}),
    ("fp32", {"moments": "int8", "max_norm": 1.0, "average_decay": 0.9}),
    ("fp32", {"moments": "int8", "rounding": "nearest"}),
    ("bf16", {"average_decay": 0.9, "max_norm": 0.1}),
    ("bf16", {"rounding": "nearest", "moments": "bf16"}),
    ("bf16", {"moments": "bf16", "zero_grad": True}),
    ("bf16", {"moments": "int8", "average_decay": "mean"}),
    ("bf16", {"master": "fp32", "moments": "int8", "zero_grad": True}),
    ("bf16", {"master": "split", "average_decay": 0.5, "max_norm": 1.0}),
    ("bf16", {"master": "split", "moments": "bf16", "rounding": "nearest"}),
]
EVERY = pytest.mark.parametrize("dtype,options", OPTIONS, ids=str)


def errors(parameters, truth):
    return [float((a.double() - b).norm()) for a, b in zip(parameters, truth, strict=True) if a.numel()]


def in_double(steps, **options):
    """torch's AdamW in float64 from the same numbers."""
    parameters = [torch.nn.Parameter(p.detach().double()) for p in make_parameters("fp32")]
    optimizer = torch.optim.AdamW(parameters, **{**SETTINGS, **options})
    shadows = make_parameters("fp32")
    for step in range(steps):
        set_gradients(shadows, step)
        for parameter, shadow in zip(parameters, shadows, strict=True):
            parameter.grad = shadow.grad.double()
        optimizer.step()
    return [p.detach() for p in parameters]


@native
@EVERY
def test_the_native_kernel_gives_the_bits_of_eager(dtype, options):
    exact = "max_norm" not in options  # sums of another order
    assert_same_run(train(dtype, backend="cpu", **options), train(dtype, backend="eager", **options), exact)


@BOTH
@pytest.mark.parametrize(
    "options", [{}, {"betas": (0.0, 0.99)}, {"betas": (0.3, 0.5), "eps": 1e-4, "lr": 0.1}], ids=str
)
def test_twenty_fp32_steps_are_no_further_from_float64_than_torchs(backend, options):
    truth = in_double(20, **options)
    ours, _ = train("fp32", 20, backend=backend, **options)
    torchs, _ = train("fp32", 20, make=torch.optim.AdamW, fused=True, **options)
    floor = [2e-7 * float(t.norm()) for t in truth if t.numel()]
    for mine, theirs, rest in zip(errors(ours, truth), errors(torchs, truth), floor, strict=True):
        assert mine <= theirs + rest


@BOTH
@pytest.mark.parametrize("dtype,options", [
    ("bf16", {"rounding": "nearest", "moments": "bf16"}),
    ("bf16", {"rounding": "nearest"}),
    ("bf16", {"master": "fp32"}),
    ("bf16", {"master": "split"}),
], ids=str)  # fmt: skip
def test_one_bf16_step_is_no_further_from_float64_than_torchs(backend, dtype, options):
    ours, _ = train(dtype, 1, backend=backend, **options)
    torchs, _ = train(dtype, 1, make=torch.optim.AdamW, fused=True)
    exact = [torch.nn.Parameter(p.detach().double()) for p in make_parameters(dtype)]
    shadows = make_parameters(dtype)
    set_gradients(shadows, 0)
    for parameter, shadow in zip(exact, shadows, strict=True):
        parameter.grad = shadow.grad.double()
    torch.optim.AdamW(exact, **SETTINGS).step()
    for mine, theirs in zip(errors(ours, exact), errors(torchs, exact), strict=True):
        assert mine <= theirs * 1.001


@BOTH
@pytest.mark.parametrize("options,share", [
    ({}, 1.0), ({"moments": "bf16"}, 1.0), ({"moments": "int8"}, 1.0), ({"master": "fp32"}, 1.0), ({"master": "split"}, 1.0),
    ({"rounding": "nearest"}, None),
], ids=str)  # fmt: skip
def test_twenty_steps_of_lr_1e_5_move_bf16_weights_as_they_move_fp32(backend, options, share):
    torch.manual_seed(1)
    weight = torch.nn.Parameter((torch.randn(256, 256) * 0.02).bfloat16())
    start = weight.detach().double()
    optimizer = FusedAdamW([weight], lr=1e-5, backend=backend, **options)
    for _ in range(20):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    state = optimizer.state[weight]
    end = _eager.full_weight(weight.detach(), state.get("master", state.get("low_bits")))
    move = float((start - end.double()).mean()) / 2e-4
    assert move < 0.5 if share is None else abs(move - share) < 0.02


def test_stochastic_rounding_is_unbiased_exact_where_it_can_be_and_never_infinite():
    count = 1 << 17
    draws = _eager.random_bits(count, 12345, 678) >> 16
    values = torch.tensor([1.0 + 2.0**-9, -3.1415927, 1e-3, 1e-40, 0.3])
    for value in values:
        rounded = _eager.stochastic_bf16(value.expand(count).contiguous(), draws).double()
        below, above = rounded.min(), rounded.max()
        gap = float(above - below)
        assert below < value.double() < above and rounded.unique().numel() == 2
        assert abs(float(rounded.mean() - value.double())) < 4 * gap * 0.5 / count**0.5
    kept = torch.tensor([0.0, -0.0, 1.5, -256.0, float("inf"), -float("inf"), float("nan"), 2.0**-133])
    for draw in (0, 1, 0x7FFF, 0xFFFF):
        assert torch.equal(bits(_eager.stochastic_bf16(kept, torch.full((8,), draw))), bits(kept.bfloat16()))
    largest = torch.full((2,), torch.finfo(torch.float32).max) * torch.tensor([1.0, -1.0])
    assert _eager.stochastic_bf16(largest, torch.tensor([0xFFFF, 0xFFFF])).isfinite().all()


def test_random_bits_are_even_and_differ_by_element_and_key():
    streams = [_eager.random_bits(1 << 15, *keys) for keys in ((1, 2), (1, 3), (2, 2))]
    for a, b in itertools.combinations(streams, 2):
        assert (a == b).sum() < 5
    assert len(streams[0].unique()) == 1 << 15
    for stream in streams:
        ones = torch.stack([(stream >> k & 1).double().mean() for k in range(32)])
        assert (ones - 0.5).abs().max() < 5 * 0.5 / (1 << 15) ** 0.5


@BOTH
def test_another_seed_rounds_differently_and_the_same_seed_alike(backend):
    runs = [train("bf16", backend=backend, seed=seed)[0] for seed in (0, 0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not torch.equal(runs[0][3], runs[2][3])


@BOTH
def test_8_bit_moments_stay_near_what_they_stand_for(backend):
    (exact, of_exact), (ours, of_ours) = (train("fp32", 20, backend=backend, moments=m) for m in ("fp32", "int8"))
    start = make_parameters("fp32")
    for a, b, s in zip(exact, ours, start, strict=True):
        if a.numel() < 100:
            continue
        state = of_ours.state[b]
        for name, second in (("exp_avg", False), ("exp_avg_sq", True)):
            assert state[name].itemsize == 1 and state[f"{name}_scale"].numel() == -(-a.numel() // 256)
            plain = _eager.decoded(state[name], state[f"{name}_scale"], second=second)
            truth = of_exact.state[a][name].flatten()
            assert (plain - truth).norm() < 0.05 * truth.norm()
        assert (a - b).norm() < 0.1 * (a - s).norm()


def test_a_tiny_second_moment_beside_a_large_one_never_becomes_zero():
    values = torch.rand(256) * 1e-14
    values[3], values[5] = 1.0, 0.0
    codes, scale = torch.empty(256, dtype=torch.uint8), torch.empty(1)
    for random in (None, torch.zeros(256, dtype=torch.int64), torch.full((256,), 0xFFFF)):
        _eager.encode(values, codes, scale, second=True, bits=random)
        assert (codes > 0).sum() == 255 and codes[5] == 0 and codes[3] == 255


@BOTH
def test_a_split_master_is_the_fp32_master_bit_for_bit(backend):
    (a, of_a), (b, of_b) = (train("bf16", 10, backend=backend, master=m) for m in ("fp32", "split"))
    for x, y in zip(a, b, strict=True):
        master = of_a.state[x]["master"]
        assert torch.equal(
            _eager.full_weight(y.detach().flatten(), of_b.state[y]["low_bits"].flatten()), master.flatten()
        )
        assert torch.equal(x, master.bfloat16())
        ties = master.view(torch.int32) & 0xFFFF == 0x8000
        assert torch.equal(x[~ties], y[~ties])


@pytest.mark.parametrize("raw", [0x3F808000, 0x3F818000, 0x3F807FFF, 0x7F7FFFFF, 0x7F800000, -0x00400001, 0x00018000])
def test_16_bits_tell_every_master_of_a_weight(raw):
    weight, low = torch.empty(1, dtype=torch.bfloat16), torch.empty(1, dtype=torch.int16)
    master = torch.tensor([raw], dtype=torch.int32).view(torch.float32)
    _eager._store_weight(master, weight, low, None)
    back = _eager.full_weight(weight, low)
    assert torch.equal(bits(back), bits(master)) and bool(weight.isnan()) == bool(master.isnan())


@BOTH
@pytest.mark.parametrize("max_norm", [0.5, 1e6, float("inf")])
def test_a_clip_is_clip_grad_norm_then_a_step(backend, max_norm):
    ours, optimizer = train("fp32", 5, backend=backend, max_norm=max_norm)
    theirs = make_parameters("fp32")
    reference = torch.optim.AdamW(theirs, **SETTINGS)
    for step in range(5):
        set_gradients(theirs, step)
        norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        reference.step()
    assert optimizer.grad_norm.dtype == torch.float64
    assert float(optimizer.grad_norm) == pytest.approx(float(norm), rel=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


@BOTH
@pytest.mark.parametrize("decay", [0.0, 0.75, "mean"])
def test_the_average_is_that_of_all_weights_so_far(backend, decay):
    parameters, optimizer = train("bf16", 1, backend=backend, average_decay=decay)
    expected, count = [p.detach().double() for p in parameters], 1
    for step in range(1, 6):
        train("bf16", 1, step, parameters, optimizer)
        share = 1 / (count + 1) if decay == "mean" else 1 - decay
        expected = [e + (p.detach().double() - e) * share for e, p in zip(expected, parameters, strict=True)]
        count += 1
    for parameter, truth in zip(parameters, expected, strict=True):
        average = optimizer.state[parameter]["average"]
        assert average.dtype == torch.float32 and torch.allclose(average.double(), truth, rtol=1e-6, atol=1e-8)


@BOTH
@pytest.mark.parametrize("zero_grad", [False, True])
def test_gradients_are_zeroed_in_place_or_left(backend, zero_grad):
    parameters, _ = train("bf16", 1, backend=backend, zero_grad=zero_grad, max_norm=0.1)
    fresh = make_parameters("bf16")
    set_gradients(fresh, 0)
    for parameter, untouched in zip(parameters, fresh, strict=True):
        expected = torch.zeros_like(untouched) if zero_grad else untouched.grad
        assert torch.equal(parameter.grad, expected)


@native
def test_results_do_not_depend_on_threads():
    before = torch.get_num_threads()
    runs = []
    gradients = [torch.randn(50_001), torch.randn(16_384), torch.randn(33)]
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        runs.append(train("bf16", gradients=gradients, moments="int8", max_norm=1.0, average_decay=0.9))
    torch.set_num_threads(before)
    assert_same_run(runs[0], runs[1])
    assert_same_run(runs[0], runs[2])


@native
def test_every_level_gives_the_same_bits(native_levels):
    script = f"""
import sys; sys.path.insert(0, {str(__file__.rpartition("/")[0])!r})
import hashlib, torch
from optimizer_runs import bits, train
digest = hashlib.sha256()
for dtype, options in (("fp32", {{}}), ("bf16", {{"moments": "int8", "max_norm": 0.1}}), ("bf16", {{"moments": "bf16"}}),
                       ("bf16", {{"master": "split", "average_decay": 0.9}}), ("bf16", {{"rounding": "nearest"}})):
    parameters, optimizer = train(dtype, backend="cpu", **options)
    for p in parameters:
        for value in (p, *optimizer.state[p].values()):
            if torch.is_tensor(value):
                digest.update(bits(value.detach()).contiguous().numpy().tobytes())
print(digest.hexdigest())
"""
    assert len({run_at_level(script, level) for level in native_levels if level != "avx512_bf16"}) == 1


@BOTH
def test_schedulers_and_groups_have_their_own_rates(backend):
    results = []
    for make in (FusedAdamW, torch.optim.AdamW):
        parameters = make_parameters("fp32")
        groups = [
            {"params": parameters[:2], "weight_decay": 0.3},
            {"params": parameters[2:], "lr": 0.1, "betas": (0.5, 0.9)},
        ]
        extra = {"backend": backend} if make is FusedAdamW else {}
        optimizer = make(groups, **SETTINGS, **extra)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for step in range(6):
            set_gradients(parameters, step)
            optimizer.step()
            schedule.step()
        results.append(parameters)
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


@BOTH
def test_step_returns_the_closures_loss_and_skips_parameters_without_gradient(backend):
    used, unused = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = FusedAdamW([used, unused], lr=0.1, backend=backend)

    def closure():
        loss = (used**2).sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure)) == 3.0
    assert torch.allclose(used, torch.full((3,), 0.9)) and torch.equal(unused, torch.ones(3))
    assert unused not in optimizer.state
    FusedAdamW([unused], max_norm=1.0, backend=backend).step()  # no gradient at all


@EVERY
@BOTH
def test_a_resumed_run_gives_the_bits_of_an_unbroken_one(backend, dtype, options, tmp_path):
    whole = train(dtype, 6, backend=backend, **options)
    parameters, optimizer = train(dtype, 3, backend=backend, **options)
    torch.save({"model": [p.detach() for p in parameters], "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
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
        assert eight.state[p]["exp_avg"].dtype == torch.int8 and back.state[p]["exp_avg"].dtype == torch.float32
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


LAYOUTS = {
    "transposed": lambda: torch.randn(20, 30).t(),
    "channels last": lambda: torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last),
    "with gaps": lambda: torch.randn(20, 60)[:, ::2],
    "a view of a larger buffer": lambda: torch.randn(1000)[37:137].view(10, 10),
}


@BOTH
@pytest.mark.parametrize("options", [{}, {"moments": "int8", "zero_grad": True, "max_norm": 1.0}], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("same", [True, False], ids=["grad alike", "grad contiguous"])
def test_any_layout_of_weights_and_gradients(backend, layout, options, same):
    weight = torch.nn.Parameter(LAYOUTS[layout]())
    plain = torch.nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    ours = FusedAdamW([weight], lr=1e-2, backend=backend, **options)
    reference = torch.optim.AdamW([plain], lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        gradient = torch.randn(weight.shape)
        weight.grad = torch.empty_like(weight).copy_(gradient) if same else gradient.clone()
        plain.grad = gradient
        if "max_norm" in options:
            torch.nn.utils.clip_grad_norm_([plain], 1.0)
        ours.step()
        reference.step()
        assert not options or not weight.grad.any()
    limit = 0.1 if "moments" in options else 1e-5
    assert (weight - plain).norm() <= limit * 3e-2 * plain.numel() ** 0.5


@BOTH
def test_flat_buffers_may_hold_many_parameters_but_none_may_overlap(backend):
    buffer = torch.randn(100)
    parts = [torch.nn.Parameter(buffer[:40]), torch.nn.Parameter(buffer[40:])]
    optimizer = FusedAdamW(parts, lr=0.1, backend=backend)
    for part in parts:
        part.grad = torch.ones_like(part)
    before = buffer.clone()
    optimizer.step()
    assert torch.allclose(buffer, before - 0.1)
    with pytest.raises(ValueError, match="must not overlap in memory"):
        FusedAdamW([torch.nn.Parameter(buffer[:40]), torch.nn.Parameter(buffer[30:])])


@BOTH
def test_a_step_counts_as_a_change_for_autograd(backend):
    weight = torch.nn.Parameter(torch.ones(3))
    loss = (weight * weight).sum()
    weight.grad = torch.ones(3)
    FusedAdamW([weight], backend=backend).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_wrong_arguments_are_refused_by_name():
    weight = torch.nn.Parameter(torch.ones(3))
    for options, words in (
        ({"lr": -1.0}, "lr must be at least 0, got -1.0"),
        ({"betas": (1.0, 0.9)}, "betas must be from 0 to below 1"),
        ({"rounding": "up"}, "rounding must be one of stochastic, nearest, got 'up'"),
        ({"master": "bf16"}, "master must be one of none, fp32, split"),
        ({"moments": "fp8"}, "moments must be one of fp32, bf16, int8"),
        ({"average_decay": 1.0}, "average_decay must be None, 'mean' or from 0 to below 1, got 1.0"),
        ({"max_norm": -1.0}, "max_norm must be at least 0"),
    ):
        with pytest.raises(ValueError, match=words):
            FusedAdamW([weight], **options)
    for dtype in (torch.complex64, torch.float16, torch.float64):
        with pytest.raises(TypeError, match="parameters must be float32 or bfloat16"):
            FusedAdamW([torch.nn.Parameter(torch.ones(3, dtype=dtype))])
    weight.grad = torch.ones(3).to_sparse()
    with pytest.raises(ValueError, match=r"gradients must be dense, got torch.sparse_coo of shape \[3\]"):
        FusedAdamW([weight]).step()
    with pytest.raises(dispatch.BackendUnavailableError, match="adamw: backend 'triton'"):
        weight.grad = torch.ones(3)
        FusedAdamW([weight], backend="triton").step()
