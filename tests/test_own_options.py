"""Options of functions of one's own: on the command line, in YAML, and back from a run's config.yaml."""

import pytest
import yaml

from decaf_lora import config, tasks
from decaf_lora.cli.options import Output, configured
from decaf_lora.config import CompareConfig, RunConfig
from decaf_lora.errors import UserError
from decaf_lora.kinds.options import call

MINE = """
from toy import Toy

def graph(num_agents, bridges: int = 1, far: bool = False): ...
def rule(period: int = 2, decay: float = 0.5): ...
def task(examples: int = 40): return Toy(examples=examples)
def configured(config, extra: int = 0): return Toy(examples=config.max_train + extra)
"""


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return str(path)


def read(*arguments, kind=RunConfig, source="digits"):
    command = "run" if kind is RunConfig else "compare"
    return configured(kind, command, [str(source), *map(str, arguments)], Output)[0]


def test_options_of_a_graph_and_a_partition_join_its_name(mine):
    made = read(
        "--graph", f"{mine}:graph", "--graph.bridges", 3, "--graph.far", "--partition", "m:f", "--partition.x=a"
    )
    assert made.graph == f"{mine}:graph:bridges=3,far=true"
    assert made.partition == "m:f:x=a"
    assert read("--graph", f"{mine}:graph:2", "--graph.far", "false").graph == f"{mine}:graph:2,far=false"
    with pytest.raises(UserError, match=r"graph\.bridges: \[1, 2\] is more than one number or word"):
        read("--graph", f"{mine}:graph", "--graph.bridges", 1, 2)


def test_options_of_an_algorithm_and_a_task_stand_among_the_others(mine):
    made = read("--algorithm", f"{mine}:rule", "--algorithm.period", 3, "--algorithm.order", "combine-adapt")
    assert made.algorithm.own == {"period": 3}
    assert made.algorithm.options() == {"order": "combine-adapt", "period": 3}
    made = read("--task", f"{mine}:task", "--task.examples=70", "--algorithm", "dlora")
    assert (made.task.own, made.algorithm.own) == ({"examples": 70}, {})


@pytest.mark.parametrize("section", ["algorithm", "task"])
def test_a_kind_of_this_package_takes_no_other_options(mine, section):
    with pytest.raises(UserError, match=rf"--{section}\.perod: unknown option"):
        read(f"--{section}.perod", 3)
    with pytest.raises(UserError, match=rf"{section}\.perod: unknown field"):
        config.build(RunConfig, {section: {"perod": 3}})


def test_yaml_keeps_the_options_and_the_command_line_goes_before_it(mine, tmp_path):
    values = {
        "graph": {"name": f"{mine}:graph", "bridges": 2},
        "algorithm": {"name": f"{mine}:rule", "period": 5, "decay": 0.1},
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    made = read(source=file)
    assert made.graph == f"{mine}:graph:bridges=2"
    assert made.algorithm.own == {"period": 5, "decay": 0.1}
    again = read("--algorithm.period", 6, source=file)
    assert again.algorithm.own == {"period": 6, "decay": 0.1}
    assert config.differences(made, again) == ["algorithm.period: 5 -> 6"]
    assert read("--algorithm", "decaf", source=file).algorithm.own == {}
    file.write_text(config.dump(again))  # as a run's folder keeps it
    assert yaml.safe_load(file.read_text())["algorithm"]["period"] == 6
    assert config.load(RunConfig, file) == again


def test_the_file_is_not_needed_to_read_a_configuration(tmp_path):
    values = {"algorithm": {"name": "gone.py:rule", "period": 5}, "graph": "gone.py:graph", "task": {"name": "gone:t"}}
    assert config.build(RunConfig, values).algorithm.own == {"period": 5}


def test_a_comparison_may_have_options_of_any_of_its_algorithms(mine):
    made = read("--algorithms", "decaf", f"{mine}:rule", "--algorithm.period", 3, kind=CompareConfig)
    assert made.algorithm.own == {"period": 3}
    assert made.algorithm.name == "decaf"
    with pytest.raises(UserError, match=r"--algorithm\.period: unknown option"):
        read("--algorithms", "decaf", "dlora", "--algorithm.period", 3, kind=CompareConfig)


def test_the_options_of_a_task_reach_its_function(mine):
    assert len(tasks.make(read("--task", f"{mine}:task", "--task.examples", 70).task).labels) == 70
    both = read("--task", f"{mine}:configured", "--task.max_train", 40, "--task.extra", 2).task
    assert len(tasks.make(both).labels) == 42
    with pytest.raises(UserError, match=r"^task\.examples: input should be a valid integer.*'many'"):
        tasks.make(read("--task", f"{mine}:task", "--task.examples", "many").task)
    with pytest.raises(UserError, match=r"task: option of .*: 'exampels' is not known\. Did you mean 'examples'"):
        tasks.make(read("--task", f"{mine}:task", "--task.exampels", 3).task)


def test_help_lists_the_options(mine, capsys):
    with pytest.raises(SystemExit):
        read("--graph", f"{mine}:graph", "--help")
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--graph.bridges INT (default: 1), --graph.far BOOL (default: False)" in text


def test_the_sections_know_which_kinds_they_describe():
    assert set(tasks.KINDS) == config.TaskConfig.described


@pytest.mark.parametrize(("text", "value"), [("no", "no"), ("1:30", "1:30"), ("1e-3", 0.001), ("010", 10), ("", None)])
def test_a_value_of_no_known_type_means_what_it_says(text, value, tmp_path):
    """As in a file, and not as YAML 1.1 has it, where `no` is false and `1e-3` a word."""
    path = tmp_path / "mine.py"
    path.write_text("def rule(word=None): ...\ndef graph(num_agents, word=None): return SEEN.append(word)\nSEEN = []\n")
    assert read("--algorithm", f"{path}:rule", f"--algorithm.word={text}").algorithm.own == {"word": value}
    namespace = {"SEEN": (seen := [])}
    exec(path.read_text().replace("SEEN = []", ""), namespace)
    call(namespace["graph"], "graph", f"word={text}", "graph", {"num_agents": 3})
    assert seen == [value]


@pytest.mark.parametrize("text", ['"open', "[1", "!two 2", "{a: 1, a: 2}", "&a [*a]"])
def test_a_value_that_cannot_be_read_is_one_line(text, mine):
    with pytest.raises(UserError, match=r"algorithm\.period: .* (is not YAML|is there twice|holds itself)"):
        read("--algorithm", f"{mine}:rule", f"--algorithm.period={text}")
