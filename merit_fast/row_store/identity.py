"""The identity of a store, and the fold of a sketch to the store's width."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from merit_fast.errors import InputError
from merit_fast.kernels.sketch import HASH_VERSION, CountSketch, flat_sketch, matrix_shape
from merit_fast.manifests.sketch_state import SketchIdentity

# The name under which a sketch is hashed again; no parameter can have it, for its blanks.
FOLD_NAME = "row store: fold"
_MODEL = "model_fingerprint"
_COMPARED = ("hash_version", "proj_dim", "seed", _MODEL, "parameters")


@dataclass(frozen=True)
class StoreIdentity:
    """Sketch, model and parameters of a store's rows, and their width.

    Attributes:
        sketch: the part of ``SketchIdentity.metadata`` on which a row depends.
        store_dim: width D' of the stored rows.
    """

    sketch: Mapping[str, str]
    store_dim: int

    @classmethod
    def of(cls, identity: SketchIdentity, store_dim: int) -> "StoreIdentity":
        """The identity of rows of width ``store_dim`` of sketches with ``identity``."""
        return cls({key: identity.metadata()[key] for key in _COMPARED}, store_dim)

    @property
    def proj_dim(self) -> int:
        """Width D of the sketches that were folded."""
        return int(self.sketch["proj_dim"])

    def fold(self, sketches: Tensor) -> Tensor:
        """Folds sketches [B, D] to [B, D'] float32; folds of sums are the sums of folds.

            flat_sketch(s as a parameter [D] with the name FOLD_NAME, CountSketch(D', seed))

        A sketch of width D' stays as it is. Inner products stay unbiased: the variance of both
        sketches adds up.
        """
        sketches = sketches.float()
        if self.store_dim == self.proj_dim:
            return sketches
        shape = (len(sketches), *matrix_shape((self.proj_dim,)))
        fold = CountSketch(self.store_dim, int(self.sketch["seed"]))
        return flat_sketch(sketches.reshape(shape), FOLD_NAME, fold)

    def require_same(
        self, other: "StoreIdentity", where: str, *, model_may_differ: bool = False
    ) -> None:
        """Checks that rows of two stores, or a store and a state, may be compared.

        Raises:
            InputError: they may not; the message names the first key that differs.
        """
        mine = {**self.sketch, "store_dim": self.store_dim}
        theirs = {**other.sketch, "store_dim": other.store_dim}
        for key, value in mine.items():
            if key == _MODEL and model_may_differ:
                continue
            if value != theirs[key]:
                expected = str(value)[:60]
                found = str(theirs[key])[:60]
                raise InputError(f"{where}: {key}: must be {expected!r}, found {found!r}")

    def require_version(self, where: str) -> None:
        """Checks that the rows have this program's hash.

        Raises:
            InputError: they have another one.
        """
        found = self.sketch["hash_version"]
        if found != str(HASH_VERSION):
            raise InputError(
                f"{where}: hash_version: must be {HASH_VERSION}, found {found}; sketch again"
            )
