"""Tunes a merge of checkpoints without a run, on rows that the command line names."""

from collections.abc import Mapping, Sequence

from merit_fast.data import DataConfig, DatasetConfig, load_mixture, load_tokenizer, pad_token_id
from merit_fast.errors import InputError
from merit_fast.evaluate.audit import audit_rows
from merit_fast.evaluate.config import EvaluateConfig
from merit_fast.manifests.schemas import TuneManifest
from merit_fast.merge import MergeConfig
from merit_fast.merge.read.remote import Location
from merit_fast.options.parser import parse
from merit_fast.progress import Progress
from merit_fast.tune.search import TuneInputs, starting_weights, tune_merge, tuning_sentence


def tune_checkpoints(
    models: Sequence[tuple[Location, float | None]],
    base: Location | None,
    validation: Sequence[Mapping[str, str]],
    config: MergeConfig,
    progress: Progress,
) -> TuneManifest:
    """Chooses the numbers that ``config`` leaves open, on up to ``config.tune_rows`` rows.

    Args:
        models: K checkpoints, each with the weight towards which a fit is pulled; None: its token
            count.
        base: the checkpoint from which the models were trained, if the merge needs one.
        validation: entries of a mixture, ``name`` and ``path``. Rows that also report would flatter
            the merge.
        config: the merge's options.
        progress: display of the search.

    Raises:
        InputError: rows or tokenizer are unavailable; see ``starting_weights``, ``tune_merge``.
    """
    paths = [path for path, _ in models]
    weights = tuple(weight for _, weight in models if weight is not None)
    if weights and len(weights) < len(models):
        raise InputError(
            "merge: give a weight to every model or to none, "
            f"got {len(weights)} for {len(models)} models"
        )
    start = starting_weights(paths, config, weights)
    tokenizer = load_tokenizer(str(base or paths[0]))
    configs = [parse(DatasetConfig, entry, "command line", "--validation") for entry in validation]
    datasets = load_mixture(configs, tokenizer, DataConfig(), part="train")
    examples = audit_rows(datasets, config.tune_rows)
    candidates = TuneInputs(paths, tuple(map(str, paths)), start, base)
    batch_size = EvaluateConfig().batch_size
    tuned = tune_merge(
        candidates, examples, pad_token_id(tokenizer), batch_size, config, None, progress
    )
    progress.note(tuning_sentence(tuned))
    return tuned
