"""Modules: listed in docs/architecture.md, without cycles, private names kept; docs resolve."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "slm_lora"


def modules_of_the_page() -> set[str]:
    """Paths in the tree of docs/architecture.md; two spaces of indentation are one folder."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = page.split("## Every module", 1)[1].split("```")[1].strip("\n").splitlines()
    modules, folders = set(), [""]
    for line in tree[1:]:
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        if name.endswith(("/", ".py")):
            folders[depth:] = [folders[depth - 1] + name]
            modules.add(folders[depth])
    return modules


def test_architecture_page_lists_every_module() -> None:
    page = modules_of_the_page()
    files = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")}
    modules = {path.as_posix() for path in files if not path.name.startswith("__")}
    # A folder that is named without its files is one line.
    unlisted_folders = {
        name
        for name in page
        if name.endswith("/") and not any(path != name and path.startswith(name) for path in page)
    }
    listed = {name for name in modules if not name.startswith(tuple(unlisted_folders))}
    assert listed == {name for name in page if name.endswith(".py")}
    assert all((PACKAGE / name).is_dir() for name in page if name.endswith("/"))


def test_lowest_allowed_versions_equal_the_tested_ones() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    floors = dict(requirement.split(">=") for requirement in project["dependencies"])
    pinned = dict(
        line.split("==")
        for line in (ROOT / "requirements-lowest.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    )

    def padded(version: str) -> list[int]:
        return [*map(int, re.findall(r"\d+", version)), 0, 0, 0][:3]

    # (A release of that very number may not exist; the next patch is as low as can be had.)
    wrong = [
        name for name, floor in floors.items() if padded(pinned[name])[:2] != padded(floor)[:2]
    ]
    assert not wrong


def test_imports_inside_strings_and_docs_resolve() -> None:
    """Scripts that tests and benchmarks run as text, and snippets of the docs, import what is
    there."""
    files = [
        *(ROOT / "tests").rglob("*.py"),
        *(ROOT / "benchmarks").rglob("*.py"),
        *(ROOT / "docs").rglob("*.md"),
        ROOT / "README.md",
    ]
    imports = {
        (module, name.strip().split(" as ")[0])
        for path in files
        for module, names in re.findall(
            r"from (slm_lora[\w.]*) import ([\w, ]+)", path.read_text(encoding="utf-8")
        )
        for name in names.split(",")
        if name.strip()
    }
    assert len(imports) > 100
    missing = []
    for module, name in sorted(imports):
        try:
            exists = hasattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("slm_lora"):
                raise
            continue  # an extra that is not installed
        if not exists and importlib.util.find_spec(f"{module}.{name}") is None:
            missing.append(f"from {module} import {name}")
    assert not missing


def test_imports_have_no_cycles() -> None:
    """Modules form a graph without cycles; imports for type checkers alone are left out."""
    names = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in PACKAGE.rglob("*.py")
    }
    imports = {name: imported(name, names) for name in names}
    assert sum(map(len, imports.values())) > 200
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"cycle: {' → '.join([*above[above.index(name) :], name])}"
        if name in done:
            return
        for module in sorted(imports[name]):
            visit(module, (*above, name))
        done.add(name)

    for name in sorted(names):
        visit(name, ())


def imported(name: str, names: set[str]) -> set[str]:
    """Modules of the package that a module imports, also inside functions."""
    path = PACKAGE.parent.joinpath(*name.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    modules = set()
    for node in ast.walk(tree):
        if id(node) not in for_types and isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                modules.add(full if full in names else node.module)
    return (modules & names) - {name}


def test_no_private_name_is_used_across_modules() -> None:
    """A name with a leading underscore belongs to its module."""
    uses = []
    for folder in ("src", "tests", "benchmarks", "docs"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            uses += private_uses(path)
    assert not uses


def private_uses(path: Path) -> list[str]:
    """Private names of this project's modules that a file imports or reads as attributes."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules: set[str] = set()
    uses = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        if not node.level and not node.module.startswith(("slm_lora", "tests")):
            continue
        for alias in node.names:
            modules.add(alias.asname or alias.name)
            if alias.name.startswith("_") and not alias.name.startswith("__"):
                uses.append(f"{path.name}:{node.lineno} {node.module}.{alias.name}")
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in modules
            and node.value.id.islower()
            and node.attr.startswith("_")
            and not node.attr.startswith("__")
        ):
            uses.append(f"{path.name}:{node.lineno} {node.value.id}.{node.attr}")
    return uses


def test_workflow_and_docs_call_targets_that_the_makefile_has() -> None:
    targets = set(
        re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))
    jobs = workflow["jobs"]["make"]["strategy"]["matrix"]["include"]
    called = {job["target"] for job in jobs}
    for page in (
        "README.md",
        "CONTRIBUTING.md",
        ".ci/run",
        *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
    ):
        text = (ROOT / page).read_text(encoding="utf-8")
        called |= set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE))
    assert called <= targets
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [hook["id"] for hook in hooks["repos"][0]["hooks"]]
