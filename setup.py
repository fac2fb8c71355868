"""Builds merit_fast._C, the native CPU backend, from csrc/ with nanobind.

All metadata is in pyproject.toml. Without a C++ compiler, or with MERIT_FAST_NO_NATIVE=1, the
package installs without the native module and runs the eager backend. From Python 3.12 on the
module uses the stable ABI: one wheel (cp312-abi3) serves every later version.
"""

import os
import shutil
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist
from setuptools.errors import BaseError, CCompilerError

ROOT = Path(__file__).resolve().parent
CSRC = Path("csrc")
CUDA = CSRC / "cuda"  # compiled at run time: no part of the native module

STABLE_ABI = sys.version_info >= (3, 12) and not sysconfig.get_config_var("Py_GIL_DISABLED")
ABI_OPTIONS = {"bdist_wheel": {"py_limited_api": "cp312"}}
WITHOUT_NATIVE = os.environ.get("MERIT_FAST_NO_NATIVE", "") not in ("", "0")


class BuildNativeOrSayWhyNot(build_ext):
    """Builds the native module; a failure is reported and leaves the package without it."""

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

    def build_extensions(self) -> None:
        """Compiles the sources on all cores, one line of output each; setuptools takes one core."""
        compile_in_order = self.compiler.compile

        def compile_one(source: str, *rest: Any, **options: Any) -> list[str]:
            start = time.perf_counter()
            objects = compile_in_order([source], *rest, **options)
            print(f"  compiled {source} in {time.perf_counter() - start:.1f} s", flush=True)
            return objects

        def compile_sources(sources: list[str], *rest: Any, **options: Any) -> list[str]:
            with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
                jobs = [pool.submit(compile_one, source, *rest, **options) for source in sources]
                return [name for job in jobs for name in job.result()]

        self.compiler.compile = compile_sources
        super().build_extensions()

    def get_source_files(self) -> list[str]:
        """Sources that the sdist packs: those of the repository, and not nanobind's."""
        return [name for name in super().get_source_files() if Path(name).is_relative_to(CSRC)]


class SdistWithLinks(sdist):
    """Packs the repository's links as links; setuptools would pack the kernels twice."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        paths = {path for name in files for path in (Path(name), *Path(name).parents)}
        for link in sorted(path for path in paths if (ROOT / path).is_symlink()):
            packed = Path(base_dir, link)
            if packed.is_dir():
                shutil.rmtree(packed)
            else:
                packed.unlink()
            packed.symlink_to(os.readlink(ROOT / link))


def native_module() -> Extension:
    """The extension module; its sources are looked up when setup.py runs."""
    import nanobind

    nanobind_source = Path(nanobind.source_dir())
    robin_map = nanobind_source.parent / "ext" / "robin_map" / "include"
    files = sorted(file for file in CSRC.rglob("*.*") if not file.is_relative_to(CUDA))
    sources = [str(file) for file in files if file.suffix == ".cpp"]
    return Extension(
        "merit_fast._C",
        [*sources, str(nanobind_source / "nb_combined.cpp")],
        include_dirs=[str(CSRC), nanobind.include_dir(), str(robin_map)],
        depends=[str(file) for file in files],
        define_macros=[("Py_LIMITED_API", "0x030C0000")] if STABLE_ABI else [],
        py_limited_api=STABLE_ABI,
        extra_compile_args=[
            "-O3",
            "-std=c++17",
            "-fopenmp",
            "-fvisibility=hidden",
            "-fno-strict-aliasing",
            "-fno-trapping-math",  # lets conversions and selects vectorize; no result changes
            "-fno-math-errno",  # lets square roots vectorize
            "-ffp-contract=off",  # no fused multiply-add: every ISA level gives the same bits
            "-Wno-maybe-uninitialized",  # GCC 12 reports its own AVX-512 header, by both
            "-Wno-uninitialized",
            "-DNDEBUG",
            "-DNB_COMPACT_ASSERTIONS",
            "-ffunction-sections",
            "-g0",
        ],
        extra_link_args=["-fopenmp", "-s", "-Wl,--gc-sections"],
        language="c++",
    )


setup(
    ext_modules=[] if WITHOUT_NATIVE else [native_module()],
    cmdclass={"build_ext": BuildNativeOrSayWhyNot, "sdist": SdistWithLinks},
    options=ABI_OPTIONS if STABLE_ABI and not WITHOUT_NATIVE else {},
)
