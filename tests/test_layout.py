"""The house keeps its order: files stay short, rooms import only from floors below, and nothing goes in a circle."""

import ast
from pathlib import Path
from statistics import median

import networkx as nx
import pytest

import decaf_lora

SOURCE = Path(decaf_lora.__file__).parent
FLOORS = (
    {"errors", "extras", "lazy", "precision", "randomness", "timing", "yaml_file", "frozen", "validation", "threats"}
    | {"eigen"},
    {"config", "kinds"},
    {"lowrank", "graphs", "partition"},
    {"adapters"},
    {"algorithms"},
    {"engines"},
    {"exchange"},
    {"data"},
    {"tasks"},
    {"optimizers", "batches", "separation", "calibration", "untouched", "evaluation", "training", "consensus"}
    | {"attackers", "privacy"},
    {"records", "statistics"},
    {"report"},
    {"run"},
    {"recipes", "runs"},
    {"plan", "tune", "init", "predict", "check", "federation"},
    {"integrations"},
    {"cli"},
    {"__main__"},
)
"""Rooms (files or folders of the package) from the ground up. A room may use its own floor and those below."""

LONGEST, MEDIAN = 520, 150


def _modules() -> dict[str, Path]:
    """Dotted name -> file of every module that is written by hand."""
    files = [p for p in SOURCE.rglob("*.py") if not p.stem.endswith(("_pb2", "_pb2_grpc"))]
    return {".".join(p.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__"): p for p in files}


def _imports(name: str, path: Path, modules: dict[str, Path]) -> set[str]:
    """Modules of the package that the module `name` imports anywhere, functions and type checking included."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in modules else base)
    return {m for m in found if m in modules and m != name}


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.fixture(scope="module")
def modules() -> dict[str, Path]:
    return _modules()


def test_no_file_is_long(modules: dict[str, Path]) -> None:
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules.items()}
    assert {name: n for name, n in lengths.items() if n > LONGEST} == {}
    assert median(lengths.values()) <= MEDIAN


def test_every_room_has_a_floor(modules: dict[str, Path]) -> None:
    assert {_room(m) for m in modules} - {""} <= set().union(*FLOORS)


def test_rooms_import_only_downwards(modules: dict[str, Path]) -> None:
    floor = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
    upwards = [
        f"{name} -> {other}"
        for name, path in modules.items()
        for other in _imports(name, path, modules)
        if _room(name) and _room(other) and floor[_room(other)] > floor[_room(name)]
    ]
    assert upwards == []


def test_no_module_imports_in_a_circle(modules: dict[str, Path]) -> None:
    # The package itself names all rooms lazily, and everybody may read its version: it is no link of a chain.
    graph = nx.DiGraph()
    for name, path in modules.items():
        graph.add_edges_from((name, other) for other in _imports(name, path, modules) if "." in name and "." in other)
    assert [sorted(part) for part in nx.strongly_connected_components(graph) if len(part) > 1] == []


def test_the_check_sees_a_circle_and_a_step_upwards(tmp_path: Path) -> None:
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text("def f():\n    from p.two import g\n")
    two.write_text("from . import one\n")
    known = {"p.one": one, "p.two": two}
    assert _imports("p.one", one, known) == {"p.two"}
    assert _imports("p.two", two, known) == {"p.one"}
