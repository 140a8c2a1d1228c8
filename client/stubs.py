"""Writes the typed Python stubs of the protos.

The rules of fields (`buf.validate` options) stay in the descriptors, where the servers read them, but the stubs do not import the module
that declares these options: a client has no use for it, and the package `buf` is not ours to install.
"""

from __future__ import annotations

import shutil
import sysconfig
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from google.protobuf.descriptor_pb2 import FileDescriptorProto

__all__ = ["generate_stubs"]

OPTIONS_ONLY = "buf/validate/validate.proto"


def generate_stubs(proto: Path, out: Path) -> None:
    """Writes ``out``/ducat/*/v1/*_pb2.py with their .pyi and gRPC stubs, from the protos below ``proto``.

    Raises SystemExit where protoc refuses a proto (it says why) or its plugin is missing.
    """
    from google.protobuf import descriptor_pb2
    from grpc_tools import protoc

    plugin = shutil.which("protoc-gen-mypy_grpc", path=sysconfig.get_path("scripts")) or shutil.which(
        "protoc-gen-mypy_grpc"
    )
    if plugin is None:
        raise SystemExit("stubs: protoc-gen-mypy_grpc is missing; fix: pip install mypy-protobuf")
    ours = [path.relative_to(proto).as_posix() for path in sorted(proto.glob("ducat/**/*.proto"))]
    include = [f"-I{folder}" for folder in (proto / "vendor", proto, Path(protoc.__file__).parent / "_proto")]
    with tempfile.TemporaryDirectory() as folder:
        described = Path(folder) / "described"
        wanted = [f"--descriptor_set_out={described}", "--include_imports", "--include_source_info"]
        # The vendored root comes first, or protoc sees validate.proto twice.
        _protoc([*include, *wanted, *ours])
        files = descriptor_pb2.FileDescriptorSet.FromString(described.read_bytes())
        for file in files.file:
            _forget_import(file, OPTIONS_ONLY)
        described.write_bytes(files.SerializeToString())
        given = f"--descriptor_set_in={described}"
        _protoc([given, f"--python_out={out}", f"--pyi_out={out}", *ours])
        services = [file.name for file in files.file if file.service and file.name in ours]
        grpc = [f"--grpc_python_out={out}", f"--plugin=protoc-gen-mypy_grpc={plugin}", f"--mypy_grpc_out={out}"]
        _protoc([given, *grpc, *services])
    for package in {(out / name).parent for name in ours}:
        for each in (package, package.parent):
            if not (each / "__init__.py").exists():
                (each / "__init__.py").write_text("")


def _forget_import(file: FileDescriptorProto, name: str) -> None:
    """Drops a dependency of a FileDescriptorProto and renumbers those that are named by their index."""
    dependencies = list(file.dependency)
    if name not in dependencies:
        return
    gone = dependencies.index(name)
    for numbers in (file.public_dependency, file.weak_dependency):
        numbers[:] = [number - (number > gone) for number in numbers if number != gone]
    del file.dependency[gone]


def _protoc(arguments: list[str]) -> None:
    from grpc_tools import protoc

    if protoc.main(["protoc", *arguments]) != 0:
        raise SystemExit("stubs: protoc refused the protos; its message is above")
