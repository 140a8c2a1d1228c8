"""Builds what cannot be written down in pyproject.toml: the typed stubs of proto/ and the Cython extensions of
wallet_core/.

`python setup.py build_stubs` and `python setup.py build_ext --inplace` run each alone.
`DUCAT_CYTHON_DEBUG=1` builds the extensions with bounds, overflow and initialisation checks on.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PROTO = ROOT / "proto"
EXTENSION_SOURCES = (
    "wallet_core/engine/_engine.pyx",
    "wallet_core/event_log/_file.pyx",
    "wallet_core/shard/_host.pyx",
)
NATIVE_SUFFIXES = (".pyx", ".pxd", ".pxi", ".h")
DEBUG = os.environ.get("DUCAT_CYTHON_DEBUG") == "1"
MARCH = os.environ.get("DUCAT_MARCH", "")


class build_stubs(Command):
    """Generates ducat/*/v1/*_pb2.py, their .pyi and the gRPC stubs, and buf/validate, from proto/."""

    description = "generate the typed stubs of proto/"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = []

    def initialize_options(self) -> None: ...

    def finalize_options(self) -> None: ...

    def run(self) -> None:
        generate_stubs()


def generate_stubs() -> None:
    from grpc_tools import protoc

    ours = sorted(PROTO.glob("ducat/**/*.proto"))
    vendored = sorted((PROTO / "vendor").glob("**/*.proto"))
    well_known = Path(protoc.__file__).parent / "_proto"
    include = [
        f"-I{PROTO / 'vendor'}",
        f"-I{PROTO}",
        f"-I{well_known}",
    ]  # the inner root first, or protoc sees validate.proto twice
    plugin = shutil.which("protoc-gen-mypy_grpc", path=sysconfig.get_path("scripts")) or shutil.which(
        "protoc-gen-mypy_grpc"
    )
    if plugin is None:
        raise SystemExit("build_stubs: protoc-gen-mypy_grpc is missing; fix: pip install mypy-protobuf")
    messages = ["protoc", *include, f"--python_out={ROOT}", f"--pyi_out={ROOT}"]
    if protoc.main([*messages, *map(str, ours), *map(str, vendored)]) != 0:
        raise SystemExit("build_stubs: protoc refused proto/; its message is above")
    services = [path for path in ours if "\nservice " in path.read_text()]
    grpc = ["protoc", *include, f"--grpc_python_out={ROOT}", f"--plugin=protoc-gen-mypy_grpc={plugin}"]
    if protoc.main([*grpc, f"--mypy_grpc_out={ROOT}", *map(str, services)]) != 0:
        raise SystemExit("build_stubs: the gRPC plugin refused proto/; its message is above")
    for package in {path.parent for path in (ROOT / "ducat").glob("*/v1/*_pb2.py")}:
        for folder in (package, package.parent):
            init = folder / "__init__.py"
            if not init.exists():
                init.write_text("")
    for folder in (ROOT / "buf", ROOT / "buf" / "validate"):
        (folder / "__init__.py").write_text("")


class build_extensions(build_ext):
    """Cythonizes and compiles; finds a compiler or says in one line how to get one."""

    def run(self) -> None:
        self.run_command("build_stubs")
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


class build_package(build_py):
    def run(self) -> None:
        self.run_command("build_stubs")
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


if not (ROOT / "buf" / "validate" / "validate_pb2.py").exists():
    generate_stubs()  # before setup() looks for packages, or an editable install would not know those that are generated
setup(
    ext_modules=[extension(source) for source in EXTENSION_SOURCES if (ROOT / source).exists()],
    cmdclass={"build_ext": build_extensions, "build_py": build_package, "build_stubs": build_stubs},
)
