"""The federation file changes while agents run: certificates are renewed, agents come and go. Processes over TLS."""

import shutil

from decaf_lora.cli import main
from decaf_lora.federation import checking, commands, demo, file, keys
from decaf_lora.records import read_records
from endpoints import until
from federations import NAMES, federation, said


def why(folder, name, neighbour):
    (edge,) = [edge for edge in said(folder, name).neighbours if edge.name == neighbour]
    return "up" if edge.up else edge.why


def restarted(sites, name, options):
    sites("term", name)
    assert sites.wait(name) == {name: 130}
    sites("start", name, *options)


def test_a_certificate_is_renewed_in_the_middle_of_a_run(tmp_path, sites, capsys):
    """As docs/mesh.md says: a new key of alice, a new version of the file, each agent started again, one by one."""
    _, options = federation(tmp_path, rounds=40, give_up=300.0)
    fed = tmp_path / "fed.yaml"
    sites.brake("alice", 15)
    for name in NAMES:
        sites("start", name, *options[name])
    until(lambda: sites.held("alice"))
    old, address = file.read_signed(fed).agents[0].certificate, file.read_signed(fed).agents[0].address
    shutil.copy(fed, tmp_path / "v1.yaml")

    request = ["request", str(fed), "--name", "alice", "--key", str(tmp_path / "alice-2.key"), "--listen", address]
    assert main(["federation", *request]) == 0
    assert main(["federation", "seal", str(fed), str(tmp_path / "alice.request")]) == 0
    signed = file.read_signed(fed)
    assert signed.version == 2
    assert signed.agents[0].certificate != old

    # Carol follows first, while alice is in the middle of a round. Those who run with the old file refuse carol, and
    # say so. Bob has nobody to go on with.
    restarted(sites, "carol", options["carol"])
    older = "it follows version 1 of the federation file, this agent version 2: start it again with version 2"
    newer = "it follows version 2 of the federation file, this agent version 1: start this agent again with version 2"
    unknown = "refused by carol after its certificate was shown: ask whether the file of carol is version 1."
    until(lambda: why(tmp_path, "carol", "bob") == older)
    until(lambda: why(tmp_path, "bob", "carol") == newer)
    until(lambda: why(tmp_path, "alice", "carol") == unknown)
    restarted(sites, "bob", options["bob"])
    # Alice's old key is refused by name before anything is sent.
    capsys.readouterr()
    sites("term", "alice")
    sites.release("alice")
    assert sites.wait("alice") == {"alice": 130}
    assert main(["agent", str(fed), "--name", "alice", "--out", str(tmp_path / "alice"), *options["alice"]]) == 2
    assert "alice.key is not the key whose certificate the file has for alice" in capsys.readouterr().err
    sites("start", "alice", *options["alice"], "--key", tmp_path / "alice-2.key")
    assert sites.wait(*NAMES) == dict.fromkeys(NAMES, 0), [sites.log(name) for name in NAMES]
    for name in NAMES:
        last = said(tmp_path, name)
        assert (last.state, last.round, last.version) == ("done", 40, 2)
        assert [record.round for record in read_records(tmp_path / name / "records.jsonl")][-1] == 40
    # The old file is refused from now on, also with the new key.
    capsys.readouterr()
    found = {f.what: f.said for f in checking.check(tmp_path / "v1.yaml", "alice", key=tmp_path / "alice-2.key")}
    assert "the file is version 1, and version 2 was seen before" in found["organiser"]


def test_agents_are_added_and_removed_between_versions(tmp_path, sites, capsys):
    """The new list is another run: refused in the old folder, and in a new one all train; who left is refused."""
    _, options = federation(tmp_path, NAMES, rounds=4)
    fed = tmp_path / "fed.yaml"
    for name in NAMES:
        sites("start", name, *options[name])
    assert sites.wait(*NAMES) == dict.fromkeys(NAMES, 0)
    for name in NAMES:
        (tmp_path / name).rename(tmp_path / f"{name}-1")

    # dave makes his request with a file that does not name him yet.
    (address,) = demo.free_addresses(1)
    request = commands.request(fed, "dave", address, new=True)[0]
    assert main(["federation", "seal", str(fed), str(request), "--agents", "alice,bob,dave"]) == 0
    assert file.read_signed(fed).version == 2
    assert main(["agent", str(fed), "--name", "alice", "--out", str(tmp_path / "alice-1"), *options["alice"]]) == 2
    assert 'names of the agents: ["alice", "bob", "carol"] -> ["alice", "bob", "dave"]' in capsys.readouterr().err
    options["dave"] = [*options["bob"][:-1], address]
    for name in ("alice", "bob", "dave"):
        sites("start", name, *options[name])
    assert sites.wait("alice", "bob", "dave") == dict.fromkeys(("alice", "bob", "dave"), 0), sites.log("dave")
    assert main(["agent", str(fed), "--name", "carol", "--out", str(tmp_path / "carol"), *options["carol"]]) == 2
    assert "name: 'carol' is not known" in capsys.readouterr().err
    assert keys.load_identity(tmp_path / "dave.key").name == "dave"
