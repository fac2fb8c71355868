"""Merges folders of several models: every part with weights, every config copied, the rest named.

Parts are merged one by one with the same method into one output directory.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merit_fast.errors import InputError
from merit_fast.manifests.directories import begin_directory, finish_directory
from merit_fast.manifests.hashes import checksum
from merit_fast.manifests.io import StageManifest, fingerprint
from merit_fast.manifests.kept import remove_records
from merit_fast.manifests.locks import claim, exclusive, locks_of, this_process
from merit_fast.merge.config import MergeConfig
from merit_fast.merge.prepared import PreparedMerge, prepare_merge
from merit_fast.merge.read.checkpoint import SINGLE_FILE
from merit_fast.merge.read.companions import list_companions
from merit_fast.merge.read.files import copy_file, list_directory
from merit_fast.merge.read.folders.left_out import is_config, names_left_out
from merit_fast.merge.read.folders.several import SeveralModels, part_of, several_models
from merit_fast.merge.read.names.weight_files import INDEX_FILE
from merit_fast.merge.read.remote import Location
from merit_fast.merge.write.card import CARD_FILE
from merit_fast.merge.write.finished import is_up_to_date
from merit_fast.merge.write.same import check_unchanged
from merit_fast.progress import Progress
from merit_fast.records import record, replace

_SUMS = ("shards", "tensors", "parameters", "bytes_in", "bytes_out")
_OF_ONE_MODEL = ("shard_size", "stats", "checksum")


@record
class FolderMerge:
    """A checked merge of folders. ``giver``: the first model, whose other files are copied."""

    giver: SeveralModels
    parts: tuple[tuple[str, PreparedMerge], ...]
    config: MergeConfig
    copied: tuple[str, ...]
    left_out: tuple[str, ...]

    def summary(self, out: Path) -> dict[str, Any]:
        """The facts of ``PreparedMerge.summary``, summed over the parts."""
        each = [part.summary(part_of(out, folder)) for folder, part in self.parts]
        dtypes = list(dict.fromkeys(facts["dtype"] for facts in each))
        notes = [note for facts in each for note in facts["notes"]]
        models = [str(path) for path in self.parts[0][1].models]
        weights = [weight for _, weight in each[0]["models"]]
        return each[0] | {
            "merged": str(out),
            "models": [
                [_whole(path, self.parts[0][0]), weight]
                for path, weight in zip(models, weights, strict=True)
            ],
            "base": _whole(each[0]["base"], self.parts[0][0]) if each[0]["base"] else None,
            "coefficients": [[None, None]] * len(models),
            "dtype": ", ".join(dtypes),
            "parts": [folder or "." for folder, _ in self.parts],
            "copied": list(self.copied),
            "left_out": list(self.left_out),
            "buffer_bytes": max(facts["buffer_bytes"] for facts in each),
            "notes": list(dict.fromkeys(notes)),
            **{key: sum(facts[key] for facts in each) for key in _SUMS},
        }

    def write(self, out: Path, progress: Progress) -> bool:
        """Writes the whole output; the same call resumes at the part that was not finished.

        Raises:
            LockedError: another merge works on ``out``.
            InputError: an input changed while it was read.
        """
        manifest = self._manifest()
        locks = locks_of(out)
        # An equal merge waits for its turn and finds the output finished.
        with claim(locks, this_process(manifest.fingerprint), out), exclusive(locks / "turn"):
            if not is_up_to_date(out, manifest, progress):
                self._write(out, manifest, progress)
        return True

    def _write(self, out: Path, manifest: StageManifest, progress: Progress) -> None:
        directory = begin_directory(out, manifest.fingerprint)
        for folder, part in self.parts:
            target = directory / folder
            target.mkdir(parents=True, exist_ok=True)
            part.write_into(target, progress)
            _name_index(target, part)
        self._copy(directory)
        check_unchanged(manifest, self._manifest())
        finish_directory(directory, out, manifest, self.config.fsync)

    def _copy(self, directory: Path) -> None:
        """Copies the other files, and keeps one card, at the top."""
        for name in self.copied:
            target = directory / name
            target.parent.mkdir(parents=True, exist_ok=True)
            copy_file(self.giver.path / name, target)
        card = directory / self.parts[0][0] / CARD_FILE
        if card.exists() and card.parent != directory:
            shutil.move(card, directory / CARD_FILE)
        for folder, _ in self.parts:
            if folder:
                (directory / folder / CARD_FILE).unlink(missing_ok=True)
                remove_records(directory / folder)

    def _manifest(self) -> StageManifest:
        """The first part's manifest, with a digest of every part and copied file as its inputs."""
        manifests = {folder: part.manifest for folder, part in self.parts}
        inputs = {f"part {name or '.'}": each.fingerprint for name, each in manifests.items()}
        for name in self.copied:
            file = self.giver.path / name
            if isinstance(file, Path):
                inputs[f"file {name}"] = checksum(file)
        first = manifests[self.parts[0][0]]
        digest = fingerprint([first.stage, first.config, inputs])
        return replace(first, fingerprint=digest, inputs=inputs)


def prepare_folders(
    giver: SeveralModels,
    models: Sequence[Location],
    weights: Sequence[float],
    base: Location | None,
    config: MergeConfig,
) -> FolderMerge:
    """The merge of folders of several models, of which ``giver`` is the first.

    Raises:
        InputError: the folders have other parts, an option concerns one model only; see
            ``several_models`` and ``prepare_merge``.
    """
    for name in _OF_ONE_MODEL:
        if getattr(config, name):
            rule = f"must be absent, as {giver.path} holds several models ({giver.listing})"
            raise InputError(f"merge.{name}: {rule}")
    for path in (*models[1:], *([base] if base else [])):
        other = several_models(path)
        if other is None or other.parts != giver.parts:
            found = "one model" if other is None else ", ".join(_shown(other.parts))
            rule = f"must hold the parts {', '.join(_shown(giver.parts))} as {giver.path}"
            raise InputError(f"{path}: {rule}, got {found}")
    parts = []
    for folder in giver.parts:
        places = [_weights_of(part_of(path, folder)) for path in models]
        start = _weights_of(part_of(base, folder)) if base else None
        parts.append((folder, prepare_merge(places, weights, start, config)))
    handled = {name for folder, part in parts for name in _handled(folder, part)}
    others = [name for name in _other_files(giver) if name not in handled]
    copied = [name for name in others if is_config(name.rpartition("/")[2], giver.has_code)]
    rest = names_left_out(name for name in others if name not in copied)
    return FolderMerge(giver, tuple(parts), config, tuple(copied), rest)


def _shown(parts: Sequence[str]) -> list[str]:
    return [part or "." for part in parts]


def _whole(path: str, folder: str) -> str:
    """A model's folder, from the place of its part."""
    place = Path(path)
    place = place.parent if place.suffix == ".safetensors" else place
    return str(place)[: -len(folder) - 1] if folder else str(place)


def _weights_of(place: Location) -> Location:
    """The part, or of several variants the file without one."""
    names = [name for name in list_directory(place) if name.endswith(".safetensors")]
    plain = [name for name in names if name.count(".") == 1]
    has_index = any(name.endswith(".index.json") for name in list_directory(place))
    if len(names) > 1 and len(plain) == 1 and plain[0] != SINGLE_FILE and not has_index:
        return place / plain[0]
    return place


def _other_files(giver: SeveralModels) -> tuple[str, ...]:
    """Files at the top and in the folders of the listing, and names of other folders."""
    names: list[str] = []
    tops = {folder.partition("/")[0] for folder in giver.folders if folder}
    for name in list_directory(giver.path):
        if name.startswith(".") or name in tops:
            continue
        names.append(f"{name}/" if (giver.path / name).is_dir() else name)
    for folder in giver.folders:
        if folder:
            place = giver.path / folder
            names += [f"{folder}/{name}" for name in list_directory(place) if name[0] != "."]
    return tuple(dict.fromkeys(names))


def _handled(folder: str, part: PreparedMerge) -> list[str]:
    """Files of the giver that a part's merge reads, copies or writes itself."""
    prefix = f"{folder}/" if folder else ""
    files = [file.name for file in part.inputs.files]
    return [prefix + name for name in (*files, *list_companions(part.inputs.companions))]


def _stem(part: PreparedMerge) -> str:
    """The name before the number and the ending of a part's files, such as ``model``."""
    return part.inputs.files[0].name.removesuffix(".safetensors").partition("-")[0]


def _name_index(directory: Path, part: PreparedMerge) -> None:
    """Gives the index of a part the name that goes with its files; one file needs none."""
    index = directory / INDEX_FILE
    if _stem(part) == SINGLE_FILE.removesuffix(".safetensors") or not index.exists():
        return
    if len(part.inputs.files) == 1:
        index.unlink()
    else:
        index.replace(directory / f"{_stem(part)}.safetensors.index.json")
