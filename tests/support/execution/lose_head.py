"""Kills the head of a Ray cluster under a driver, and prints how driver and unit end, as JSON.

    python lose_head.py FOLDER

A process of its own: Ray ends every process that is connected to a head that is gone.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_gcs_rpc_server_reconnect_timeout_s": "2"}

from ray.cluster_utils import Cluster

folder = Path(sys.argv[1])
pid_file = folder / "pid"
UNIT = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(300)"
DRIVER = f"""
import sys
from merit_fast.execution.command import UnitCommand
from merit_fast.execution.on_ray import RayExecutor
executor = RayExecutor(1, address=sys.argv[1])
executor.start(UnitCommand("a", (sys.executable, "-c", {UNIT!r}), {str(folder / "a.log")!r}))
print(executor.wait())
"""


def wait_until(is_met: object, seconds: float) -> bool:
    assert callable(is_met)
    end = time.monotonic() + seconds
    while not is_met() and time.monotonic() < end:
        time.sleep(0.05)
    return bool(is_met())


cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
assert cluster.head_node is not None
driver = subprocess.Popen(
    [sys.executable, "-c", DRIVER, cluster.address],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
)
try:
    assert wait_until(lambda: pid_file.exists() and pid_file.read_text(), 90)
    cluster.head_node.all_processes["gcs_server"][0].process.kill()
    code = driver.wait(90)
    unit = Path("/proc") / pid_file.read_text()
    has_ended = wait_until(lambda: not unit.exists(), 60)
    print(json.dumps({"driver": code, "unit has ended": has_ended}))
finally:
    driver.kill()
    cluster.shutdown()  # type: ignore[no-untyped-call]
