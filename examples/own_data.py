"""From a table to a verdict: three clinics train one classifier together, and each hears whether it was worth it.

    python examples/own_data.py                                    # a tiny table and a tiny model, built in
    python examples/own_data.py --table visits.csv --model sentence-transformers/all-MiniLM-L6-v2 --site clinic

The commands are those of docs/own-data.md; they are printed as a shell would take them. The table needs a column of
texts, one of labels, and one that names the site of each row.
"""

import argparse
import csv
import json
import shlex
import tempfile
from pathlib import Path

import torch

from decaf_lora.cli import main as decaf
from trainer import built_in


def write_built_in(folder):
    """Writes the built-in rows as a table with a column of sites and one of new rows, and the built-in model."""
    train, test, tokenizer, make_model = built_in()
    sites = ("north", "south", "west")
    rows = [(text.removeprefix("[CLS] "), kind, sites[i % 7 % 3]) for i, (text, kind) in enumerate(train + test)]
    for name, part in (("visits", rows[:180]), ("new", rows[180:])):
        with open(folder / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("note", "kind", "site"), *part])
    torch.manual_seed(0)
    make_model().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "visits.csv", folder / "new.csv", folder / "model"


def main(arguments=None):
    """Runs the commands in the folder --out; returns the final row of the run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, help="a table of your own (default: the built-in one)")
    parser.add_argument("--model", help="a name on the hub, or a folder; with --table")
    parser.add_argument("--site", default="site", help="the column that names the site")
    parser.add_argument("--new", type=Path, help="a table of new rows to predict; with --table")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, help="where everything is written (default: a folder that is removed)")
    given = parser.parse_args(arguments)
    if (given.table is None) != (given.model is None):
        parser.error("--table and --model go together")

    def run(*words):
        words = [str(word) for word in words]
        print("\n$ decaf " + shlex.join(words), flush=True)
        if code := decaf(words):
            raise SystemExit(code)

    with tempfile.TemporaryDirectory() as temporary:
        out = given.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        table, new, model = (given.table, given.new, given.model) if given.table else write_built_in(out)
        mine = out / "mine.yaml"
        run("init", "text", table, "--model", model, "--site-column", given.site, "--out", mine)
        run("check", mine)
        run("run", mine, "--rounds", given.rounds, "--baseline", "--out", out / "run")
        if new:
            run("predict", out / "run", "--data", new, "--to", out / "predictions")
        (row,) = json.loads((out / "run" / "summary.json").read_text())
    return row


if __name__ == "__main__":
    main()
