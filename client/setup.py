"""Builds what cannot be written down in pyproject.toml: the typed stubs, and the protos beside them.

`python setup.py build_stubs` runs alone.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import ClassVar

from setuptools import Command, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from stubs import generate_stubs  # noqa: E402 - a build starts without the folder of setup.py on its path


class build_stubs(Command):
    """Generates ducat/*/v1/*_pb2.py, their .pyi and the gRPC stubs from proto/."""

    description = "generate the typed stubs of proto/"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = []

    def initialize_options(self) -> None: ...

    def finalize_options(self) -> None: ...

    def run(self) -> None:
        generate_stubs(ROOT / "proto", ROOT)


class build_package(build_py):
    """Puts the protos into the wheel, at ducat/protos, for callers in other languages and for tools."""

    def run(self) -> None:
        self.run_command("build_stubs")
        super().run()
        if not self.editable_mode:
            for path in sorted((ROOT / "proto").glob("**/*.proto")):
                inner = path.relative_to(ROOT / "proto")
                target = Path(self.build_lib, "ducat", "protos", *[part for part in inner.parts if part != "vendor"])
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)


generate_stubs(ROOT / "proto", ROOT)  # before setup() looks for packages: most are generated
setup(cmdclass={"build_py": build_package, "build_stubs": build_stubs})
