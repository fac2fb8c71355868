"""A tiny base for TRL's trainers."""

import pytest
from support.tiny import make_model, make_tokenizer

pytest.importorskip("trl", reason="trl is not installed")


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trl")
    make_tokenizer(folder)
    make_model(folder)
    return folder


def _standin(
    hidden,
    weight,
    labels,
    *,
    bias=None,
    softcap=None,
    scale=1.0,
    temperature=1.0,
    entropy=False,
    top1=False,
    backend=None,
):
    import collections
    import torch

    T = collections.namedtuple("TokenStatistics", "log_probs entropy is_top1 log_sum_exp")
    z = torch.nn.functional.linear(hidden, weight, bias).float() * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    m = labels != -100
    lp = z.log_softmax(-1)
    g = lp.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * m
    return T(
        g,
        -(lp.exp() * lp).sum(-1) * m if entropy else None,
        (z.argmax(-1) == labels) & m if top1 else None,
        z.logsumexp(-1) * m,
    )


import merit_fast.kernels.cross_entropy as _ce  # noqa

if not hasattr(_ce, "linear_token_statistics"):
    _ce.linear_token_statistics = _standin
