"""Reports the machine, the versions and the extra memory of the pytest benchmarks."""

from typing import Any


def pytest_report_header(config: Any) -> str:
    from merit_fast.cli.doctor import diagnose

    facts = diagnose()
    versions = " ".join(f"{name}={version}" for name, version in facts["versions"].items())
    machine = f"{facts['machine']['processor']}, {facts['machine']['cores']} cores"
    return f"{machine}; {facts['native']}; {versions}"


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    benchmarks = getattr(getattr(config, "_benchmarksession", None), "benchmarks", [])
    for bench in benchmarks:
        if "extra_peak_mib" in bench.extra_info:
            grew = f"peak memory grew by {bench.extra_info['extra_peak_mib']} MiB"
            terminalreporter.write_line(
                f"{bench.name}: {grew} (freed memory used again is not counted)"
            )
