"""All inputs of a merge with the rows of one vocabulary, and facts about it for the output."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from merit_fast.errors import InputError
from merit_fast.merge.read.checkpoint import Checkpoint
from merit_fast.merge.read.entries import TensorEntry
from merit_fast.merge.read.files import folder_of
from merit_fast.merge.read.remote import Location
from merit_fast.merge.tokenizer_options import TokenizerOptions
from merit_fast.merge.vocabulary.donors import Donors, find_donors
from merit_fast.merge.vocabulary.matrices import Matrix, matrices_of
from merit_fast.merge.vocabulary.tokens import has_vocabulary, read_vocabulary
from merit_fast.records import field, record, replace

if TYPE_CHECKING:
    from merit_fast.merge.vocabulary.assemble import MadeRows
    from merit_fast.merge.vocabulary.rows import RowPlan
    from merit_fast.merge.vocabulary.union import OutputTokens


@record
class OutputVocabulary:
    """What a merge with matched vocabularies writes next to the weights.

    Attributes:
        folder: gives the files of the tokenizer.
        tokens: of the output; None: the folder's files fit as they are.
        num_rows: rows of the output's embedding.
        config_rows: rows of the model that gives config.json.
        ids: old id -> new id of that model's tokens that have another one now; -1: they are gone.
        digest: of every row's origin and every token, for the fingerprint of the output.
        made: rows that the engine makes before it merges.
        sentence: facts for the user.
    """

    folder: Location
    tokens: "OutputTokens | None"
    num_rows: int
    config_rows: int
    digest: str
    ids: Mapping[int, int] = field(default_factory=dict)
    made: "MadeRows | None" = None
    sentence: str = ""


@record
class Matched:
    """The inputs of a merge after the match. ``output`` None: nothing changes."""

    models: tuple[Checkpoint, ...]
    base: Checkpoint | None
    output: OutputVocabulary | None = None


def match_vocabularies(
    models: Sequence[Checkpoint],
    base: Checkpoint | None,
    options: TokenizerOptions | None,
    chosen: Location | None,
    companions: Location,
) -> Matched:
    """Gives every model's embedding and head the rows of the output's vocabulary.

    With a tokenizer, a row belongs to the text of its token; see ``plan_by_token``. Without one, or
    with source "ids", to its id; see ``plan_by_id``.

    Args:
        options: the tokenizer of the output; None: texts must agree where models have them.
        chosen: as in ``find_donors``.
        companions: the directory that gives config.json.

    Raises:
        InputError: vocabularies disagree, or cannot be matched.
    """
    unchanged = Matched(tuple(models), base)
    donors = find_donors(models, base, chosen)
    if donors is None:
        if options is None:
            return unchanged
        path = models[0].path
        raise InputError(f"{path}: tokenizer: must be absent, some model has no input embedding")
    if options is None or options.source == "ids":
        if options is None and donors.are_alike():
            return unchanged
        from merit_fast.merge.vocabulary.by_id import plan_by_id

        planned = plan_by_id(donors, companions, checked=options is None)
        if planned is None:
            return unchanged
        plan, namer = planned
        output = _output_by_id(donors, plan, namer, companions)
    else:
        from merit_fast.merge.vocabulary.by_token import plan_by_token

        plan, tokens = plan_by_token(donors, options)
        output = _output_by_token(donors, plan, tokens, companions)
    matched, made = _matched(donors, plan)
    return Matched(
        tuple(matched[model.path] for model in models),
        matched[base.path] if base else None,
        replace(output, made=made),
    )


def _matched(
    donors: Donors, plan: "RowPlan"
) -> "tuple[dict[Location, Checkpoint], MadeRows | None]":
    """Every input with the plan's rows, by path."""
    from merit_fast.merge.vocabulary.assemble import RowFile, assemble

    checkpoints = donors.checkpoints
    rows = [donor.num_rows for donor in donors.all]
    file = RowFile()
    changed: list[dict[str, TensorEntry]] = [{} for _ in checkpoints]
    for matrix in matrices_of(checkpoints, rows):
        if not _has_other_rows(matrix, donors, plan):
            entries = [checkpoint.tensors[matrix.name] for checkpoint in checkpoints]
            made = assemble(plan, matrix.name, matrix.axis, entries, file)
            for tensors, entry in zip(changed, made, strict=True):
                tensors[matrix.name] = entry
    matched = {
        checkpoint.path: replace(checkpoint, tensors={**checkpoint.tensors, **tensors})
        for checkpoint, tensors in zip(checkpoints, changed, strict=True)
    }
    return matched, file.finished()


def _has_other_rows(matrix: Matrix, donors: Donors, plan: "RowPlan") -> bool:
    """Whether a matrix counts other tokens than the embedding does, and stays as it is.

    Raises:
        InputError: it cannot stay: some of its rows would belong to other tokens.
    """
    counts = [matrix.rows(donor.checkpoint) for donor in donors.all]
    others = [k for k, donor in enumerate(donors.all) if counts[k] != donor.num_rows]
    if not others:
        return False
    if len(set(counts)) > 1 or not plan.keeps(counts[0]):
        donor = donors.all[others[0]]
        entry = donor.checkpoint.tensors[matrix.name]
        raise InputError(
            f"{entry.file}: {matrix.name}: must have {donor.num_rows} rows as the input embedding "
            f"has, to be matched by token, got {counts[others[0]]}"
        )
    return True


def _output_by_id(
    donors: Donors, plan: "RowPlan", namer: int, companions: Location
) -> OutputVocabulary:
    count = plan.rows.shape[1]
    lengths = ", ".join(f"{donor.path} {donor.num_rows}" for donor in donors.all)
    sentence = (
        f"{count} rows by id: the models have {lengths}; {plan.borrowed} rows come from the "
        "models that have them"
    )
    folder = donors.all[namer].folder or companions
    rows = _config_rows(donors, companions)
    return OutputVocabulary(folder, None, count, rows, _digest(plan, None), sentence=sentence)


def _output_by_token(
    donors: Donors, plan: "RowPlan", tokens: "OutputTokens", companions: Location
) -> OutputVocabulary:
    texts = tokens.vocabulary.texts
    sentence = (
        f"{plan.rows.shape[1]} rows for the {len(texts)} tokens of {tokens.vocabulary.folder}"
    )
    if tokens.new:
        sentence += f", {len(tokens.new)} of them new to it"
    sentence += f"; {plan.borrowed} tokens have the row of another model where one lacks them"
    if tokens.made_plain:
        sentence += (
            f"; {len(tokens.made_plain)} ordinary tokens of other models are added tokens now, "
            "which text meets only as a whole"
        )
    if plan.without_row:
        first = texts[plan.without_row[0]]
        sentence += f"; {len(plan.without_row)} tokens that no model has are zeros, as {first!r}"
    return OutputVocabulary(
        tokens.vocabulary.folder,
        tokens,
        plan.rows.shape[1],
        _config_rows(donors, companions),
        _digest(plan, tokens),
        _moved_ids(tokens, companions),
        sentence=sentence,
    )


def _digest(plan: "RowPlan", tokens: "OutputTokens | None") -> str:
    """32 hex digits of all that decides the rows and the tokenizer's files."""
    digest = hashlib.sha256(plan.models.tobytes())
    digest.update(plan.rows.tobytes())
    digest.update(repr(plan.made).encode())
    if tokens is not None:
        digest.update(repr(tokens.vocabulary.added).encode())
        digest.update(repr(list(tokens.vocabulary.ids.items())).encode())
    return digest.hexdigest()[:32]


def _config_rows(donors: Donors, companions: Location) -> int:
    """Rows of the model that gives config.json; those of the home where it is no input."""
    for donor in donors.all:
        if folder_of(donor.path) == companions:
            return donor.num_rows
    return donors.all[donors.home].num_rows


def _moved_ids(tokens: "OutputTokens", companions: Location) -> dict[int, int]:
    """Ids of the companions' tokens that have another one in the output; -1: it has none."""
    if companions == tokens.vocabulary.folder or not has_vocabulary(companions):
        return {}
    ids = tokens.vocabulary.ids
    old = read_vocabulary(companions).texts
    moved = ((number, ids.get(text, -1)) for number, text in old.items())
    return {number: new for number, new in moved if number != new}
