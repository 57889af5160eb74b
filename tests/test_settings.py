"""Named settings of a comparison: each a row, beside the bare algorithms; and one line for what cannot be one."""

import json
import re
from pathlib import Path

import pytest
import yaml

from command import SMALL, TOY, decaf, line_of
from decaf_lora.config import CompareConfig, build, load
from decaf_lora.errors import UserError
from decaf_lora.records import read_records, read_summary
from decaf_lora.runs.compare import cells

RECOMMENDED = {"algorithm.name": "decaf_tracked", "graph": "base:2", "gossip_steps": "period", "training.steps": 3}


def config(settings, **more) -> CompareConfig:
    values = {"algorithms": ["local", "decaf"], "seeds": [0, 1], "agents": 4, **more, "settings": settings}
    made = build(CompareConfig, values)
    assert isinstance(made, CompareConfig)
    return made


def refused(settings, **more) -> str:
    with pytest.raises(UserError) as error:
        cells(config(settings, **more))
    return str(error.value)


def test_a_setting_is_a_run_of_its_own_for_every_seed() -> None:
    found = cells(config({"recommended": RECOMMENDED}))
    assert [(cell.config.setting or cell.config.algorithm.name, cell.config.seed) for cell in found] == [
        *((name, seed) for seed in (0, 1) for name in ("local", "decaf")),
        *(("recommended (base:2)", seed) for seed in (0, 1)),
    ]
    run = found[-1].config
    assert (run.algorithm.name, run.graph, run.gossip_steps, run.training.steps) == (
        *("decaf_tracked", "base:2", "period"),
        3,
    )
    assert found[-1].name == "recommended-dirichlet-0.1-seed1"
    assert found[-1].graphs == ("ring",)


def test_what_it_does_not_override_is_the_base_runs() -> None:
    more = {
        "training": {"learning_rate": 0.5, "batch_size": 7},
        "algorithm": {"gauge": "balanced", "tracking_gamma": 0.5},
        "learning_rates": {"dlora": 0.25},
        "rounds": 3,
    }
    given = {
        "nested": {"lora": {"r": 5}, "training": {"steps": 2}},
        "other rule": {"algorithm.name": "dlora"},
        "own rate": {"algorithm.name": "dlora", "training.learning_rate": 0.125},
    }
    nested, rule, rate = (
        cell.config for cell in cells(config(given, **more)) if cell.config.setting and not cell.config.seed
    )
    assert (nested.lora.r, nested.training.steps, nested.training.batch_size, nested.rounds) == (5, 2, 7, 3)
    assert (nested.algorithm.name, nested.algorithm.gauge, nested.training.learning_rate) == ("decaf", "balanced", 0.5)
    assert (rule.algorithm.gauge, rule.training.learning_rate) == (None, 0.25)  # dlora takes no gauge
    assert rate.training.learning_rate == 0.125


def test_over_several_graphs() -> None:
    given = {"faster": {"training.steps": 9}, "exact": {"graph": "base:2"}, "all": {"graph": "complete"}}
    found = cells(config(given, graphs=["ring", "complete"], seeds=[0], algorithms=["decaf"]))
    rows = {(cell.config.setting or "decaf", cell.graphs) for cell in found}
    assert rows == {
        *(("decaf", (graph,)) for graph in ("ring", "complete")),
        *(("faster", (graph,)) for graph in ("ring", "complete")),
        ("exact (base:2)", ("ring", "complete")),
        ("all", ("complete",)),
    }
    assert len({cell.name for cell in found}) == len(found)


def test_without_settings_nothing_changes() -> None:
    names = [cell.name for cell in cells(config({}, graphs=["ring", "complete"], seeds=[0]))]
    assert names == [
        "local-dirichlet-0.1-seed0",
        "decaf-ring-dirichlet-0.1-seed0",
        "decaf-complete-dirichlet-0.1-seed0",
    ]


def test_rows_tables_and_report_call_it_by_its_name(tmp_path, capsys) -> None:
    path = tmp_path / "mine.yaml"
    assert decaf("run", "digits", *SMALL, "--out", tmp_path / "r") == 0
    values = yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())
    values |= {
        "algorithms": ["local", "dlora"],
        "seeds": [0, 1],
        "agents": 4,
        "settings": {"slow & steady": RECOMMENDED},
    }
    path.write_text(yaml.safe_dump(values).replace("slow & steady", "slow - steady"))
    out = tmp_path / "c"
    assert decaf("compare", path, "--jobs", 1, "--out", out) == 0
    rows = read_summary(out / "summary.json")
    named = [row for row in rows if row.algorithm == "slow - steady (base:2)"]
    assert [(row.graph, row.seed) for row in named] == [("ring", 0), ("ring", 1)]
    assert all(row.alone_scores for row in named)
    assert "| slow - steady (base:2) | ring |" in (out / "table.md").read_text()
    page = (out / "report.html").read_text()
    assert page.count("<h2>ring · iid</h2>") == 1
    assert '<th scope="row">slow - steady (base:2)</th>' in page
    folder = out / "slow - steady-iid-seed0"
    assert json.loads((folder / "run.json").read_text())["algorithm"] == "decaf_tracked"
    assert len(read_records(folder / "records.jsonl")) == 5
    saved = load(CompareConfig, out / "config.yaml")
    assert saved == load(CompareConfig, path)
    assert decaf("compare", "--resume", out, "--task", TOY) == 0


def test_the_example_of_the_guide() -> None:
    page = (Path(__file__).parents[1] / "docs" / "report.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    found = cells(build(CompareConfig, {**yaml.safe_load(example), "seeds": [0]}))
    assert [cell.config.setting or cell.config.algorithm.name for cell in found] == [
        *("local", "dlora", "decaf", "recommended (base:5)", "more steps"),
    ]


class TestMistakes:
    @pytest.mark.parametrize(
        ("settings", "line"),
        [
            ({"decaf": {"rounds": 2}}, "settings.decaf: an algorithm is called so"),
            ({"DLoRA-FA": {"rounds": 2}}, "settings.DLoRA-FA: an algorithm is called so"),
            ({"a": {"rounds": 2}, "A": {"rounds": 3}}, "settings.A: "),
            ({"x": {}}, "settings.x: it overrides nothing"),
            ({"../up": {"rounds": 2}}, "settings: '../up' cannot be a name"),
            ({"": {"rounds": 2}}, "settings: '' cannot be a name"),
            ({"x": {"agents": 3}}, "settings.x.agents: all rows of a comparison share this field"),
            ({"x": {"task.model": "other"}}, "settings.x.task.model: all rows of a comparison share this field"),
            ({"x": {"task": {"model": "other"}}}, "settings.x.task.model: all rows"),
            ({"x": {"seed": 3}}, "settings.x.seed: all rows"),
            ({"x": {"trainig.steps": 3}}, "settings.x.trainig.steps: unknown field"),
            ({"x": {"training.stesp": 3}}, "settings.x.training.stesp: unknown field. Did you mean training.steps?"),
            ({"x": {"training.steps": 0}}, "settings.x.training.steps: input should be greater than or equal to 1"),
            ({"x": {"training.steps": 3, "training": {"steps": 4}}}, "settings.x.training.steps: it is given twice"),
            ({"x": {"algorithm.name": "decav"}}, "settings.x.algorithm: 'decav' is not known. Did you mean 'decaf'?"),
            ({"x": {"algorithm.name": "centralized"}}, "settings.x.algorithm.name: centralized is the reference"),
            ({"x": {"algorithm.name": "mine.py:rule"}}, "settings.x.algorithm.name: Python of your own"),
            ({"x": {"graph": {"name": "torus"}}}, "settings.x.graph: write it as one name"),
        ],
    )
    def test_are_one_line(self, settings, line) -> None:
        said = refused(settings)
        assert said.startswith(line), said

    def test_a_rate_of_an_algorithm_that_does_not_exist(self) -> None:
        assert refused({}, learning_rates={"dekaf": 0.1}).startswith("learning_rates: 'dekaf' is not known.")

    def test_a_setting_that_is_no_mapping(self) -> None:
        with pytest.raises(UserError, match=r"settings\.x: input should be a valid dictionary"):
            config({"x": 3})

    def test_an_option_of_another_algorithm(self, tmp_path, capsys) -> None:
        path = tmp_path / "m.yaml"
        values = {"task": {"name": TOY}, "agents": 3, "algorithms": ["local"], "seeds": [0]}
        path.write_text(
            yaml.safe_dump({**values, "settings": {"x": {"algorithm": {"name": "dlora", "gauge": "balanced"}}}})
        )
        line = line_of(capsys, "compare", path, "--jobs", 1, "--out", tmp_path / "c")
        assert "algorithm.gauge: dlora does not take this option" in line
        assert not (tmp_path / "c").exists()
