"""The audit of a merge: checks whether the theory behind its gain holds for these branches.

For any quadratic loss, with the branches' weights w and the steps delta_k = theta_k - theta from
the merge theta to branch k,

    gain = sum_k w_k L(theta_k) - L(theta) = sum_k w_k (g^T delta_k + 1/2 delta_k^T H delta_k)

with the gradient g and the Hessian H of L at theta (docs/method.md); g drops out where theta is the
branches' mean. A ratio of the two sides near 1 means that the branches lie in one quadratic basin
around the merge.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from merit_fast.data import Dataset, Example, collate, count_target_tokens
from merit_fast.errors import InputError
from merit_fast.evaluate.config import EvaluateConfig
from merit_fast.evaluate.losses import mean_loss
from merit_fast.evaluate.stage import MergedArm
from merit_fast.manifests.schemas import Barrier, MergeAudit
from merit_fast.model import (
    fit_trees,
    is_adapter,
    load_model,
    target_losses,
    weight_files,
    without_router_logits,
)
from merit_fast.progress import Progress, Task

# standard deviations of a perturbation, as shares of each tensor's root mean square
NOISE = (0.01, 0.03, 0.1)
Weights = dict[str, Tensor]


def audit_merges(
    merges: Mapping[str, MergedArm],
    branches: Mapping[str, Path],
    start: Path,
    datasets: Sequence[Dataset],
    pad_token_id: int,
    config: EvaluateConfig,
    progress: Progress,
) -> dict[str, MergeAudit]:
    """Audits every merged arm in float32 on ``config.audit_rows`` held-out rows.

    Args:
        merges: arm -> its merge.
        branches: branch -> its directory.
        start: the model from which the branches started.

    Raises:
        InputError: no dataset has held-out rows.
    """
    examples = audit_rows(datasets, config.audit_rows)
    if not examples:
        raise InputError(
            "evaluate.audit: no dataset of the mixture has held-out rows; give one an eval_path"
        )
    audits = {}
    for arm, merge in merges.items():
        pairs = len(merge.branches) * (len(merge.branches) - 1) // 2
        with progress.task(f"audit {arm}", 3 + len(merge.branches) + pairs, "points") as task:
            model = load_model(str(merge.path), "fp32")
            without_router_logits(model)
            auditor = _Auditor(model, examples, pad_token_id, config.batch_size)
            paths = {name: branches[name] for name in merge.branches}
            audits[arm] = auditor.audit(paths, merge.weights, start, config.audit_points, task)
    return audits


def audit_rows(datasets: Sequence[Dataset], count: int) -> list[Example]:
    """Up to ``count`` rows: the first of every dataset, then the second of every dataset, etc."""
    rounds = itertools.zip_longest(*(dataset.examples for dataset in datasets))
    return list(
        itertools.islice((row for turn in rounds for row in turn if row is not None), count)
    )


class _Auditor:
    """One model whose weights are set to one point after another, and the rows that measure it."""

    def __init__(
        self, model: nn.Module, examples: Sequence[Example], pad_token_id: int, batch_size: int
    ) -> None:
        self.model = model
        self.examples = examples
        self.pad_token_id = pad_token_id
        self.batch_size = batch_size
        self.weights: Weights = {
            name: parameter.detach() for name, parameter in model.named_parameters()
        }

    def set(self, weights: Weights) -> None:
        for name, value in weights.items():
            self.weights[name].copy_(value)

    def audit(
        self,
        branches: Mapping[str, Path],
        weights: Sequence[float],
        start: Path,
        points: int,
        task: Task,
    ) -> MergeAudit:
        center = {name: value.clone() for name, value in self.weights.items()}
        loss = self.loss(center)
        task.advance(1, "merge")
        deltas = {}
        for name, path in branches.items():
            deltas[name] = _difference(_read(path, center, start), center)
        losses = {}
        for name, delta in deltas.items():
            losses[name] = self.loss(_moved(center, delta))
            task.advance(1, name)
        barriers = []
        for a, b in itertools.combinations(branches, 2):
            ends = _moved(center, deltas[a]), _moved(center, deltas[b])
            barriers.append(Barrier(a, b, self.barrier(ends, (losses[a], losses[b]), points)))
            task.advance(1, f"{a} to {b}")
        noise = tuple((sigma, self.loss(_noisy(center, sigma)) - loss) for sigma in NOISE)
        task.advance(1, "noise")
        self.set(center)
        rises = [slope + 0.5 * bend for slope, bend in self.derivatives(list(deltas.values()))]
        task.advance(1, "curvature")
        moved = _difference(center, _read(start, center))
        from_start = [_square(_moved(moved, delta)) for delta in deltas.values()]
        spread = sum(w * square for w, square in zip(weights, from_start, strict=True))
        return MergeAudit(
            gain=sum(w * value for w, value in zip(weights, losses.values(), strict=True)) - loss,
            predicted_gain=sum(w * rise for w, rise in zip(weights, rises, strict=True)),
            branch_losses=tuple(losses.values()),
            merged_loss=loss,
            barriers=tuple(barriers),
            noise=noise,
            displacement=_square(moved) ** 0.5,
            contraction=_square(moved) / spread if spread else 1.0,
            num_examples=len(self.examples),
        )

    def loss(self, weights: Weights) -> float:
        """Nats per target token at ``weights``."""
        self.set(weights)
        return mean_loss(self.model, self.examples, self.pad_token_id, self.batch_size)

    def barrier(self, ends: Sequence[Weights], losses: tuple[float, float], points: int) -> float:
        """The highest rise of the loss above the straight line between the losses of the two ends.

        max over a of L((1 - a) theta_0 + a theta_1) - ((1 - a) L_0 + a L_1), at least 0
        """
        heights = [0.0]
        for step in range(1, points + 1):
            a = step / (points + 1)
            middle = {name: torch.lerp(value, ends[1][name], a) for name, value in ends[0].items()}
            heights.append(self.loss(middle) - (1 - a) * losses[0] - a * losses[1])
        return max(heights)

    def derivatives(self, deltas: Sequence[Weights]) -> list[tuple[float, float]]:
        """g^T delta and delta^T H delta of every delta at the present weights.

        Both come from a double backward pass (Pearlmutter 1994).
        """
        parameters = dict(self.model.named_parameters())
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        examples, _ = fit_trees(self.model, self.examples)
        total = sum(count_target_tokens(example.labels) for example in examples)
        slopes = [0.0] * len(deltas)
        bends = [0.0] * len(deltas)
        order = sorted(range(len(examples)), key=lambda i: (len(examples[i].input_ids), i))
        for at in range(0, len(order), self.batch_size):
            rows = [examples[i] for i in order[at : at + self.batch_size]]
            batch = collate(rows, [0] * len(rows), self.pad_token_id)
            loss = target_losses(self.model, batch, plain_attention=True).loss.sum() / total
            gradients = self._gradients(loss, parameters)
            for k, delta in enumerate(deltas):
                slope = torch.stack(
                    [(delta[name] * gradient).sum() for name, gradient in gradients.items()]
                ).sum()
                slopes[k] += float(slope.detach())
                seconds = self._gradients(slope, parameters)
                bends[k] += sum(
                    float((delta[n] * second.detach()).double().sum())
                    for n, second in seconds.items()
                )
        return list(zip(slopes, bends, strict=True))

    @staticmethod
    def _gradients(value: Tensor, parameters: dict[str, nn.Parameter]) -> Weights:
        """Gradients with a graph, so that they have gradients; zero for an unused parameter."""
        gradients = torch.autograd.grad(
            value,
            list(parameters.values()),
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return dict(zip(parameters, gradients, strict=True))


def _read(directory: Path, like: Weights, start: Path | None = None) -> Weights:
    """The checkpoint's tensors with the names of ``like``, as float32 on the same devices.

    Files that name tensors otherwise, and adapters of ``start``, are loaded as a model.
    """
    weights: Weights = {}
    for file in [] if is_adapter(directory) else weight_files(directory):
        with safe_open(file, framework="pt") as opened:
            for name in set(opened.keys()) & like.keys():
                weights[name] = opened.get_tensor(name).to(like[name].device, torch.float32)
    if weights.keys() != like.keys():
        model = load_model(str(directory), "fp32", None if start is None else str(start))
        weights = {name: p.detach() for name, p in model.named_parameters() if name in like}
    return weights


def _moved(center: Weights, delta: Weights) -> Weights:
    return {name: value + delta[name] for name, value in center.items()}


def _noisy(center: Weights, sigma: float) -> Weights:
    numbers = torch.Generator().manual_seed(0)
    moved: Weights = {}
    for name, value in center.items():
        noise = torch.randn(value.shape, generator=numbers).to(value.device)
        moved[name] = value + sigma * value.square().mean().sqrt() * noise
    return moved


def _difference(a: Weights, b: Weights) -> Weights:
    return {name: value - b[name] for name, value in a.items()}


def _square(delta: Weights) -> float:
    return sum(float(value.double().square().sum()) for value in delta.values())
