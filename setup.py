"""Builds what cannot be written down in pyproject.toml: the Cython extensions of wallet_core/. (client/setup.py builds the stubs.)

`python setup.py build_ext --inplace` runs alone.
`DUCAT_CYTHON_DEBUG=1` builds the extensions with bounds, overflow and initialisation checks on.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
EXTENSION_SOURCES = (
    "wallet_core/engine/_engine.pyx",
    "wallet_core/event_log/_file.pyx",
    "wallet_core/shard/_host.pyx",
)
NATIVE_SUFFIXES = (".pyx", ".pxd", ".pxi", ".h")
DEBUG = os.environ.get("DUCAT_CYTHON_DEBUG") == "1"
MARCH = os.environ.get("DUCAT_MARCH", "")


class build_extensions(build_ext):
    """Cythonizes and compiles; finds a compiler or says in one line how to get one."""

    def run(self) -> None:
        use_compiler_of_machine_or_wheel()
        from Cython.Build import cythonize

        self.extensions = cythonize(
            self.extensions,
            build_dir="build/cython",
            nthreads=os.cpu_count() or 1,
            quiet=True,
            compiler_directives={
                "language_level": 3,
                "boundscheck": DEBUG,
                "wraparound": False,
                "initializedcheck": DEBUG,
                "cdivision": True,
                "embedsignature": True,
                "freethreading_compatible": False,
            },
        )
        for extension in self.extensions:
            extension._needs_stub = False
        super().run()


def use_compiler_of_machine_or_wheel() -> None:
    """Leaves the environment alone where a C compiler answers; else points CC at the ziglang wheel; else ends with
    the fix."""
    wanted = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(wanted) or (not os.environ.get("CC") and (shutil.which("cc") or shutil.which("gcc"))):
        if not shutil.which(wanted):
            os.environ["CC"] = shutil.which("cc") or "gcc"
        return
    zig = [sys.executable, "-m", "ziglang", "version"]
    if subprocess.run(zig, capture_output=True, check=False).returncode == 0:
        os.environ["CC"] = f"{sys.executable} -m ziglang cc"
        os.environ["LDSHARED"] = f"{sys.executable} -m ziglang cc -shared"
        return
    raise SystemExit(
        "ducat: no C compiler found; fix: install gcc or clang (Debian: apt-get install gcc), or pip install ziglang"
    )


def extension(source: str) -> Extension:
    flags = ["-O1", "-g", "-UNDEBUG"] if DEBUG else ["-O3", "-g0", "-DNDEBUG"]
    if MARCH:
        flags.append(f"-march={MARCH}")
    return Extension(
        source.removesuffix(".pyx").replace("/", "."),
        [source],
        depends=[str(path) for path in sorted(Path("wallet_core").glob("*/*")) if path.suffix in NATIVE_SUFFIXES],
        include_dirs=["."],
        extra_compile_args=[*flags, "-Wno-unused-function", "-pthread"],
        extra_link_args=["-pthread"],
    )


setup(
    ext_modules=[extension(source) for source in EXTENSION_SOURCES if (ROOT / source).exists()],
    cmdclass={"build_ext": build_extensions},
)
