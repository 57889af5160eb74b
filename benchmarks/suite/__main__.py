"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import time
from pathlib import Path

from . import __doc__ as about
from . import cells, machine, page, timing


def _arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.suite", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="ROW", choices=cells.ROWS, help=", ".join(cells.ROWS))
    parser.add_argument("--match", nargs="+", default=[], metavar="WORD", help="cells with all these words in --list")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="all cells")
    size.add_argument("--quick", action="store_true", help="tiny sizes in this process: does it work? Writes nothing")
    parser.add_argument("--again", action="store_true", help="measure anew what has been measured at this commit")
    parser.add_argument("--device", default="cpu", help="cpu, cuda")
    parser.add_argument("--threads", type=int, help="threads of a process (default: as many as cores)")
    parser.add_argument("--results", type=Path, help="the file of results (default: benchmarks/results_suite_*.json)")
    parser.add_argument("--list", action="store_true", help="name the cells, and measure nothing")
    parser.add_argument("--page", action="store_true", help="write docs/performance.md, and measure nothing")
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    """Measures, prints a line a cell and then the bars, writes the results. The exit code is 1 if a cell failed."""
    options = _arguments(given)
    if options.cell:
        _one(options.cell[0], json.loads(options.cell[1]), options.device, options.threads)
        return 0
    if options.page:
        page.PLACE.write_text(page.written())
        print(f"wrote {page.PLACE.relative_to(machine.ROOT)}")
        return 0
    scope: cells.Scope = "quick" if options.quick else "full" if options.full else "bench"
    chosen = options.only or (cells.ROWS if options.quick else cells.rows_of(options.device))
    wanted = cells.settings_of(chosen, scope, options.device)
    wanted = [cell for cell in wanted if set(options.match) <= set(cells.key(*cell).split())]
    if options.list:
        print("\n".join(cells.key(*cell) for cell in wanted))
        return 0
    threads = options.threads or (os.cpu_count() if options.device == "cpu" else None)
    results = cells.Results(options.results or cells.place(options.device))
    commit, failed = machine.commit(), 0
    for number, (name, settings) in enumerate(wanted, 1):
        line = f"[{number}/{len(wanted)}] {cells.key(name, settings)}"
        if not (options.again or options.quick) and results.has(name, settings, commit, options.threads):
            print(f"{line}: measured already", flush=True)
            continue
        print(line, end=": ", flush=True)
        began = time.perf_counter()
        try:
            if options.quick:
                with contextlib.redirect_stdout(io.StringIO()):
                    found = cells.measure(name, settings, options.device)
            else:
                found = cells.in_process(name, settings, options.device, threads)
        except Exception as error:
            if options.quick:
                raise
            print(f"FAILED\n{error}", flush=True)
            failed += 1
            continue
        print(f"{page.in_a_line(found['figures'])}  ({time.perf_counter() - began:.0f} s)", flush=True)
        if not options.quick:
            results.put(found)
    if not options.quick:
        for name in chosen:
            print(f"\n{cells.row(name).QUESTION}")
            for bar in cells.row(name).bars(results.of(name)):
                print(f"  {page.verdict(bar):8} {bar.name}: {bar.bar}; measured {bar.measured}")
    return 1 if failed else 0


def _one(name: str, settings: dict[str, object], device: str, threads: int | None) -> None:
    """Measures a cell in this process, and prints it as JSON in the last line."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    if device.startswith("cuda"):
        timing.SHARE = 0.2  # a GPU's turns are short
    print(json.dumps(cells.measure(name, settings, device)))


if __name__ == "__main__":
    sys.exit(main())
