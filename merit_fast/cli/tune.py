"""The same for checkpoints without a run: rows are given on the command line, all of them choose."""

from collections.abc import Mapping, Sequence

from merit_fast.data import DataConfig, DatasetConfig, load_mixture, load_tokenizer, pad_token_id
from merit_fast.errors import InputError
from merit_fast.evaluate.audit import audit_rows
from merit_fast.evaluate.config import EvaluateConfig
from merit_fast.manifests.schemas import TuneManifest
from merit_fast.merge import MergeConfig
from merit_fast.merge.read.remote import Location
from merit_fast.options.fields import parse
from merit_fast.progress import Progress
from merit_fast.tune.search import TuneInputs, starting_weights, tune_merge, tuning_sentence


def tune_checkpoints(
    models: Sequence[tuple[Location, float | None]],
    base: Location | None,
    validation: Sequence[Mapping[str, str]],
    config: MergeConfig,
    progress: Progress,
) -> TuneManifest:
    """Chooses what ``config`` leaves open on the rows of ``validation``, up to ``config.tune_rows`` of them in turn.

    Args:
        models: K checkpoints, each with the weight that a fit is pulled towards, or None: its token count decides.
        validation: entries of a mixture, ``name`` and ``path``; rows that also report would flatter the merge.

    Raises:
        InputError: rows or tokenizer cannot be had; see ``starting_weights`` and ``tune_merge``.
    """
    paths = [path for path, _ in models]
    given = tuple(weight for _, weight in models if weight is not None)
    if given and len(given) < len(models):
        raise InputError(
            f"merge: give a weight to every model or to none, got {len(given)} for {len(models)} models"
        )
    start = starting_weights(paths, config, given)
    tokenizer = load_tokenizer(str(base or paths[0]))
    configs = [parse(DatasetConfig, entry, "command line", "--validation") for entry in validation]
    datasets = load_mixture(configs, tokenizer, DataConfig(), part="train")
    examples = audit_rows(datasets, config.tune_rows)
    candidates = TuneInputs(paths, tuple(map(str, paths)), start, base)
    batch_size = EvaluateConfig().batch_size
    found = tune_merge(
        candidates, examples, pad_token_id(tokenizer), batch_size, config, None, progress
    )
    progress.note(tuning_sentence(found))
    return found
