"""Builds merit_fast._C, the native CPU backend, from csrc/ with nanobind. All metadata is in pyproject.toml.

Without a C++ compiler, or with MERIT_FAST_NO_NATIVE=1, the package installs without it and runs the eager backend.
"""

import glob
import os
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError


class BuildNativeOrSayWhyNot(build_ext):
    def run(self) -> None:
        try:
            super().run()
        except (BaseError, CCompilerError) as error:
            print(
                "\nmerit_fast: the native CPU kernels were NOT built "
                f"({error}).\nThe eager backend will be used: correct, but slow. "
                "Install g++ 11 or newer and reinstall; `merit-fast doctor` shows the state.\n",
                file=sys.stderr,
            )


def native_module() -> Extension:
    import nanobind

    nanobind_source = nanobind.source_dir()
    robin_map = os.path.join(os.path.dirname(nanobind_source), "ext", "robin_map", "include")
    return Extension(
        "merit_fast._C",
        [
            *sorted(glob.glob("csrc/**/*.cpp", recursive=True)),
            os.path.relpath(os.path.join(nanobind_source, "nb_combined.cpp")),
        ],
        include_dirs=["csrc", nanobind.include_dir(), robin_map],
        depends=[  # without cuda/, which is no part of this module
            file
            for file in sorted(glob.glob("csrc/**/*.*", recursive=True))
            if not file.startswith("csrc/cuda")
        ],
        extra_compile_args=[
            "-O3",
            "-std=c++17",
            "-fopenmp",
            "-fvisibility=hidden",
            "-fno-strict-aliasing",
            "-fno-trapping-math",  # lets conversions and selects vectorize; no result changes
            "-fno-math-errno",  # lets square roots vectorize
            "-ffp-contract=off",  # no fused multiply-add: every ISA level gives the same bits
            "-DNDEBUG",
            "-DNB_COMPACT_ASSERTIONS",
            "-ffunction-sections",
            "-g0",
        ],
        extra_link_args=["-fopenmp", "-s", "-Wl,--gc-sections"],
        language="c++",
    )


without_native = os.environ.get("MERIT_FAST_NO_NATIVE", "") not in ("", "0")
setup(
    ext_modules=[] if without_native else [native_module()],
    cmdclass={"build_ext": BuildNativeOrSayWhyNot},
)
