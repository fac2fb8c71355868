"""Quantised headers with random faults are refused in one line, or decoded as they read."""

import random

import numpy as np
import torch
from support.merge.formats.cases import CASES
from support.merge.formats.quantised import Stored, write_model

from merit_fast.errors import InputError
from merit_fast.merge.engine.driver import input_files
from merit_fast.merge.engine.opened import open_files
from merit_fast.merge.engine.plan import Segment
from merit_fast.merge.engine.values import values
from merit_fast.merge.read.decoded import read_input

DTYPES = (torch.uint8, torch.int8, torch.int32, torch.bfloat16, torch.float32, torch.int64)
ENDINGS = ("_scale", "_scale_inv", "_packed", "_scales", "_blocks", "_shape", "_g_idx", ".scale")
ROUNDS = 12


def faulty(stored, rng):
    """The model with one to three random changes of its tensors and its config."""
    tensors = {name: tensor.clone() for name, tensor in stored.tensors.items()}
    config = dict(stored.config)
    for _ in range(rng.randint(1, 3)):
        name = rng.choice([*tensors])
        tensor = tensors.pop(name)
        change = rng.randrange(7)
        if change == 0:
            tensors[name] = tensor.flatten()[: max(tensor.numel() - rng.randint(1, 9), 0)]
        elif change == 1:
            shape = [rng.randint(0, 5) for _ in range(rng.randint(0, 4))]
            tensors[name] = torch.zeros(shape, dtype=tensor.dtype)
        elif change == 2:
            tensors[name] = tensor.flatten().view(torch.uint8).clone()
        elif change == 3:
            tensors[name] = torch.full(tensor.shape, rng.randint(-3, 99)).to(rng.choice(DTYPES))
        elif change == 4:
            tensors[name + rng.choice(ENDINGS)] = tensor
        elif change == 5 and config:
            tensors[name] = tensor
            config[rng.choice([*config])] = rng.choice([None, "fp8", [0, 4], [2, 3], {}, 7])
        if not tensors:
            tensors["other"] = torch.ones(2)
    return Stored(tensors, {}, config)


def test_faults_are_refused_or_read(tmp_path):
    rng = random.Random(1)
    refused = 0
    for number in range(ROUNDS * len(CASES)):
        stored = faulty(list(CASES.values())[number % len(CASES)], rng)
        path = write_model(tmp_path / str(number), stored)
        try:
            checkpoint = read_input(path, None, unscaled_fp8=rng.random() < 0.5)
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        for entry in checkpoint.tensors.values():
            if not entry.num_elements:
                continue
            segment = Segment((entry.name,), (entry.num_elements,), "F32", 0, (entry,))
            with open_files(input_files([segment]), None) as files:
                read, _ = values(entry, 0, entry.num_elements, files)
            assert np.size(read) == entry.num_elements
    assert refused > 100
