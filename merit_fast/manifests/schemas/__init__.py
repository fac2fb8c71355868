"""Schemas of the JSON files in which stages meet: one dataclass for each file or section of one."""

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
