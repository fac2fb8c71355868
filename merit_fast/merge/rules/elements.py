"""Rules of the methods that decide element by element which models count."""

from merit_fast.kernels.average.elements import ElementRule
from merit_fast.merge.rules.values import TensorValues


def nearswap_rule(values: TensorValues) -> ElementRule:
    """Steps from the base towards the model, by at most t per element."""
    return ElementRule("near", t=values.of("t"))


def ram_rule(values: TensorValues) -> ElementRule:
    """Takes the only active delta as it is, and the mean of several."""
    return ElementRule("active", epsilon=values.of("epsilon"))


def ramplus_rule(values: TensorValues) -> ElementRule:
    """``ram_rule`` that boosts the only active delta where a model shares many of its elements."""
    return ElementRule(
        "active", epsilon=values.of("epsilon"), r=values.of("r"), alpha=values.of("alpha")
    )


def fusion_rule(values: TensorValues) -> ElementRule:
    """Takes the model where its difference from the base is unusually important."""
    return ElementRule("important", row=values.shape[-1] if values.shape else 1)
