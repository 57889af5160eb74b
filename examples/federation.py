"""Three organisations and no server, on one machine: a folder stands for the machine of each.

    python examples/federation.py                  # a minute; everything in ./federation
    python examples/federation.py --rounds 3

The commands are those of docs/mesh.md; they are printed as each organisation would type them. What leaves a folder is
copied here by hand, as it would be mailed: a request, and the sealed file. Keys and data stay where they are.
"""

import argparse
import contextlib
import io
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from decaf_lora.cli import main as decaf
from decaf_lora.federation import status
from decaf_lora.federation.demo import free_addresses

SITES = ("alice", "bob", "carol")


def main(arguments=None):
    """Returns the score of each site: (at the start, alone, together)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("federation"), help="must not exist")
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args(arguments)
    if given.out.exists():
        parser.error(f"--out: {given.out} exists already")
    machines = {who: given.out / who for who in ("organiser", *SITES)}
    for folder in machines.values():
        folder.mkdir(parents=True)

    def shown(who, words):
        print(f"\n{who}$ decaf {shlex.join(words)}", flush=True)

    def run(who, *words):
        """A command on the machine of `who`; what it prints."""
        words = [str(word) for word in words]
        shown(who, words)
        said = io.StringIO()
        with contextlib.chdir(machines[who]), contextlib.redirect_stdout(said):
            code = decaf(words)
        print(said.getvalue(), end="")
        if code:
            raise SystemExit(code)
        return said.getvalue()

    # The organiser says what is trained. No site has a table here: with --share each takes a part of the demo's digits.
    recipe = {"task": {"name": "digits"}, "algorithm": {"name": "decaf_tracked", "messages": "int8"}}
    training = {"steps": 5, "batch_size": 16, "learning_rate": 0.02}
    recipe |= {"training": training, "partition": "dirichlet:0.1", "rounds": given.rounds}
    (machines["organiser"] / "task.yaml").write_text(yaml.safe_dump(recipe))
    draft = ("--recipe", "task.yaml", "--agents", ",".join(SITES), "--graph", "complete")
    told = run("organiser", "federation", "init", "fed.yaml", *draft).split("fingerprint: ")[1].split()[0]

    for who, address in zip(SITES, free_addresses(len(SITES)), strict=True):
        shutil.copy(machines["organiser"] / "fed.yaml", machines[who])
        run(who, "federation", "request", "fed.yaml", "--name", who, "--listen", address)
        shutil.copy(machines[who] / f"{who}.request", machines["organiser"])
    run("organiser", "federation", "seal", "fed.yaml", *(f"{who}.request" for who in SITES))

    agents = {}
    for who in SITES:
        shutil.copy(machines["organiser"] / "fed.yaml", machines[who])
        run(who, "federation", "check", "fed.yaml", "--name", who, "--trust", told, "--share")
        words = ["agent", "fed.yaml", "--name", who, "--share", "--out", "run"]
        shown(who, words)
        with open(machines[who] / "agent.log", "w") as log:
            agents[who] = subprocess.Popen(
                [sys.executable, "-m", "decaf_lora", *words], cwd=machines[who], stdout=log, stderr=log
            )
    for who, agent in agents.items():
        if code := agent.wait():
            raise SystemExit(f"{who}: exit code {code}; see {machines[who] / 'agent.log'}")

    run("alice", "federation", "status", "fed.yaml", "--name", "alice")
    scores = {}
    print("\n          start  alone  together")
    for who in SITES:
        said = status.read(status.file_of(machines[who] / "fed.yaml", who))
        scores[who] = (said.score_at_start, said.score_alone, said.score)
        print(f"{who:8}  {said.score_at_start:5.3f}  {said.score_alone:5.3f}  {said.score:8.3f}")
    print(f"\nEach site's adapter, a PEFT directory: {machines['alice'] / 'run' / 'adapter'} and its like.")
    return scores


if __name__ == "__main__":
    main()
