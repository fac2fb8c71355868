"""Benchmarks say on which machine and versions they ran."""


def pytest_report_header(config):
    from merit_fast.cli.doctor import diagnose

    facts = diagnose()
    versions = " ".join(f"{name}={version}" for name, version in facts["versions"].items())
    return f"{facts['machine']['processor']}, {facts['machine']['cores']} cores; {facts['native']}; {versions}"


def pytest_terminal_summary(terminalreporter, config):
    benchmarks = getattr(getattr(config, "_benchmarksession", None), "benchmarks", [])
    for bench in benchmarks:
        if "extra_peak_mib" in bench.extra_info:
            grew = f"peak memory grew by {bench.extra_info['extra_peak_mib']} MiB"
            terminalreporter.write_line(
                f"{bench.name}: {grew} (freed memory used again is not counted)"
            )
