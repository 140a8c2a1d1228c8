"""Style is a test: format, lint, types, import direction, protos, the tree in the README, dead files."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
ROOMS = ("ducat", "kernel", "runtime", "payment", "executor", "wallet_core", "ledger", "gateway", "sandbox", "ops")
NAMES_OF_NOTHING = {"utils", "util", "helpers", "helper", "misc", "manager", "managers", "common_utils"}


def run(*command: str, timeout_s: float = 240) -> None:
    """Runs a tool at the root; its output is the failure's text."""
    done = subprocess.run(
        [str(BIN / command[0]), *command[1:]], cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-8000:]}\n{done.stderr[-4000:]}"


def tracked_files() -> list[Path]:
    """Every file that git knows, or, outside a checkout, nothing."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def test_lint() -> None:
    run("ruff", "check", ".")


def test_format() -> None:
    run("ruff", "format", "--check", ".")


@pytest.mark.timeout(300)
def test_types() -> None:
    run("mypy")


def test_import_direction() -> None:
    run("lint-imports")


def test_proto_lint() -> None:
    run("buf", "lint", "proto")


def test_proto_has_no_breaking_change() -> None:
    before = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", "HEAD~1:proto"], cwd=ROOT, capture_output=True, check=False
    )
    if before.returncode != 0:
        pytest.skip("no earlier commit with protos to compare with")
    run("buf", "breaking", "proto", "--against", ".git#ref=HEAD~1,subdir=proto")


def test_engine_sources_touch_nothing_outside() -> None:
    """What import-linter cannot see: the imports inside .pyx files of the engine."""
    allowed = re.compile(r"^(cimport )?(array|cython|cpython|libc|wallet_core|kernel|__future__)")
    for path in sorted((ROOT / "wallet_core" / "engine").glob("*.p[yx]*")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            found = re.match(r"^\s*(?:from\s+([\w.]+)\s+c?import|c?import\s+([\w.]+))", line)
            if found and path.suffix in (".pyx", ".pxd", ".pxi"):
                module = found.group(1) or found.group(2)
                assert allowed.match(module), f"{path.name}:{number}: the engine must not import {module}"


def test_readme_tree_is_the_one_on_disk() -> None:
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"<!-- tree -->\n```\n(.*?)```", readme, re.DOTALL)
    assert block, "README.md: the tree between <!-- tree --> and ``` is missing"
    named = {line.split()[0].rstrip("/") for line in block.group(1).splitlines() if line and not line.startswith(" ")}
    top = {path.relative_to(ROOT).parts[0] for path in tracked_files()}
    hidden = {name for name in top if name.startswith(".")}
    assert named == top - hidden, f"only in the README: {named - top}; only on disk: {top - hidden - named}"
    for line in block.group(1).splitlines():
        if line.startswith("  "):
            inner = line.split()[0].rstrip("/")
            found = any(path.match(f"*/{inner}") or inner in path.parts for path in tracked_files())
            assert found, f"README.md: no {inner} on disk"


def test_no_room_is_called_nothing() -> None:
    for path in tracked_files():
        assert not NAMES_OF_NOTHING & {part.removesuffix(".py") for part in path.relative_to(ROOT).parts}, path


def test_nothing_unfinished_and_no_host_of_a_registry_is_committed() -> None:
    unfinished = re.compile(r"\b(TODO|FIXME)\b")
    names = ("pypi", "pythonhosted", r"repo1?\.maven", r"registry\.npmjs", r"deb\.debian")
    hosts = re.compile(rf"({'|'.join(names)})\.org|crates\.io")
    for path in tracked_files():
        if "vendor" in path.parts or path == Path(__file__) or path.suffix in (".bin", ".seg", ".lock"):
            continue
        text = path.read_text(errors="replace")
        assert not hosts.search(text), f"{path}: names a registry's host"
        if path.suffix in (".py", ".pyx", ".proto", ".sql"):
            assert not unfinished.search(text), f"{path}: {unfinished.search(text)}"


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = list(project["project"]["dependencies"])
    wanted += [name for extra in project["project"]["optional-dependencies"].values() for name in extra]
    wanted += [name for group in project["dependency-groups"].values() for name in group]
    reasons = (ROOT / "docs" / "dependencies.md").read_text()
    lock = (ROOT / "requirements.lock").read_text().lower()
    for requirement in wanted:
        if requirement.startswith("ducat-client"):
            continue  # the other distribution of this tree
        name = re.split(r"[<>=\[;~! ]", requirement)[0]
        assert re.search(rf"\b{re.escape(name)}\b", reasons), f"docs/dependencies.md: no reason for {name}"
        assert f"\n{name.lower()}==" in f"\n{lock}", f"requirements.lock: {name} is not pinned; run: make lock"


def test_packages_say_what_they_are_for() -> None:
    for room in ROOMS:
        text = (ROOT / room / "__init__.py").read_text()
        assert text.startswith('"""'), f"{room}/__init__.py: one docstring that says what the room is for"


def test_links_in_the_docs_lead_somewhere() -> None:
    for path in tracked_files():
        if path.suffix == ".md":
            for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", path.read_text()):
                assert (path.parent / target).exists(), f"{path.relative_to(ROOT)}: broken link {target}"


def test_comments_are_as_they_were_written() -> None:
    """What a formatter breaks at its line length: rules of dashes, and paragraphs with a word or two alone in the middle."""
    for path in tracked_files():
        if path.suffix not in (".py", ".pyx", ".pxd", ".pxi"):
            continue
        text = path.read_text()
        assert not re.search(r"^\s*# ?-{5,}\s*$", text, re.MULTILINE), f"{path}: a comment that is nothing but dashes"
        if path.suffix == ".py":
            for number, line in orphans(text):
                raise AssertionError(
                    f"{path.relative_to(ROOT)}:{number}: {line!r} stands alone; wrap the paragraph again"
                )


def orphans(text: str) -> Iterator[tuple[int, str]]:
    """Lines of one or two words within a paragraph of a docstring, to which more of the next line would have fitted."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if not (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        ):
            continue
        indent = node.col_offset
        for at in range(node.lineno, (node.end_lineno or node.lineno) - 1):
            before, line, after = (lines[at + step] for step in (-1, 0, 1))
            are_prose = all(len(one) - len(one.lstrip()) == indent and one.strip() for one in (before, line, after))
            if are_prose and len(line.split()) <= 2 and len(before) > 60 and re.match(r"[a-z]", after.strip()):
                yield at + 1, line.strip()
