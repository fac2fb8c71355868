"""Schema of tune.json: the numbers of a merge that held-out rows chose."""

from merit_fast.manifests.schemas.version import SCHEMA_VERSION
from merit_fast.records import record

TUNE_FILE = "tune.json"


@record
class ScaleSearch:
    """Three losses, the minimum of the parabola through them, and the loss there."""

    # In the order tried; the last is the minimum, unless there is none or it is one of the others.
    scales: tuple[float, ...]
    losses: tuple[float | None, ...]  # nats per target token of the tuning rows; None: not finite
    minimum: float | None  # moved into the range allowed; None: the parabola has none


@record
class WeightSearch:
    """Losses around the start, the minimum of the quadratic through them, and the loss there."""

    start: tuple[float, ...]  # [K] by token counts
    start_loss: float
    points: tuple[tuple[float, ...], ...]
    losses: tuple[float | None, ...]
    fitted: tuple[float, ...] | None  # None: no direction curves upwards
    fitted_loss: float | None
    accepted: bool  # whether the loss at ``fitted`` is lower than at the start


@record
class TuneManifest:
    """tune.json, next to a merge's weights: the numbers that held-out rows chose, and the losses.

    Losses are those of float32 models.
    """

    branches: tuple[str, ...]  # names or paths, in the weights' order
    weights: tuple[float, ...]  # those of the merge
    scale: float | None  # that of the merge; None: not chosen here
    num_examples: int  # held-out rows that chose; none of them is in evaluate.json
    num_target_tokens: int
    weight_search: WeightSearch | None
    scale_search: ScaleSearch | None
    schema_version: int = SCHEMA_VERSION
