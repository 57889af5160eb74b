"""Sealed federations of the toy task, whose agents run in one folder."""

from pathlib import Path

from decaf_lora.config import RunConfig, build
from decaf_lora.federation import commands, demo, file, keys, status

TOY = f"{Path(__file__).with_name('held.py')}:make_held"
NAMES = ("alice", "bob", "carol")
PARTITION = "iid"


def federation(folder, names=NAMES, *, dial_only=(), rounds=6, give_up=60.0, graph="ring", **changes):
    """A sealed federation of the toy task in `folder`; the options that each agent is started with."""
    values = {
        "task": {"name": TOY},
        "lora": {"r": 2, "lora_alpha": 4},
        "algorithm": {"name": "decaf"},
        "training": {"steps": 3, "batch_size": 4, "agents_per_pass": 1},
        "partition": PARTITION,
        "evaluate_every": 2,
        **changes,
        "agents": len(names),
        "rounds": rounds,
    }
    config = build(RunConfig, values)
    fed = folder / "fed.yaml"
    commands.init(fed, config, names, graph, limits=file.Limits(patience=30, give_up=give_up))
    free = demo.free_addresses(len(names))
    addresses = [None if name in dial_only else address for name, address in zip(names, free, strict=True)]
    requests = [commands.request(fed, name, address)[0] for name, address in zip(names, addresses, strict=True)]
    signed = commands.seal(fed, requests)
    told = keys.fingerprint(signed.organiser)
    shared = ["--trust", told, "--share", "--no-alone", "--partition", PARTITION, "--evaluate-every", "2"]
    options = {
        name: [*shared, "--agents-per-pass", "1", *(["--bind", address] if address else [])]
        for name, address in zip(names, addresses, strict=True)
    }
    return config.model_copy(update={"graph": graph}), options


def said(folder, name):
    """What an agent says of itself."""
    return status.read(status.file_of(folder / "fed.yaml", name))
