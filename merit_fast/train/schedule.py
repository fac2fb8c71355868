"""Examples and learning rate of a step depend only on the step: a resumed run repeats itself."""

import math

import numpy as np
import numpy.typing as npt

from merit_fast.train.config import TrainConfig

# Branches of 30 to 54 steps of a 135M model ended well above joint training on their own tasks.
FEW_STEPS = 100


def num_steps(num_examples: int, config: TrainConfig) -> int:
    """Optimizer steps of a run; the last step of an epoch may hold fewer examples."""
    return config.epochs * math.ceil(num_examples / config.batch_size)


def step_examples(step: int, num_examples: int, config: TrainConfig) -> npt.NDArray[np.int64]:
    """Indices of the examples of a step. An epoch's permutation depends only on (seed, epoch)."""
    per_epoch = math.ceil(num_examples / config.batch_size)
    epoch, step_in_epoch = divmod(step, per_epoch)
    order = np.random.default_rng([config.seed, epoch]).permutation(num_examples)
    first = step_in_epoch * config.batch_size
    return order[first : first + config.batch_size]


def count_tokens(lengths: npt.ArrayLike, steps: int, config: TrainConfig) -> int:
    """Tokens that pass through the model in ``steps`` steps over examples of these lengths."""
    sizes = np.asarray(lengths, np.int64)
    per_epoch = num_steps(len(sizes), config) // config.epochs
    epochs, rest = divmod(steps, per_epoch)
    last = (step_examples(epochs * per_epoch + step, len(sizes), config) for step in range(rest))
    return epochs * int(sizes.sum()) + sum(int(sizes[chosen].sum()) for chosen in last)


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine down to ``final_fraction`` of the peak at the last step."""
    warmup = math.ceil(config.warmup_fraction * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.learning_rate * (config.final_fraction + (1 - config.final_fraction) * cosine)
