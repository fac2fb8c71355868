"""Whether an output is finished already, with every byte."""

from pathlib import Path

from merit_fast.manifests.directories import is_complete
from merit_fast.manifests.hashes import first_damage
from merit_fast.manifests.io import StageManifest
from merit_fast.manifests.ledger import adopt
from merit_fast.manifests.state import replaced_keys
from merit_fast.progress import Progress


def is_up_to_date(out: Path, manifest: StageManifest, progress: Progress) -> bool:
    """Whether ``out`` is this very output with all its bytes; a note tells what differs."""
    if not is_complete(out, manifest.fingerprint):
        if changed := replaced_keys(out, manifest):
            progress.note(f"{out}: {changed}; merging again")
        return False
    damage = first_damage(out, adopt(out).files)
    if damage is None:
        progress.note(f"{out}: up to date")
        return True
    progress.note(f"{out / damage.file}: {damage.found}; merging again")
    return False
