"""Coefficients of the methods that are weighted sums of whole tensors: [K + 1], the base's last.

The combination leaves the base out where its coefficient is 0 in every tensor.
"""

from merit_fast.merge.rules.values import Coefficients, TensorValues


def linear_coefficients(values: TensorValues) -> Coefficients:
    """theta_0 + s (sum_k w_k theta_k - theta_0)"""
    scale = values.of("scale")
    return (*(scale * weight for weight in values.weights()), 1.0 - scale)


def task_arithmetic_coefficients(values: TensorValues) -> Coefficients:
    """theta_0 + s sum_k w_k delta_k"""
    scale = values.of("scale")
    weights = values.weights()
    return (*(scale * weight for weight in weights), 1.0 - scale * sum(weights))


def passthrough_coefficients(values: TensorValues) -> Coefficients:
    """s theta_1"""
    return (values.of("scale", model=0), 0.0)
