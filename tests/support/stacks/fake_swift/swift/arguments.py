"""The keys of a configuration."""

from dataclasses import dataclass


@dataclass
class SftArguments:
    """Some of ms-swift's keys."""

    model: str = ""
    model_type: str = ""
    template: str = ""
    learning_rate: float = 0.0
    callbacks: str = ""
    seed: int = 42
    data_seed: int = 42
    save_strategy: str = "steps"
    packing: bool = False
