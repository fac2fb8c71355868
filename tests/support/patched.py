"""Losses and gradients of a model with and without our kernels."""


def loss_and_gradients(model, batch, **options):
    model.zero_grad()
    output = model(**batch, **options)
    output.loss.backward()
    return output, {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def assert_same_gradients(actual, expected, floor=1e-5):
    assert actual.keys() == expected.keys()
    total = sum(g.double().square().sum() for g in expected.values()).sqrt()
    for name, gradient in expected.items():
        error = (actual[name].double() - gradient.double()).norm()
        assert error <= floor * (gradient.double().norm() + 0.01 * total), name
