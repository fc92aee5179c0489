"""Imports point one way, and what must run without torch does. One table says who may know whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import edgetune

ROOT = Path(edgetune.__file__).parent

# room -> the rooms it may import. A room is a module of the package, or a folder with all that is in it.
ARROWS: dict[str, set[str]] = {
    # What knows nothing but words and numbers.
    "errors": set(),
    "units": {"errors"},
    "system": set(),
    "scratch": set(),
    "allocator": {"units"},
    "process": {"system", "units"},
    "runtimes": {"system"},
    "memory": {"allocator", "process", "system", "units"},
    "enforce": {"errors", "process", "system", "units"},
    # Devices.
    "profiles": {"errors", "units"},
    "detect": {"system", "units"},
    "devices": {"detect", "errors", "profiles", "system", "units"},
    # The arithmetic core.
    "cost": {"errors", "optim", "units"},
    "alast": {"cost", "errors"},
    "optim": {"errors"},
    "planner": {"cost", "errors", "optim", "units"},
    "methods": {"alast", "cost", "errors", "optim", "planner"},
    "shapes": {"cost", "errors", "units"},
    # Files in and out.
    "data": {"errors", "scratch", "system", "units"},
    "checkpoint": {"errors", "units"},
    "features": {"checkpoint", "errors", "scratch", "units"},
    "selections": {"checkpoint", "cost", "errors"},
    "report": {"checkpoint", "data", "errors", "units"},
    "settings": {"alast", "cost", "data", "enforce", "errors", "methods", "optim", "planner"},
    "regions": {"cost"},
    # What knows torch, or ONNX Runtime.
    "vit": {"checkpoint", "cost", "data", "errors", "regions", "shapes"},
    "artifacts": {"alast", "checkpoint", "cost", "data", "errors", "planner", "units"},
    "backends": {"artifacts", "checkpoint", "cost", "errors", "optim", "regions", "vit"},
    "engines": {"artifacts", "backends", "cost", "data", "errors", "optim", "planner", "runtimes", "settings", "vit"},
    "export": {
        "alast", "artifacts", "backends", "checkpoint", "cost", "data", "errors", "memory", "methods", "optim", "planner",
        "regions", "store", "system", "units", "vit",
    },
    "web": {"artifacts", "checkpoint", "errors"},
    # A run.
    "job": {"alast", "backends", "cost", "data", "errors", "methods", "planner", "report", "settings"},
    "replay": {"errors", "job", "planner", "units"},
    "probes": {"planner"},
    "warmup": {"data", "probes"},
    "caching": {"backends", "cost", "data", "features", "job", "planner", "replay", "settings"},
    "heads": {"caching", "data", "job", "planner", "probes", "replay"},
    "trainer": {"alast", "backends", "caching", "cost", "data", "errors", "job", "methods", "planner", "replay", "report"},
    "judge": {"devices", "errors", "memory", "profiles", "runtimes", "system", "units"},
    "guard": {"enforce", "errors", "judge", "memory", "planner", "replay", "units"},
    "own_images": {"checkpoint", "data"},
    "store": {
        "backends", "checkpoint", "cost", "data", "errors", "job", "methods", "planner", "report", "settings", "units",
    },
    "outcome": {
        "cost", "data", "errors", "job", "judge", "memory", "planner", "report", "settings", "store", "system", "units",
    },
    "inference": {
        "backends", "checkpoint", "cost", "data", "errors", "memory", "own_images", "report", "settings", "store", "system", "units", "vit",
    },
    "prepare": {
        "checkpoint", "cost", "data", "enforce", "engines", "errors", "features", "job", "judge", "memory", "methods", "planner",
        "profiles", "settings", "shapes", "system", "units", "warmup",
    },
    "look": {"backends", "cost", "data", "features", "planner", "probes"},
    "splits": {
        "allocator", "backends", "cost", "data", "errors", "features", "job", "look", "methods", "planner", "prepare", "settings", "units",
    },
    "session": {
        "backends", "caching", "checkpoint", "cost", "data", "engines", "errors", "features", "guard", "heads", "job", "methods", "outcome", "planner", "prepare",
        "replay", "report", "selections", "settings", "store", "trainer", "units",
    },
    "run": {
        "artifacts", "backends", "checkpoint", "data", "devices", "engines", "errors", "guard", "job", "memory", "own_images", "prepare", "replay", "report", "selections", "session",
        "settings", "splits", "system", "store",
    },
    # What people type.
    "cli": {
        "alast", "artifacts", "cost", "data", "devices", "enforce", "errors", "export", "inference", "job", "judge", "methods", "planner", "profiles",
        "report", "run", "runtimes", "settings", "shapes", "system", "units", "vit", "web",
    },
    "__main__": {"cli", "errors"},
}  # fmt: skip

# The only rooms that import these as they are imported; elsewhere it is done inside functions.
HEAVY = ("torch", "timm", "torchvision", "onnxruntime", "onnx", "executorch", "plotly")
TORCH_ROOMS = ("vit", "backends.pytorch", "export.graphs", "export.training", "export.parity", "export.inference")
# And what a run's core does without numpy too, so that a plan is answered in a blink.
PURE = ("errors", "units", "cost", "alast", "planner", "methods", "optim", "profiles", "shapes", "regions")


def _modules() -> Iterator[tuple[str, Path]]:
    """(name below `edgetune`, its file), packages under their own name."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if parts:
            yield ".".join(parts), path


MODULES = dict(_modules())


def _room(module: str) -> str:
    return module.split(".")[0]


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _statements(tree: ast.AST, *, inside_functions: bool) -> Iterator[ast.stmt]:
    """Import statements that run; those for a type checker alone do not."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif _is_type_checking(node):
            continue
        elif inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _statements(node, inside_functions=inside_functions)


def _imports(path: Path, *, inside_functions: bool) -> set[str]:
    """Full names of the modules that a file imports."""
    names: set[str] = set()
    for node in _statements(ast.parse(path.read_text(encoding="utf-8")), inside_functions=inside_functions):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        else:
            assert isinstance(node, ast.ImportFrom)
            assert not node.level, f"{path}: imports are written in full"
            base = node.module or ""
            for alias in node.names:
                full = f"{base}.{alias.name}"
                names.add(full if full.removeprefix("edgetune.") in MODULES else base)
    return names


def _own(names: set[str]) -> set[str]:
    return {name.removeprefix("edgetune.") for name in names if name.startswith("edgetune.")}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    room = _room(module)
    assert room in ARROWS, f"{module} is new: add it to ARROWS in {__file__}, with the rooms it may import"
    targets = {_room(name) for name in _own(_imports(MODULES[module], inside_functions=True))} - {room}
    assert targets <= ARROWS[room], (
        f"{module} imports {', '.join(sorted(targets - ARROWS[room]))}, which {room} may not know. Move what it needs "
        f"down, or, if the design changes, add the arrow to ARROWS in {__file__}"
    )


def test_the_table_has_no_cycle_and_no_room_that_is_gone() -> None:
    order = list(TopologicalSorter(ARROWS).static_order())  # raises CycleError
    assert order[0] in ("errors", "system")
    assert set(ARROWS) == {_room(module) for module in MODULES}
    assert all(targets <= set(ARROWS) for targets in ARROWS.values())


def test_modules_of_one_room_import_each_other_in_one_direction() -> None:
    graph = {
        name: {other for other in _own(_imports(path, inside_functions=True)) if other != name}
        for name, path in MODULES.items()
    }
    list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith(TORCH_ROOMS)])
def test_heavy_packages_are_imported_where_they_are_needed_only(module: str) -> None:
    heavy = {name for name in _imports(MODULES[module], inside_functions=False) if _room(name) in HEAVY}
    assert not heavy, f"{module} imports {', '.join(heavy)} as it is imported: do it inside the function that needs it"


def _loaded(modules: list[str], forbidden: tuple[str, ...]) -> str:
    """What of the forbidden comes with which module, in a fresh process."""
    script = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module('edgetune.' + name)\n"
        f"    print(*(f'{{name}}: {{other}}' for other in {forbidden!r} if other in sys.modules), sep='\\n', end='')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_a_backend_nothing_imports_torch() -> None:
    modules = [name for name in MODULES if not name.startswith((*TORCH_ROOMS, "__main__"))]
    assert len(modules) > 40
    assert _loaded(modules, HEAVY) == ""


def test_the_core_imports_no_numpy_either() -> None:
    assert _loaded(list(PURE), (*HEAVY, "numpy", "PIL", "typer", "rich", "psutil")) == ""


def test_the_command_line_starts_without_what_only_a_run_needs() -> None:
    assert _loaded(["cli"], (*HEAVY, "numpy", "PIL")) == ""
