"""Files that a watched training run leaves next to its weights."""

import logging
from pathlib import Path

from merit_fast.integrations.branches import BRANCH_FILE, is_model_folder, put_branch
from merit_fast.integrations.per_dataset.sums import Counts, total_of, write_counts

logger = logging.getLogger(__name__)


def write_outputs(folder: Path, counts: Counts, steps: int, seed: int) -> None:
    """Writes dataset_counts.json and, next to a model or an adapter, branch.json.

    Args:
        folder: a checkpoint or the final output.
        counts: of all ranks.
        steps: optimizer steps.
        seed: of the training.
    """
    total = total_of(counts.sums.values())
    if not total.num_target_tokens:
        logger.warning("%s: gets no branch.json: no target token was trained on", folder)
        (folder / BRANCH_FILE).unlink(missing_ok=True)  # of an earlier run
        return
    write_counts(folder, counts)
    if is_model_folder(folder):
        put_branch(
            folder,
            counts.start_fingerprint,
            datasets=tuple(sorted(counts.sums)),
            num_examples=total.num_examples,
            num_target_tokens=total.num_target_tokens,
            num_tokens=total.num_tokens,
            steps=steps,
            seed=seed,
        )
