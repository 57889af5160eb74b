"""Names of one's own: functions in files and modules, kinds of installed packages, and their options."""

import subprocess
import sys
from typing import Literal

import networkx as nx
import numpy as np
import pytest

from decaf_lora import graphs, kinds, partition
from decaf_lora.errors import UserError
from decaf_lora.kinds import Kind, Table

GRAPH = """
import networkx as nx
import numpy as np
from decaf_lora import graphs

def two_rings(num_agents, bridges: int = 1, far: bool = False):
    half = num_agents // 2
    links = nx.disjoint_union(nx.cycle_graph(half), nx.cycle_graph(num_agents - half))
    links.add_edges_from((i, half + (half - 1 - i if far else i)) for i in range(bridges))
    return links

def drawn(num_agents, seed):
    return graphs.erdos_renyi(num_agents, 0.5, seed)

def swapping(num_agents):
    return graphs.one_peer_hypercube(num_agents)

def adjacency(num_agents):
    return 1 - np.eye(num_agents)

def five():
    return graphs.ring(5).weights

def named():
    return nx.Graph([("bob", "alice"), ("bob", "carol")])

def nothing(num_agents):
    return "ring"

def needs(num_agents, width: int):
    return graphs.ring(num_agents)

number = 3
"""


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(GRAPH)
    return str(path)


# --- a function of one's own --------------------------------------------------------------------------------


def two_rings(n, bridges):
    links = nx.disjoint_union(nx.cycle_graph(n // 2), nx.cycle_graph(n - n // 2))
    links.add_edges_from((i, n // 2 + i) for i in range(bridges))
    return links


def test_a_graph_of_ones_own_gets_metropolis_weights_and_its_options(mine):
    for spec, bridges in (("", 1), (":2", 2), (":bridges=3", 3), (": bridges = 3 , far = false", 3)):
        made = graphs.parse(f"{mine}:two_rings{spec}", 8, 0)
        np.testing.assert_array_equal(made.weights, graphs.from_networkx(two_rings(8, bridges)).weights)
    far = graphs.parse(f"{mine}:two_rings:2,far=true", 8, 0)
    assert (0, 7) in far.edges
    assert (1, 6) in far.edges


def test_a_graph_of_ones_own_may_be_a_schedule_a_matrix_or_an_adjacency_and_may_take_the_seed(mine):
    drawn = graphs.parse(f"{mine}:drawn", 6, 3)
    np.testing.assert_array_equal(drawn.weights, graphs.erdos_renyi(6, 0.5, 3).weights)
    assert graphs.parse(f"{mine}:swapping", 8, 0).period == 3
    np.testing.assert_allclose(graphs.parse(f"{mine}:adjacency", 4, 0).weights, 0.25)
    np.testing.assert_array_equal(graphs.parse(f"{mine}:five", 5, 0).weights, graphs.ring(5).weights)
    named = graphs.parse(f"{mine}:named", 3, 0)
    assert named.names == ("alice", "bob", "carol")
    failing = graphs.parse(f"failing:0.2:{mine}:two_rings:2", 8, 0)
    np.testing.assert_array_equal(
        failing.at(0).weights, graphs.failing(graphs.parse(f"{mine}:two_rings:2", 8, 0), 0.2, 0).at(0).weights
    )


def test_a_function_of_a_module_on_the_path(mine, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "shapes.py").write_text(GRAPH)
    made = graphs.parse("my_package.shapes:two_rings:2", 8, 0)
    np.testing.assert_array_equal(made.weights, graphs.from_networkx(two_rings(8, 2)).weights)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.py:ring", r"^graph: .*nowhere\.py does not exist\.$"),
        ("MINE:two_rngs", r"^graph: .*mine\.py has no function 'two_rngs'\. Did you mean 'two_rings'\?$"),
        ("MINE:number", r"^graph: .*mine\.py has no function 'number'\."),
        ("MINE:nothing", r"^graph: .*mine\.py:nothing gives no matrix of numbers"),
        ("MINE:five", r"^graph: .*mine\.py:five returned 5 agents but the run has 8; .* or use 5 agents\.$"),
        ("MINE:needs", r"^graph: .*mine\.py:needs needs width; give graph\.width, .* supplied: num_agents, seed\.$"),
        ("MINE:two_rings:bridges=few", r"^graph\.bridges: input should be a valid integer.* \(got 'few'\)\.$"),
        ("MINE:two_rings:bridge=2", r"^graph: option of .*two_rings: 'bridge' is not known\. Did you mean 'bridges'\?"),
        ("MINE:two_rings:1,true,3", r"^graph: .* takes 2 options \(bridges, far\), so '3' is one too many\.$"),
        ("MINE:two_rings:2,bridges=3", r"^graph: .* sets bridges twice; give it once\.$"),
        ("MINE:adjacency:2", r"^graph: .* takes no options, so '2' is one too many\.$"),
        ("MINE:adjacency:a=2", r"^graph: .*mine\.py:adjacency takes no options; leave out a\.$"),
        (
            "no_such_module:ring",
            r"^graph: 'no-such-module' is not known\. .*Or name a function of your own, file\.py:function\.",
        ),
        ("torsu:2x5", r"^graph: 'torsu' is not known\. Did you mean 'torus'\?"),
    ],
)
def test_a_function_that_cannot_be_had_is_one_line(mine, spec, message):
    with pytest.raises(UserError, match=message):
        graphs.parse(spec.replace("MINE", mine), 8, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("def f(:\n", r"^graph: .*broken\.py cannot be loaded \(line 1: SyntaxError: "),
        (
            "x = 1\n\ny = z\n",
            r"^graph: .*broken\.py cannot be loaded \(line 3: NameError: name 'z'",
        ),
        ("import no_such_module\n", r"\(line 1: ModuleNotFoundError: No module named 'no_such_module'\)"),
    ],
)
def test_a_file_that_does_not_load_is_one_line_with_the_place(tmp_path, content, message):
    (tmp_path / "broken.py").write_text(content)
    with pytest.raises(UserError, match=message):
        graphs.parse(f"{tmp_path}/broken.py:f", 4, 0)


def test_a_file_named_like_a_library_does_not_replace_it(tmp_path):
    import json

    (tmp_path / "json.py").write_text(GRAPH)
    assert graphs.parse(f"{tmp_path}/json.py:adjacency", 4, 0).num_agents == 4
    assert sys.modules["json"] is json


def test_a_file_is_run_once_however_many_of_its_functions_are_named(tmp_path):
    (tmp_path / "counted.py").write_text(f"open({str(tmp_path / 'runs')!r}, 'a').write('x')\n" + GRAPH)
    for _ in range(2):
        graphs.parse(f"{tmp_path}/counted.py:adjacency", 4, 0)
        graphs.parse(f"{tmp_path}/counted.py:five", 5, 0)
    assert (tmp_path / "runs").read_text() == "x"


def test_options_take_their_type_from_the_annotation_or_the_default():
    def rule(supplied, period: int, decay=0.9, mode: Literal["a", "b"] = "a", name: str | None = None, free=None):
        return period, decay, mode, name, free

    known = kinds.options(rule, ["supplied"])
    assert list(known) == ["period", "decay", "mode", "name", "free"]
    made = kinds.call(rule, "rule", "3,decay=0.5,mode=b,name=x,free=[1]", "algorithm", {"supplied": 0})
    assert made == (3, 0.5, "b", "x", [1])
    with pytest.raises(UserError, match=r"^algorithm\.mode: input should be 'a' or 'b' \(got 'c'\)\.$"):
        kinds.checked(known["mode"], "c", "algorithm")


# --- kinds of installed packages ----------------------------------------------------------------------------


def install(folder, package, points, code=GRAPH):
    """What pip leaves of a package: its module, and the metadata with its entry points."""
    (folder / f"{package}.py").write_text(code)
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"[{group}]\n" + "".join(f"{n} = {v}\n" for n, v in names.items()) for group, names in points.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))


@pytest.fixture
def site(tmp_path, monkeypatch):
    kinds.installed.cache_clear()
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    kinds.installed.cache_clear()


def test_an_installed_package_adds_graphs_and_partitions(site):
    code = (
        GRAPH
        + """
from decaf_lora.kinds import Kind

def halves(labels, num_agents):
    return np.array_split(np.arange(len(labels)), num_agents)

fancy = Kind(lambda n, argument, seed: graphs.ring(n), "a ring, fancily", "fancy:2", True)
"""
    )
    points = {"two_rings": "shapes_pkg:two_rings", "fancy": "shapes_pkg:fancy"}
    install(
        site,
        "shapes_pkg",
        {"decaf_lora.graphs": points, "decaf_lora.partitions": {"halves": "shapes_pkg:halves"}},
        code,
    )
    made = graphs.parse("two-rings:2", 8, 0)
    np.testing.assert_array_equal(made.weights, graphs.from_networkx(two_rings(8, 2)).weights)
    with pytest.raises(UserError, match=r"^graph: fancy needs an argument, for example fancy:2\.$"):
        graphs.parse("fancy", 8, 0)
    assert graphs.parse("fancy:1", 8, 0).num_agents == 8
    assert [shard.tolist() for shard in partition.parse("halves", [0, 1, 0, 1], 2, 0).shards] == [[0, 1], [2, 3]]
    assert ("two-rings", "of the package shapes_pkg") in graphs.KINDS.summaries()
    with pytest.raises(UserError, match=r"Did you mean 'two-rings'\?"):
        graphs.parse("two-ring", 8, 0)


def test_a_name_that_two_packages_give_is_refused_with_both(site):
    install(site, "one_pkg", {"decaf_lora.graphs": {"ring": "one_pkg:two_rings", "shared": "one_pkg:two_rings"}})
    install(site, "two_pkg", {"decaf_lora.graphs": {"shared": "two_pkg:two_rings"}})
    with pytest.raises(UserError, match=r"^graph: 'ring' is a kind of decaf-lora and of one_pkg; .* one_pkg:two"):
        graphs.parse("ring", 8, 0)
    with pytest.raises(UserError, match=r"^graph: 'shared' is a kind of one_pkg and of two_pkg; uninstall a package"):
        graphs.parse("shared", 8, 0)
    assert graphs.parse("one_pkg:two_rings", 8, 0).num_agents == 8  # what the message proposes


def test_a_package_that_does_not_load_spoils_only_its_own_kinds(site):
    install(site, "broken_pkg", {"decaf_lora.graphs": {"spiral": "broken_pkg:f"}}, "raise RuntimeError('no licence')")
    assert graphs.parse("ring", 4, 0).num_agents == 4
    assert ("spiral", "of the package broken_pkg") in graphs.KINDS.summaries()
    with pytest.raises(UserError, match=r"^graph: spiral of the package broken_pkg cannot be loaded \(RuntimeE"):
        graphs.parse("spiral", 4, 0)


def test_the_table_says_what_lacks_an_argument_or_has_one_too_many():
    table = Table(
        "thing",
        "decaf_lora.things",
        {"one": Kind(int, ""), "two": Kind(int, "", "two:3", True)},
        lambda f, n: Kind(f, n),
    )
    assert table.find(" One ").name == "one"
    with pytest.raises(UserError, match=r"^thing: one takes no argument; write one instead of one:1\.$"):
        table.find("one:1")
    with pytest.raises(UserError, match=r"^thing: two needs an argument, for example two:3\.$"):
        table.find("two")


def test_the_command_line_shows_a_graph_of_ones_own_and_keeps_its_mistakes_to_one_line(mine):
    command = [sys.executable, "-m", "decaf_lora", "graph", "--agents", "8"]
    fine = subprocess.run([*command, f"{mine}:two_rings:2"], capture_output=True, text=True)
    assert fine.returncode == 0
    assert "edges: 10" in fine.stdout
    wrong = subprocess.run([*command, f"{mine}:two_rngs"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert len(wrong.stderr.strip().splitlines()) == 1
    assert "two_rings" in wrong.stderr
