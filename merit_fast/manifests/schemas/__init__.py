"""Schemas of the JSON files in which stages meet: one record for each file or section of one."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from merit_fast.manifests.schemas.branch import (
        BranchManifest,
    )
    from merit_fast.manifests.schemas.evaluate import (
        ArmResult,
        AuditManifest,
        Barrier,
        Comparison,
        DatasetResult,
        EvaluateManifest,
        MergeAudit,
        MergingGain,
    )
    from merit_fast.manifests.schemas.split import (
        GroupCount,
        PartConflict,
        SharedRows,
        SplitDataset,
        SplitManifest,
        TriedNumber,
    )
    from merit_fast.manifests.schemas.tune import (
        TUNE_FILE,
        ScaleSearch,
        TuneManifest,
        WeightSearch,
    )
    from merit_fast.manifests.schemas.version import (
        SCHEMA_VERSION,
    )

__all__ = [
    "ArmResult",
    "AuditManifest",
    "Barrier",
    "BranchManifest",
    "Comparison",
    "DatasetResult",
    "EvaluateManifest",
    "GroupCount",
    "MergeAudit",
    "MergingGain",
    "PartConflict",
    "SCHEMA_VERSION",
    "ScaleSearch",
    "SharedRows",
    "SplitDataset",
    "SplitManifest",
    "TUNE_FILE",
    "TriedNumber",
    "TuneManifest",
    "WeightSearch",
]

_MODULES = {  # a merge of plain checkpoints needs none of the larger ones
    "ArmResult": "evaluate",
    "AuditManifest": "evaluate",
    "Barrier": "evaluate",
    "BranchManifest": "branch",
    "Comparison": "evaluate",
    "DatasetResult": "evaluate",
    "EvaluateManifest": "evaluate",
    "GroupCount": "split",
    "MergeAudit": "evaluate",
    "MergingGain": "evaluate",
    "PartConflict": "split",
    "SCHEMA_VERSION": "version",
    "ScaleSearch": "tune",
    "SharedRows": "split",
    "SplitDataset": "split",
    "SplitManifest": "split",
    "TUNE_FILE": "tune",
    "TriedNumber": "split",
    "TuneManifest": "tune",
    "WeightSearch": "tune",
}


def __getattr__(name: str) -> Any:
    """Imports a schema when it is first used."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
