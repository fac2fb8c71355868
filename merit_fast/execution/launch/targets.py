"""The targets of ``launch``: for each the function that makes its files, and what it reads."""

from collections.abc import Callable
from dataclasses import dataclass

from merit_fast.execution.launch.hf_jobs import hf_files
from merit_fast.execution.launch.job import Launch
from merit_fast.execution.launch.kubernetes import kubernetes_files
from merit_fast.execution.launch.ray_job import ray_files
from merit_fast.execution.launch.shell import shell_files
from merit_fast.execution.launch.sky import sky_files
from merit_fast.execution.launch.slurm import slurm_files


@dataclass(frozen=True)
class Target:
    """One target.

    Attributes:
        make: returns the files by their names.
        needs: options without which there are no files.
        reads: options that it reads too.
        mounts: whether the jobs see only a storage, which is mounted at the current folder; with
            a scratch folder nothing is mounted, and they bring the config along.
        is_here: whether all units run on this machine.
        drives: whether a driver does all units, so that they need not be known.
    """

    make: Callable[[Launch], dict[str, str]]
    needs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    mounts: bool = False
    is_here: bool = False
    drives: bool = False


TARGETS = {
    "shell": Target(shell_files, (), ("gpus", "workers"), is_here=True),
    "slurm": Target(
        slurm_files,
        (),
        ("gpus", "cpus", "workers", "minutes", "partition", "storage", "scratch"),
    ),
    "sky": Target(
        sky_files,
        ("storage",),
        ("gpus", "accelerator", "cpus", "image", "install", "scratch", "secret"),
        mounts=True,
    ),
    "ray": Target(
        ray_files,
        (),
        ("gpus", "workers", "image", "install", "storage", "scratch"),
        drives=True,
    ),
    "k8s-job": Target(
        kubernetes_files,
        ("image", "storage"),
        ("gpus", "cpus", "workers", "minutes", "scratch", "secret"),
        mounts=True,
    ),
    "hf-jobs": Target(
        hf_files,
        ("image", "storage"),
        ("gpus", "accelerator", "minutes", "scratch", "secret"),
        mounts=True,
    ),
}


def readers(option: str) -> list[str]:
    """The targets that read an option."""
    return [
        name for name, target in TARGETS.items() if option in target.needs or option in target.reads
    ]
