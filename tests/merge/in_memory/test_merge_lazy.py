"""Single tensors of a merge made in memory, by any thread, directly or by way of buffers."""

import threading

import pytest
import torch
from support.merges import METHODS, bits, config_of, load, merge, write

from merit_fast.errors import InputError
from merit_fast.merge.engine.prepare import make_plan, read_inputs
from merit_fast.merge.in_memory import lazy as lazy_tensors
from merit_fast.merge.in_memory.lazy import Staging, open_merged
from merit_fast.progress import SilentProgress

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Integers, no elements, no dimensions, and tensors that a file merge takes in one run."""
    root = tmp_path_factory.mktemp("kinds")
    for k in range(3):
        generator = torch.Generator().manual_seed(k)
        tensors = {
            "a": torch.randn(3, 5, generator=generator),
            "b": torch.randn(140_000, generator=generator),  # more than a chunk
            "empty": torch.zeros(0, 4),
            "one": torch.randn((), generator=generator).bfloat16(),
            "steps": torch.arange(4, dtype=torch.int32),
        }
        write(root / f"m{k}", tensors)
    return [root / f"m{k}" for k in range(3)]


def read_all(models, base, /, staged=None, **options):
    """Every tensor of a merge by equal weights."""
    config = config_of(options)
    inputs = read_inputs(models, [1 / len(models)] * len(models), base, config)
    with open_merged(make_plan(inputs, config, SilentProgress()), config, staged) as source:
        return {name: lazy[...] for name, lazy in source.state_dict().items()}


def assert_same_tensors(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype and mine[name].shape == tensor.shape, name
        assert (bits(mine[name]) == bits(tensor)).all(), name


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("options", METHODS, ids=lambda options: options["method"])
def test_a_tensor_alone_has_the_bits_it_has_in_a_file(
    models, tmp_path, options, backend, monkeypatch
):
    merge(models[:2], [0.5, 0.5], tmp_path / "out", config_of(options), models[2])
    monkeypatch.setenv("MERIT_FAST_BACKEND", backend)
    expected = load(tmp_path / "out")
    assert_same_tensors(read_all(models[:2], models[2], **options), expected)
    staged = read_all(models[:2], models[2], staged=CPU, **options)
    assert_same_tensors(staged, expected)
    places = [tensor.data_ptr() for tensor in staged.values() if tensor.numel()]
    assert len(set(places)) == len(places)  # none is a buffer itself


def test_integers_that_differ_are_named_with_the_tensors_that_are_asked_for(models, tmp_path):
    tensors = {**load(models[1]), "steps": torch.zeros(4, dtype=torch.int32)}
    other = write(tmp_path / "other", tensors)
    config = config_of({})
    plan = make_plan(
        read_inputs([models[0], other], [0.5, 0.5], None, config), config, SilentProgress()
    )
    with open_merged(plan, config, None) as source:
        lazy = source.state_dict()
        assert lazy["a"].dtype == torch.float32 and lazy["a"].is_floating_point()
        assert lazy["steps"].dtype == torch.int32 and not lazy["steps"].is_floating_point()
        assert lazy["a"][...].shape == (3, 5) and source.error is None
        with pytest.raises(
            InputError, match="other/model.safetensors: steps: a I32 tensor cannot be averaged"
        ) as raised:
            lazy["steps"][...]
        assert source.error is raised.value


def test_threads_get_what_one_gets_from_one_engine_at_a_time(models, monkeypatch):
    config = config_of({"method": "ties", "density": 0.3})
    inputs = read_inputs(models[:2], [0.5, 0.5], models[2], config)
    plan = make_plan(inputs, config, SilentProgress())
    expected = read_all(models[:2], models[2], method="ties", density=0.3)
    read_back = []
    alone = threading.Lock()
    merge_tensor = lazy_tensors.merge_tensor

    def watched(*arguments):
        assert alone.acquire(blocking=False), "two sets of buffers"
        merge_tensor(*arguments)
        alone.release()

    monkeypatch.setattr(lazy_tensors, "merge_tensor", watched)
    with open_merged(plan, config, CPU) as source:

        def run():
            read_back.append({name: lazy[...] for name, lazy in source.state_dict().items()})

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(read_back) == 4
    for tensors in read_back:
        assert_same_tensors(tensors, expected)


class Late(Staging):
    """Holds the first copy up until another tensor is being filled."""

    def __init__(self):
        super().__init__(24, CPU)
        self.copying = threading.Event()
        self.filling = threading.Event()

    def copy(self, host):
        if not self.copying.is_set():
            self.copying.set()
            assert self.filling.wait(30), "nothing was filled while a copy was under way"
        return super().copy(host)


def test_one_buffer_is_filled_while_the_other_is_copied():
    staging = Late()
    results = {}

    def run(k):
        def fill(host):
            if staging.copying.is_set():
                staging.filling.set()
            host.fill_(k)

        results[k] = staging.through((3, 2), torch.float32, fill)

    first = threading.Thread(target=run, args=(1,))
    first.start()
    assert staging.copying.wait(30)
    for k in (2, 3):
        run(k)
    first.join()
    assert results.keys() == {1, 2, 3} and all(results[k].tolist() == [[k, k]] * 3 for k in results)


def test_a_buffer_comes_back_when_reading_fails():
    staging = Staging(8, CPU)

    def fail(host):
        raise OSError("gone")

    for _ in range(3):  # one more than there are buffers
        with pytest.raises(OSError, match="gone"):
            staging.through((2,), torch.float32, fail)


def test_at_most_two_tensors_are_on_their_way():
    staging = Staging(8, CPU)
    entered = threading.Semaphore(0)
    leave = threading.Event()
    filled = []

    def fill(host):
        filled.append(host.data_ptr())
        entered.release()
        assert leave.wait(30)

    threads = [
        threading.Thread(target=staging.through, args=((2,), torch.float32, fill)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    assert entered.acquire(timeout=30) and entered.acquire(timeout=30)
    assert not entered.acquire(timeout=0.05) and len(set(filled)) == 2
    leave.set()
    for thread in threads:
        thread.join(30)
    assert len(filled) == 4 and len(set(filled)) == 2
