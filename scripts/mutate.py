"""Would the tests notice? Changes one operator, number or condition at a time, and runs the tests of that file.

    python scripts/mutate.py --each 20 --minutes 60     goes on with benchmarks/results_mutation.json

cosmic-ray makes the mutants; a seeded sample of places is taken, one mutant a place, file after file in turn. Each runs
in a process forked from one that has imported torch, so that a mutant costs what its tests cost. A mutant that only
touches annotations or docstrings, or that another one equals, is none. Why one that no test kills
changes nothing stands by hand in the record ("survives because"), and is kept.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "results_mutation.json"
PACKAGE = "src/decaf_lora"
TESTS: dict[str, tuple[str, ...]] = {
    "lowrank.py": ("tests/test_lowrank.py",),
    "algorithms/**/*.py": ("tests/test_exchange.py", "tests/test_chain.py", "tests/test_algorithms.py"),
    "consensus.py": ("tests/test_consensus.py",),
    "optimizers.py": ("tests/test_training.py",),
    "exchange.py": ("tests/test_exchange.py", "tests/test_chain.py", "tests/test_alone.py", "tests/test_ranks.py"),
    "run.py": ("tests/test_exchange.py", "tests/test_run.py"),
    "training.py": ("tests/test_training.py",),
}
MORE = {
    "lowrank.py": ("test_consensus", "test_ranks", "test_merging", "test_run"),
    "algorithms/**/*.py": (
        "test_methods",
        "test_liars",
        "test_attackers",
        "test_tracking",
        "test_options",
        "test_ranks",
    ),
    "consensus.py": ("test_exchange", "test_ranks", "test_run", "test_merging"),
    "optimizers.py": ("test_privacy", "test_tracking", "test_run"),
    "exchange.py": ("test_methods", "test_tracking", "test_run", "test_settings", "test_plan"),
    "run.py": ("test_alone", "test_ranks", "test_attackers", "test_tracking", "test_own_split", "test_privacy"),
    "training.py": ("test_calibration", "test_run", "test_privacy", "test_ranks", "test_many_agents", "test_tracking"),
}
"""With `--again` survivors meet these files of tests/: a minute or two each."""


class Mutated(importlib.machinery.SourceFileLoader):
    """Loads a module from other source than its file's."""

    source = b""

    def get_code(self, fullname: str) -> Any:
        return self.source_to_code(self.source, self.path)


class Finder:
    """Finds one module's mutant; all others are found as ever."""

    def __init__(self, path: Path, source: str) -> None:
        parts = path.relative_to(ROOT / "src").with_suffix("").parts
        self.package = parts[-1] == "__init__"
        self.name = ".".join(parts[: -1 if self.package else None])
        self.loader = Mutated(self.name, str(path))
        self.loader.source = source.encode()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.name:
            return None
        where = [str(Path(self.loader.path).parent)] if self.package else None
        return importlib.util.spec_from_file_location(
            name, self.loader.path, loader=self.loader, submodule_search_locations=where
        )


def meaning(source: str) -> str:
    """The code without annotations and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign):
            node.annotation = ast.Constant(0)
        elif isinstance(node, ast.FunctionDef):
            node.returns = None
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript) and "Literal" in ast.dump(node.value):
            node.value = ast.Constant(0)
    return ast.dump(tree)


def mutants(path: Path, seed: int) -> Iterator[dict[str, Any]]:
    """Mutants of a file, in an order that the seed decides: one a place."""
    from cosmic_ray import mutating, plugins
    from cosmic_ray.ast import ast_nodes, get_ast

    code = path.read_text()
    places: dict[tuple[int, int], list[tuple[str, int]]] = {}
    nodes = list(ast_nodes(get_ast(code)))
    for name in sorted(plugins.operator_names()):
        kind = plugins.get_operator(name)
        if kind.arguments():
            continue
        found = [p for node in nodes for p in kind().mutation_positions(node)]
        for occurrence, (start, _) in enumerate(found):
            places.setdefault(start, []).append((name, occurrence))
    draw = random.Random(f"{seed}/{path.relative_to(ROOT)}")
    order = sorted(places)
    draw.shuffle(order)
    same = meaning(code)
    for place in order:
        name, occurrence = draw.choice(places[place])
        source = mutating.mutate_code(code, plugins.get_operator(name)(), occurrence)
        try:
            if source is None or meaning(source) == same:
                continue
        except SyntaxError:
            continue
        pairs = zip(code.splitlines(), source.splitlines(), strict=False)
        before, after = next(((b.strip(), a.strip()) for b, a in pairs if b != a), ("", ""))
        yield {"line": place[0], "operator": name.removeprefix("core/"), "before": before, "after": after} | {
            "source": source
        }


def tested(path: Path, source: str, tests: tuple[str, ...], limit: float) -> str:
    """What ends the tests of a mutant: the first test that fails, "time" or "" if all pass."""
    ours, theirs = os.pipe()
    if (child := os.fork()) == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setpgid(0, 0)
        _child(theirs, path, source, tests)
    os.close(theirs)
    end, said = time.monotonic() + limit, "time"
    try:
        while time.monotonic() < end:
            if os.waitpid(child, os.WNOHANG)[0]:
                child, said = 0, os.read(ours, 4096).decode() or "the process died"
                break
            time.sleep(0.05)
    finally:
        os.close(ours)
        if child:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return "" if said == "passed" else said


def _child(pipe: int, path: Path, source: str, tests: tuple[str, ...]) -> None:
    import hypothesis
    import pytest

    # One failing example is enough, the smallest is not looked for.
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("first", deadline=None, database=None, phases=phases)
    hypothesis.settings.load_profile("first")
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    sys.meta_path.insert(0, Finder(path, source))  # type: ignore[arg-type]
    failed = []

    class First:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.failed:
                failed.append(report.nodeid)

        def pytest_collectreport(self, report: Any) -> None:
            if report.failed:
                failed.append(f"{report.nodeid} (import)")

    code = 1
    try:
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests], plugins=[First()])
    finally:
        said = "passed" if code == 0 else (failed or ["import of the tests"])[0]
        os.write(pipe, said[:4000].encode())
        os._exit(0)


def warm() -> None:
    """Imports what the tests import, and then forgets the package itself, which each mutant imports anew."""
    for name in ("pytest", "hypothesis", "networkx", "decaf_lora.run", "decaf_lora.tasks.demo"):
        importlib.import_module(name)
    from transformers import CLIPConfig, CLIPModel  # noqa: F401

    for name in [name for name in sys.modules if name.partition(".")[0] == "decaf_lora"]:
        del sys.modules[name]


def files(again: bool) -> list[tuple[Path, tuple[str, ...]]]:
    """Every file to mutate, and its tests."""
    more = {glob: tuple(f"tests/{name}.py" for name in names) for glob, names in MORE.items()}
    return [(p, t) for glob, t in (more if again else TESTS).items() for p in sorted((ROOT / PACKAGE).glob(glob))]


def group(path: str) -> str:
    return "algorithms/" if "algorithms/" in path else path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=20, help="mutants a file; of algorithms/ three times that")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="those that survived meet more tests")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # with the tests that are running
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"], os.environ["HF_HUB_OFFLINE"] = "1", "1"
    sys.path[:0] = [str(ROOT / "src")]
    warm()
    end = time.monotonic() + 60 * options.minutes
    done = json.loads(RECORD.read_text())["mutants"] if RECORD.exists() else []
    limits: dict[tuple[str, ...], float] = {}

    def run(path: Path, tests: tuple[str, ...], source: str) -> str:
        if tests not in limits:
            start = time.monotonic()
            if said := tested(path, path.read_text(), tests, 900):
                raise SystemExit(f"without a mutation {' '.join(tests)} fails: {said}")
            limits[tests] = 60 + 5 * (time.monotonic() - start)
            print(f"{' '.join(tests)}: {time.monotonic() - start:.0f} s without a mutation", flush=True)
        return tested(path, source, tests, limits[tests])

    queues = [(p, t, mutants(p, options.seed)) for p, t in files(options.again)]
    random.Random(options.seed).shuffle(queues)
    counts: Counter[str] = Counter()
    while queues and time.monotonic() < end:
        for entry in list(queues):
            path, tests, left = entry
            own, mutant = group(str(path.relative_to(ROOT / PACKAGE))), next(left, None)
            if mutant is None or counts[own] >= options.each * (3 if own == "algorithms/" else 1):
                queues.remove(entry)
                continue
            counts[own] += 1
            source = mutant.pop("source")
            mutant = {"file": str(path.relative_to(ROOT)), **mutant}
            mutant["sha256"] = hashlib.sha256(source.encode()).hexdigest()[:16]
            known = [m for m in done if all(m[k] == mutant[k] for k in ("file", "before", "after", "operator"))]
            known = [m for m in known if m["line"] == mutant["line"] or m["sha256"] == mutant["sha256"]]
            if bool(known) != options.again or (known and known[0]["killed by"]):
                continue
            if time.monotonic() > end:
                break
            start = time.monotonic()
            mutant["killed by"] = run(path, tests, source)
            why = known[0].get("survives because", "") if known and not mutant["killed by"] else ""
            done = [m for m in done if m not in known] + [mutant | ({"survives because": why} if why else {})]
            write(done)
            verdict = mutant["killed by"] or f"SURVIVED: {mutant['before']}  ->  {mutant['after']}"
            print(f"{mutant['file']}:{mutant['line']} {time.monotonic() - start:.0f} s {verdict}", flush=True)
    write(done)
    return 0


def write(done: list[dict[str, Any]]) -> None:
    """The record, with counts."""
    done = sorted(done, key=lambda m: (m["file"], m["line"], m["after"]))
    counts = {}
    for name in sorted({group(m["file"].removeprefix(PACKAGE + "/")) for m in done}):
        own = [m for m in done if group(m["file"].removeprefix(PACKAGE + "/")) == name]
        alive = [m for m in own if not m["killed by"]]
        explained = sum("survives because" in m for m in alive)
        counts[name] = {"mutants": len(own), "killed": len(own) - len(alive), "survived": len(alive)} | {
            "explained": explained
        }
    text = json.dumps({"counts": counts, "mutants": done}, indent=1, ensure_ascii=False) + "\n"
    (temporary := RECORD.with_suffix(".tmp")).write_text(text)
    temporary.replace(RECORD)


if __name__ == "__main__":
    sys.exit(main())
