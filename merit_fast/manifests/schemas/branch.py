"""Schema of branch.json."""

from merit_fast.manifests.schemas.version import SCHEMA_VERSION
from merit_fast.options.fields import option
from merit_fast.records import record


@record
class BranchManifest:
    """branch.json, written with a branch's weights.

    A merge weighs branches by ``num_target_tokens``.
    """

    branch: str  # merit-0, random-3, joint
    arm: str
    group: int
    datasets: tuple[str, ...]
    num_examples: int  # seen in training, epochs counted
    num_target_tokens: int  # in the loss, after the shift, epochs counted
    num_tokens: int  # through the model, epochs counted, padding not
    steps: int
    seed: int
    base_fingerprint: str
    start_fingerprint: str  # of the model it was trained from: the base, or the warm-up's
    schema_version: int = SCHEMA_VERSION
    # Counts are those of the weights that are kept; of an earlier checkpoint after an early stop.
    steps_run: int | None = option(
        None, "optimizer steps run; absent: as many as steps", omit_default=True
    )
