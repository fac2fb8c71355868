"""Tunes a merge of checkpoints without a run, on rows that the command line names."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from merit_fast.data import DatasetConfig, load_mixture, pad_token_id
from merit_fast.data.images import load_tokenizer_or_processor, tokenizer_of
from merit_fast.data.saved import read_data_options
from merit_fast.errors import InputError
from merit_fast.evaluate.audit import audit_rows
from merit_fast.evaluate.config import EvaluateConfig
from merit_fast.manifests.schemas import TuneManifest
from merit_fast.merge import MergeConfig
from merit_fast.merge.read.adapters.folder import is_adapter
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
    data_options: Sequence[str] = (),
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
        data_options: ``KEY=VALUE`` of `data:`, in place of those with which the models were
            trained.

    Raises:
        InputError: rows or tokenizer are unavailable; the models were trained on rows encoded in
            different ways; see ``starting_weights``, ``tune_merge``.
    """
    paths = [path for path, _ in models]
    weights = tuple(weight for _, weight in models if weight is not None)
    if weights and len(weights) < len(models):
        raise InputError(
            "merge: give a weight to every model or to none, "
            f"got {len(weights)} for {len(models)} models"
        )
    start = starting_weights(paths, config, weights)
    folders = [path for path in paths if isinstance(path, Path)]
    data_config, is_known = read_data_options(folders, data_options)
    tokenizer = load_tokenizer_or_processor(str(_tokenizer_source(paths, base)))
    configs = [parse(DatasetConfig, entry, "command line", "--validation") for entry in validation]
    datasets = load_mixture(configs, tokenizer, data_config, part="train")
    examples = audit_rows(datasets, config.tune_rows)
    candidates = TuneInputs(paths, tuple(map(str, paths)), start, base)
    batch_size = EvaluateConfig().batch_size
    tuned = tune_merge(
        candidates,
        examples,
        pad_token_id(tokenizer_of(tokenizer)),
        batch_size,
        config,
        None,
        progress,
    )
    if not (is_known or data_options):
        progress.note(
            "merge: no model tells how its rows became tokens (data.json); the rows of "
            "--validation are encoded by the tokenizer's own template and the defaults of `data:`"
        )
    progress.note(tuning_sentence(tuned))
    return tuned


def _tokenizer_source(paths: Sequence[Location], base: Location | None) -> Location:
    """The checkpoint that gives the merge its tokenizer: the first that is no adapter."""
    return next((p for p in (*paths, base) if p is not None and not is_adapter(p)), paths[0])
