"""The stages of a run, each declared once: command, folder, main file and options.

The command line, its help, the pipeline and the tests of the docs read this table.
"""

from merit_fast.records import record


@record
class Stage:
    """One stage: ``merit-fast NAME`` runs it and fills ``FOLDER/`` of the run's output."""

    name: str  # in stage.json
    purpose: str  # one sentence of help
    folder: str
    file: str  # main file, relative to the folder; words in capitals stand for names
    section: str = ""  # the YAML section that holds its options
    options: str = ""  # the class of its options, as module:name; "": no flags of its own
    command: str = ""  # the command that runs it, unless that has the stage's name

    @property
    def run_by(self) -> str:
        """The command that runs the stage."""
        return self.command or self.name


FACTORS_FILE = "factors.kfac"  # K-FAC's factors, in the sketch stage's folder
SKETCH = Stage(
    "sketch",
    "Sketch per-example gradients at the base model.",
    "sketch",
    "DATASET.safetensors",
    "split",
    "merit_fast.sketch.config:SketchConfig",
)
SPLIT = Stage(
    "split",
    "Group the datasets along their conflict axes, from the sketches.",
    "split",
    "split.json",
    "split",
    "merit_fast.split.config:SplitConfig",
)
TRAIN = Stage(
    "train",
    "Fine-tune every branch and the control arms.",
    "branches",
    "BRANCH/branch.json",
    "train",
    "merit_fast.train.config:TrainConfig",
)
MERGE = Stage(
    "merge",
    "Merge a run's branches by their token counts, or merge any checkpoints.",
    "merged",
    "ARM/model.safetensors.index.json",
    "merge",
    "merit_fast.merge.config:MergeConfig",
)
EVALUATE = Stage(
    "evaluate",
    "Measure every arm on held-out rows and on retention prompts.",
    "evaluate",
    "evaluate.json",
    "evaluate",
    "merit_fast.evaluate.config:EvaluateConfig",
)
AUDIT = Stage(
    "audit",
    "Check every merge against the theory of its gain.",
    "audit",
    "audit.json",
    "evaluate",
    command="evaluate",
)
REPORT = Stage("report", "Write the run's report.html.", "report", "report.html")

STAGES = (SKETCH, SPLIT, TRAIN, MERGE, EVALUATE, REPORT)  # the commands, in the order of a run
