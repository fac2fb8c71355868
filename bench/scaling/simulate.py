"""Hours of a run on 8 to 64 hosts of 8 GPUs, by units and as synchronous training; on paper.

    python -m bench.scaling.simulate [--draws 400] [--json]

A host trains ``rows_per_s`` rows of a 7B model: 1.6 M rows in 43 h 18 on 8 A100, arXiv 2606.01717;
other sizes by their parameters. Of K groups each has hosts / K hosts, which train it together.

    branch          = rows / K / (rows_per_s * hosts / K) + all-reduces within the group's hosts
    synchronous     = rows / (rows_per_s * hosts) + all-reduces among all hosts
    an all-reduce   = 2 (H - 1) / H * 2 P / bandwidth seconds, less 2/3 of the step it hides behind
    sketch          = 176 * examples * 1.06 rows (the ratio of docs/benchmarks.md), on all GPUs
    merge           = 2 P (K + 1) / disk bytes per second

Hosts die at random (exponential, ``mean_hours`` each) and cost the hosts that wait for them half a
checkpoint's interval and a restart: one group by units, all hosts in synchronous training.
"""

import argparse
import json
import random
from dataclasses import asdict, dataclass
from statistics import mean

ROWS = 1_600_000
DATASETS = 176
PAPER_S = (43 * 60 + 18) * 60  # of the joint run, on one host
BATCH_ROWS = 128
SKETCH_RATIO = 1.06
SPLIT_S = 10.0  # 176 datasets; `python -m bench.split.scale` has smaller and larger ones
DISK_BYTES_S = 2e9
OVERLAP = 2 / 3
CHECKPOINT_S = 1800.0
RESTART_S = 300.0
MEAN_HOURS = 1000.0  # between two deaths of one host


@dataclass(frozen=True)
class Cluster:
    """Hosts of 8 GPUs. ``bandwidth``: bytes per second between two hosts."""

    hosts: int
    bandwidth: float
    parameters: float = 7e9

    @property
    def row_s(self) -> float:
        """Seconds of one row on one host."""
        return PAPER_S / ROWS * self.parameters / 7e9

    def training_s(self, rows: float, hosts: int) -> float:
        """Seconds of ``rows`` on hosts that train together."""
        step = BATCH_ROWS * self.row_s / hosts
        reduce = 2 * (hosts - 1) / hosts * 2 * self.parameters / self.bandwidth
        return rows / BATCH_ROWS * (step + max(0.0, reduce - OVERLAP * step))


@dataclass(frozen=True)
class Outcome:
    """Hours of one run, and the bytes that one host sends to others."""

    hours: float
    with_deaths: float
    sent_bytes: float
    overhead: float  # sketch, split and merge, as a share of training


def synchronous(cluster: Cluster, draw: random.Random) -> Outcome:
    """One model, trained by all hosts together."""
    seconds = cluster.training_s(ROWS, cluster.hosts)
    lost = _lost_s(seconds, cluster.hosts, draw)
    steps = ROWS / BATCH_ROWS
    sent = steps * 2 * (cluster.hosts - 1) / cluster.hosts * 2 * cluster.parameters
    return Outcome(seconds / 3600, (seconds + lost) / 3600, sent, 0.0)


def by_units(
    cluster: Cluster, draw: random.Random, groups: int = 8, examples: int = 200
) -> Outcome:
    """K branches that never wait for each other, after sketch and split, before one merge."""
    hosts = cluster.hosts // groups
    branch = cluster.training_s(ROWS / groups, hosts)
    rows = DATASETS * examples * SKETCH_RATIO
    sketch = rows * cluster.row_s / cluster.hosts
    merge = 2 * cluster.parameters * (groups + 1) / DISK_BYTES_S
    overhead = sketch + SPLIT_S + merge
    ends = [branch + _lost_s(branch, hosts, draw) for _ in range(groups)]
    steps = ROWS / groups / BATCH_ROWS
    within = steps * 2 * (hosts - 1) / hosts * 2 * cluster.parameters
    sent = within + 2 * cluster.parameters / hosts
    hours = (overhead + branch) / 3600
    return Outcome(hours, (overhead + max(ends)) / 3600, sent, overhead / branch)


def _lost_s(seconds: float, hosts: int, draw: random.Random) -> float:
    """Seconds that deaths cost hosts that train together."""
    lost = 0.0
    at = draw.expovariate(hosts / (MEAN_HOURS * 3600))
    while at < seconds + lost:
        lost += CHECKPOINT_S / 2 + RESTART_S
        at += draw.expovariate(hosts / (MEAN_HOURS * 3600))
    return lost


def table(draws: int) -> list[dict[str, float]]:
    """A row for every model, number of hosts and bandwidth; means over the draws of deaths."""
    rows = []
    for parameters in (7e9, 70e9):
        for hosts in (8, 16, 32, 64):
            for bandwidth in (1.25e9, 12.5e9, 50e9):
                cluster = Cluster(hosts, bandwidth, parameters)
                draw = random.Random(0)
                joint = [synchronous(cluster, draw) for _ in range(draws)]
                units = [by_units(cluster, draw) for _ in range(draws)]
                few = by_units(cluster, draw, examples=40)
                rows.append(
                    asdict(cluster)
                    | {
                        "synchronous_h": joint[0].hours,
                        "units_h": units[0].hours,
                        "synchronous_with_deaths_h": mean(each.with_deaths for each in joint),
                        "units_with_deaths_h": mean(each.with_deaths for each in units),
                        "synchronous_sent_bytes": joint[0].sent_bytes,
                        "units_sent_bytes": units[0].sent_bytes,
                        "overhead": units[0].overhead,
                        "overhead_of_40_examples": few.overhead,
                    }
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = table(arguments.draws)
    if arguments.json:
        print(json.dumps({"rows": rows}))
        return
    print(
        "| model | hosts | between hosts | synchronous, h | by units, h | with deaths, h | sent |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        terabytes = [row[f"{kind}_sent_bytes"] / 1e12 for kind in ("synchronous", "units")]
        print(
            f"| {row['parameters'] / 1e9:.0f}B | {row['hosts']:.0f} "
            f"| {row['bandwidth'] * 8 / 1e9:.0f} Gbit/s "
            f"| {row['synchronous_h']:.1f} | {row['units_h']:.1f} "
            f"| {row['synchronous_with_deaths_h']:.1f} / {row['units_with_deaths_h']:.1f} "
            f"| {terabytes[0]:.0f} / {terabytes[1]:.3g} TB |"
        )
    first = rows[0]
    shares = (first["overhead"], first["overhead_of_40_examples"])
    print("sketch, split and merge of 7B on 8 hosts, as a share of training: ", end="")
    print(f"{shares[0]:.2%} with 200 examples a dataset, {shares[1]:.2%} with 40")


if __name__ == "__main__":
    main()
