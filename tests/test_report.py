"""Reports of synthetic runs: what the page must say, checked by reading it as a browser does."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, ClassVar

import numpy as np
import pytest
import yaml

from decaf_lora import algorithms, records, report
from decaf_lora.cli import main
from decaf_lora.errors import UserError
from decaf_lora.graphs import Graph, complete, ring
from decaf_lora.records import Record, RecordWriter
from decaf_lora.report import figures, reading, style

# Where each algorithm ends and what an agent sends a round: shaped like trials of the digits demo.
PROFILE = {
    "local": (0.34, 0),
    "dlora": (0.69, 74_000),
    "dlora_fa": (0.61, 37_000),
    "decaf": (0.72, 74_000),
    "fedavg": (0.85, 74_000),
    "centralized": (0.93, 0),
}


DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
ENVIRONMENT = {
    "python": "3.11.7",
    "torch": "2.13.0",
    "cpu_count": 2,
    "commit": None,
    "started": "2026-01-01T00:00",
}


def make_run(directory: Path, algorithm: str = "decaf", **options: Any) -> Path:
    """Write a run directory as the engine does.

    Options: agents, rounds, seed, graph, partition, classes, every (rounds between evaluations), measured (rounds
    between measurements), note, lower_is_better, majority (score).
    """
    agents = 1 if algorithm == "centralized" else options.get("agents", 10)
    rounds, seed = options.get("rounds", 30), options.get("seed", 0)
    classes = options.get("classes", DIGITS)
    final, sent = PROFILE.get(algorithm, (0.5, 1_000_000))
    draw = np.random.default_rng([seed, len(algorithm), agents])
    graph = options.get("graph") or ring(agents)
    table = draw.dirichlet([0.1] * agents, size=len(classes)).T * 140
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(yaml.safe_dump({"agents": agents, "note": options.get("note", "<b>&")}))
    records.write_json(directory / "environment.json", ENVIRONMENT)
    records.write_json(
        directory / "run.json",
        {
            "algorithm": algorithm,
            "graph": {"name": graph.name, "weights": graph.weights, "sigma_2": graph.sigma_2},
            "partition": {
                "name": options.get("partition", "dirichlet:0.1"),
                "label_table": table.astype(int),
                "classes": classes,
            },
            "agents": agents,
            "rounds": rounds,
            "seed": seed,
            "task": "digits",
            "score_name": "accuracy",
            "lower_is_better": options.get("lower_is_better", False),
            "majority_score": options.get("majority"),
        },
    )
    skew = draw.normal(0, 0.06 if agents > 1 else 0, agents)
    with RecordWriter(directory / "records.jsonl") as writer:
        for round in range(rounds + 1):
            done = 1 - math.exp(-4 * round / 30)
            evaluated = round in (0, rounds) or round % options.get("every", 5) == 0
            scores = np.clip(0.1 + (final - 0.1) * done + skew * done + draw.normal(0, 0.008, agents), 0, 1)
            trained, mixes = round > 0, sent > 0 and agents > 1
            distance = 0.0 if agents == 1 else (0.4 if mixes else 2.0) * math.sqrt(done) * draw.uniform(0.9, 1.1)
            tail = done * draw.uniform(2e-5, 9e-5)
            measured = round == rounds or round % options.get("measured", 1) == 0
            writer.write(
                Record(
                    round=round,
                    losses=list(2.3 * np.exp(-2 * done * final) + draw.normal(0, 0.05, agents)) if trained else None,
                    scores=scores.tolist() if evaluated else None,
                    averaged_score=float(scores.mean() + 0.05 * done) if evaluated else None,
                    consensus_distance=distance if measured else None,
                    interference=distance**2 * 1e-2 if mixes and trained and measured else None,
                    tail=(tail if algorithm == "decaf" and trained else 0.0 if mixes else None) if measured else None,
                    bytes_sent=float(sent) if trained and agents > 1 else 0.0,
                    learning_rate=0.005,
                    seconds={"train": 0.4, "exchange": 0.05, "combine": 0.02, "evaluate": 0.3 * evaluated},
                )
            )
    records.write_json(directory / "summary.json", [records.summarise(directory)])
    return directory


def make_comparison(directory: Path, algorithms=tuple(PROFILE), seeds=(0, 1, 2), **options: Any) -> Path:
    for algorithm in algorithms:
        for seed in seeds:
            make_run(directory / f"{algorithm}-seed{seed}", algorithm, seed=seed, **options)
    return directory


class Page(HTMLParser):
    """What a reader finds on a page: the texts of its cells and headings, its figures, what it refers to."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.figures: list[str] = []  # their accessible names
        self.rows: list[list[str]] = []
        self.best: list[str] = []
        self.words: dict[str, list[str]] = {
            "h1": [],
            "h2": [],
            "h3": [],
            "figcaption": [],
            "text": [],
            "pre": [],
            "dd": [],
        }
        self._open: list[str] = []
        self._best = False
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self._open == [], "every element is closed"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.tags.append(tag)
        self.ids += [values["id"]] if "id" in values else []
        self.references += [
            v for n, v in values.items() if n in ("src", "href", "xlink:href", "srcset", "action", "data")
        ]
        if tag not in ("meta", "img", "link"):
            self._open.append(tag)
        if tag == "svg":
            assert values["role"] == "img"
            self.figures.append(values["aria-label"])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._best = "best" in values.get("class", "").split()
        if tag in self.words:
            self.words[tag].append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in ("meta", "img", "link"):
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        inner = self._open[-1] if self._open else ""
        if inner in ("td", "th"):
            self.rows[-1][-1] += data
            if self._best:
                self.best.append(data)
        if inner in self.words:
            self.words[inner][-1] += data

    def row(self, name: str) -> list[str]:
        """The row of an algorithm, or of another name, in the result table."""
        return next(row for row in self.rows if row and row[0] == style.called(name))


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_comparison(tmp_path_factory.mktemp("reports") / "comparison")
    rows = [records.summarise(directory / f"{name}-seed{seed}") for name in PROFILE for seed in (0, 1, 2)]
    records.write_json(directory / "summary.json", rows)
    report.write_report(directory)
    return directory


@pytest.fixture(scope="module")
def page(comparison: Path) -> Page:
    return Page(comparison / "report.html")


TITLES = [
    "Score by round",
    "Score by bytes sent",
    "Training loss by round",
    "Consensus distance by round",
    "Interference against truncation",
    "Final score of every agent",
    "Who holds what",
    "Graph: ring",
    "Where the time went",
]


class TestComparison:
    def test_is_self_contained(self, page: Page) -> None:
        assert all(target.startswith(("#", "data:image/png;base64,")) for target in page.references)
        assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
        assert "@import" not in page.source
        assert set(re.findall(r"url\((.)", page.source)) == {"#"}

    def test_references_within_the_page_are_met_once(self, page: Page) -> None:
        assert len(page.ids) == len(set(page.ids))
        wanted = {target[1:] for target in page.references if target.startswith("#")}
        assert wanted | set(re.findall(r"url\(#(.*?)\)", page.source)) <= set(page.ids)

    def test_every_figure_has_its_words(self, page: Page) -> None:
        assert page.words["h3"] == TITLES
        assert len(page.figures) == len(page.words["figcaption"]) == len(TITLES)
        assert all(page.figures)
        assert all(page.words["figcaption"])

    def test_figures_follow_the_colours_of_the_page(self, page: Page) -> None:
        drawings = "".join(re.findall(r"<svg.*?</svg>", page.source, flags=re.DOTALL))
        assert not any(stand_in in drawings for stand_in in report.PAGE_COLOURS)
        assert {"currentColor", "var(--rule)", "var(--cd53d01)"} <= set(
            re.findall(r"currentColor|var\(.*?\)", drawings)
        )

    @pytest.mark.parametrize("algorithm", PROFILE)
    def test_the_table_equals_the_runs(self, comparison: Path, page: Page, algorithm: str) -> None:
        means, sent = [], []
        for seed in (0, 1, 2):
            text = (comparison / f"{algorithm}-seed{seed}" / "records.jsonl").read_text()
            lines = [json.loads(line) for line in text.splitlines()]
            means.append(fmean(lines[-1]["scores"]))
            sent.append(sum(line["bytes_sent"] for line in lines))
        cells = page.row(algorithm)
        assert cells[1] == "3"
        assert cells[2] == f"{fmean(means):.3f} ± {stdev(means):.3f}"
        assert cells[6] == (f"{fmean(sent) / 1e6:.2f} MB" if any(sent) else "–")

    def test_algorithms_stand_in_the_order_of_the_summary(self, page: Page) -> None:
        assert [row[0] for row in page.rows[1:7]] == [style.called(name) for name in PROFILE]

    def test_the_best_that_does_not_pool_the_data_is_highlighted(self, page: Page) -> None:
        fedavg = page.row("fedavg")
        assert page.best == [fedavg[2], fedavg[5]]  # the worst agent's lead may be noise
        assert page.row("centralized")[2] > fedavg[2]

    def test_within_noise_nothing_is_highlighted(self, tmp_path: Path) -> None:
        make_comparison(tmp_path, ("decaf", "fedavg"), seeds=(0,), rounds=2)
        page = page_of(tmp_path)
        assert page.best == []
        assert "No score is highlighted: no lead is more than the noise of the seeds." in page.source
        assert "One seed: no difference can be told from noise" in page.source

    def test_of_a_loss_the_lowest_is_highlighted(self, tmp_path: Path) -> None:
        make_comparison(tmp_path, ("decaf", "fedavg"), lower_is_better=True, rounds=30)
        page = page_of(tmp_path)
        decaf, fedavg = page.row("decaf"), page.row("fedavg")
        assert float(decaf[2].split()[0]) < float(fedavg[2].split()[0])
        assert decaf[2] in page.best
        assert fedavg[2] not in page.best

    def test_of_a_loss_the_worst_agent_has_the_highest(self, tmp_path: Path) -> None:
        make_comparison(tmp_path, ("decaf",), seeds=(0,), lower_is_better=True, rounds=10)
        decaf = page_of(tmp_path).row("decaf")
        agents = json.loads((tmp_path / "decaf-seed0" / "records.jsonl").read_text().splitlines()[-1])["scores"]
        assert decaf[3] == f"{max(agents):.3f}"

    def test_says_that_nothing_was_learnt(self, tmp_path: Path) -> None:
        make_run(tmp_path / "run", rounds=10, majority=0.99)
        page = page_of(tmp_path / "run")
        assert page.row("majority class")[2] == "0.990"
        assert page.row("start")[2] < page.row("decaf")[2]
        assert "Nothing useful was learnt by DeCAF" in page.source
        assert "Nothing useful" not in page_of(make_run(tmp_path / "other", rounds=10, majority=0.1)).source

    def test_the_header_says_what_was_run(self, page: Page) -> None:
        assert page.words["h1"] == ["6 algorithms on digits"]
        facts = [
            "digits",
            "local, DLoRA, DLoRA-FA, DeCAF, FedAvg, centralized",
            "10",
            "30",
            "ring (σ₂ = 0.873)",
            "dirichlet:0.1",
            "0, 1, 2",
            "accuracy",
        ]
        assert page.words["dd"] == facts

    def test_every_configuration_is_there_as_text(self, page: Page) -> None:
        assert len(page.words["pre"]) == 18
        assert yaml.safe_load(page.words["pre"][0])["note"] == "<b>&"
        assert "b" not in page.tags

    def test_figures_label_their_axes(self, page: Page) -> None:
        labels = {text.strip() for text in page.words["text"]}
        assert {
            "round",
            "accuracy",
            "training loss",
            "bytes sent by one agent",
            "zero",
            "nine",
            *map(style.called, PROFILE),
        } <= labels

    def test_text_is_large_enough(self, page: Page) -> None:
        assert min(map(float, re.findall(r"font-size: ([\d.]+)px;[^>]*text-anchor", page.source))) >= 9


def test_every_algorithm_has_a_look_of_its_own() -> None:
    assert set(report.LOOKS) == set(algorithms.KINDS)
    assert len({colour for colour, _ in report.LOOKS.values()}) == len(report.LOOKS)
    spare = {colour for colour, _ in style.SPARE_LOOKS}
    assert not spare & {colour for colour, _ in report.LOOKS.values()}


def page_of(directory: Path) -> Page:
    assert report.write_report(directory) == directory / "report.html"
    return Page(directory / "report.html")


class TestOneRun:
    def test_shows_agents_and_the_averaged_model(self, tmp_path: Path) -> None:
        page = page_of(make_run(tmp_path / "run"))
        assert page.words["h1"] == ["DeCAF on digits"]
        assert page.words["h3"] == TITLES
        assert {"agents' mean", "averaged model"} <= {text.strip() for text in page.words["text"]}
        assert "Band: ± standard deviation over agents" in page.words["figcaption"][0]
        assert page.best == []

    def test_the_same_run_gives_the_same_figures(self, tmp_path: Path) -> None:
        run = make_run(tmp_path / "run", rounds=3)
        first, second = (re.sub("<footer>.*", "", page_of(run).source) for _ in range(2))
        assert first == second

    def test_one_agent(self, tmp_path: Path) -> None:
        page = page_of(make_run(tmp_path / "run", agents=1))
        assert page.words["h3"] == [TITLES[0], TITLES[2], "Truncation tail", "Who holds what", TITLES[-1]]
        assert page.row("decaf")[6] == "–"

    @pytest.mark.parametrize("rounds", [0, 1])
    def test_few_rounds(self, tmp_path: Path, rounds: int) -> None:
        page = page_of(make_run(tmp_path / "run", rounds=rounds))
        assert ("Training loss by round" in page.words["h3"]) == (rounds > 0)
        assert "Score by round" in page.words["h3"]

    def test_nothing_recorded_yet(self, tmp_path: Path) -> None:
        run = make_run(tmp_path / "run")
        (run / "records.jsonl").write_text("")
        page = page_of(run)
        assert page.words["h3"] == ["Who holds what", "Graph: ring"]
        assert page.row("decaf")[2:6] == ["n/a"] * 4

    def test_curves_pass_through_the_measured_rounds_alone(self, tmp_path: Path) -> None:
        directory = make_run(tmp_path / "run", measured=8)
        groups = {"decaf": [reading.read_run(directory)]}
        for plot in (figures._consensus(groups), figures._truncation(groups)):
            assert plot is not None
            for axes in plot.figure.axes:
                rounds = axes.lines[0].get_xdata()
                assert [n for n in rounds if n] == [8, 16, 24, 30]  # a line through these, not broken by the gaps
                assert np.isfinite(np.asarray(axes.lines[0].get_ydata())[-4:]).all()
        report.write_report(directory)
        assert Page(directory / "report.html").words["h3"] == TITLES

    def test_a_hundred_agents_and_classes(self, tmp_path: Path) -> None:
        names = [f"a flower with quite a long name, number {number}" for number in range(102)]
        page = page_of(make_run(tmp_path / "run", agents=100, rounds=2, classes=names))
        assert sorted(page.words["h3"]) == sorted(TITLES)
        shown = [text for text in page.words["text"] if "flower" in text]
        assert 10 <= len(shown) <= 26
        assert max(map(len, shown)) <= 24

    def test_values_that_are_missing_zero_or_not_finite(self, tmp_path: Path) -> None:
        run = make_run(tmp_path / "run", rounds=4, every=1)
        lines = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
        lines[2] |= {
            "losses": None,
            "scores": None,
            "consensus_distance": None,
            "tail": 0.0,
            "interference": 0.0,
        }
        lines[3]["scores"][4] = lines[3]["losses"][4] = lines[4]["scores"][0] = None
        (run / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        page = page_of(run)
        assert page.words["h3"] == TITLES
        assert page.row("decaf")[2] == "n/a"
        assert "nan" not in page.source.lower().replace("finance", "")

    def test_what_a_config_says_is_never_markup(self, tmp_path: Path) -> None:
        attack = '</pre><script>alert("1")</script>$x_{'
        run = make_run(
            tmp_path / "run", rounds=1, note=attack, classes=[attack[:20], "$5", "_hidden"], partition=attack
        )
        page = page_of(run)
        assert "script" not in page.tags
        assert attack in page.words["dd"]
        assert {"$5", "_hidden", attack[:20]} <= {text.strip() for text in page.words["text"]}

    def test_without_config_labels_or_weights(self, tmp_path: Path) -> None:
        run = make_run(tmp_path / "run", rounds=1)
        facts = json.loads((run / "run.json").read_text())
        facts |= {
            "partition": {"name": "iid"},
            "graph": {"name": "random-matching", "sigma_2": None},
            "task": None,
        }
        records.write_json(run / "run.json", facts)
        (run / "config.yaml").unlink()
        (run / "environment.json").unlink()
        page = page_of(run)
        assert page.words["h1"] == ["DeCAF"]
        assert "Who holds what" not in page.words["h3"]
        assert not any("Graph" in title for title in page.words["h3"])


@pytest.fixture(scope="module")
def sections(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """Two graphs under one partition, one under another, and baselines that ran once for all graphs."""
    directory = tmp_path_factory.mktemp("sections")
    options = {"agents": 4, "rounds": 2}
    for graph, partition in ((ring(4), "iid"), (complete(4), "iid"), (ring(4), "by-class")):
        make_run(directory / f"{graph.name}-{partition}", graph=graph, partition=partition, **options)
    for partition in ("iid", "by-class"):
        server = Graph.server([3, 1, 1, 1])
        make_run(directory / f"server-{partition}", "fedavg", graph=server, partition=partition, **options)
    make_run(directory / "pooled", "centralized", graph=ring(1), partition="pooled", rounds=2)
    return page_of(directory)


class TestSections:
    def test_one_for_every_graph_and_partition(self, sections: Page) -> None:
        titles = {"ring · iid", "complete · iid", "ring · by-class"}
        assert set(sections.words["h2"]) == {"Result", "All settings", *titles, "How to repeat it", "Environment"}
        assert sections.words["h3"].count("Score by round") == 3

    def test_baselines_without_a_graph_are_in_each(self, sections: Page) -> None:
        named = {style.called(name) for name in PROFILE}
        algorithms = [row[0] for row in sections.rows if len(row) == 8 and row[0] in named]
        assert sorted(algorithms[:3]) == ["DeCAF", "FedAvg", "centralized"]
        assert algorithms == algorithms[:3] * 3

    def test_scores_of_all_settings_in_one_table(self, sections: Page) -> None:
        rows = [row for row in sections.rows if len(row) == 4]
        assert [row[1:] for row in rows if row[0] == "algorithm"] == [["iid", "by-class", "iid"]] * 2
        decaf, fedavg, centralized = (
            next(row for row in rows if row[0] == name) for name in ("DeCAF", "FedAvg", "centralized")
        )
        assert fedavg[1] == fedavg[3]  # ran once for both graphs
        assert len(set(centralized[1:])) == 1
        assert all(re.fullmatch(r"0\.\d{3}", cell) for cell in decaf[1:])

    def test_of_a_loss_the_lowest_of_a_setting_is_highlighted(self, tmp_path: Path) -> None:
        for seed in (0, 1, 2):
            for name in ("decaf", "fedavg"):
                for graph in (ring(4), complete(4)):
                    options = {"graph": graph, "agents": 4, "rounds": 30, "lower_is_better": True, "seed": seed}
                    make_run(tmp_path / f"{name}-{graph.name}-{seed}", name, **options)
        page = page_of(tmp_path)
        pivot = next(row for row in page.rows if len(row) == 3 and row[0] == "DeCAF")
        assert page.best[:2] == pivot[1:]

    def test_graphs_stand_side_by_side_and_scores_in_one_figure(self, sections: Page) -> None:
        assert sections.words["h3"][:2] == ["Score across settings", "The graphs"]
        assert not [title for title in sections.words["h3"] if title.startswith("Graph:")]
        drawn = "".join(sections.figures)
        assert "ring: σ₂ = 0.333, 4 links." in drawn
        assert "complete: σ₂ = 0.000, 6 links." in drawn

    def test_a_baseline_that_ran_once_is_under_every_graph(self, tmp_path: Path) -> None:
        """As comparisons write them now: the graph is the first one, and a fact says that it is not used."""
        for graph in (ring(4), complete(4)):
            make_run(tmp_path / f"decaf-{graph.name}", graph=graph, agents=4, rounds=2)
        other = make_run(tmp_path / "local-other", "local", graph=ring(4), agents=4, rounds=2, partition="iid")
        for run in (make_run(tmp_path / "local", "local", graph=ring(4), agents=4, rounds=2), other):
            facts = json.loads((run / "run.json").read_text())
            records.write_json(run / "run.json", facts | {"uses_graph": False})
        page = page_of(tmp_path)
        titles = ["ring · dirichlet:0.1", "complete · dirichlet:0.1", "ring · iid"]
        assert sorted(page.words["h2"]) == sorted(
            ["Result", "All settings", *titles, "How to repeat it", "Environment"]
        )
        of_local = next(row for row in page.rows if row[0] == "local")
        assert of_local[1] == of_local[3]

    def test_an_earlier_comparison_with_baselines_under_every_graph(self, tmp_path: Path) -> None:
        for graph in (ring(4), complete(4)):
            for seed, name in enumerate(("local", "decaf", "centralized")):
                make_run(tmp_path / f"{name}-{graph.name}", name, graph=graph, agents=4, rounds=2, seed=seed)
        page = page_of(tmp_path)
        assert len(page.words["h2"]) == 3 + 3
        decaf = page.row("decaf")
        assert len(decaf) == 3

    def test_ids_differ_between_sections(self, sections: Page) -> None:
        assert len(sections.ids) == len(set(sections.ids))


def test_a_page_of_ones_own(tmp_path: Path) -> None:
    """What benchmarks write: a table without pivots."""
    table = {"columns": ["what", "how much"], "groups": [("", [[("a", False), ("<1", True)]])], "note": "so it is"}
    facts, commands, environment = {"fact": "1 of 2"}, {"command": "make"}, {"torch": "2"}
    report.write_page(tmp_path / "page.html", "Mine", facts, table, [("None", [])], commands, environment)
    page = Page(tmp_path / "page.html")
    assert page.rows == [["what", "how much"], ["a", "<1"], ["torch", "2"]]
    assert page.words["h2"] == ["Result", "None", "How to repeat it", "Environment"]


class TestWords:
    """What the page says of a run that tells more of itself than earlier ones did."""

    FACTS: ClassVar = {
        "model": "all-MiniLM-L6-v2",
        "parameters": 22_713_216,
        "data": "messages.csv",
        "num_train": 1200,
        "num_test": 300,
        "rank": 4,
        "steps": 3,
        "batch_size": 16,
        "optimizer": "adamw",
        "majority_score": 0.125,
    }

    def test_sizes_steps_and_own_learning_rates(self, tmp_path: Path) -> None:
        for name, rate in (("decaf", 0.002), ("fedavg", 0.06)):
            run = make_run(tmp_path / name, name, rounds=2)
            facts = json.loads((run / "run.json").read_text()) | self.FACTS | {"learning_rate": rate}
            records.write_json(run / "run.json", facts)
        page = page_of(tmp_path)
        assert {
            "all-MiniLM-L6-v2 (22.7 million parameters)",
            "messages.csv (1,200 to train, 300 to test)",
            "4",
            "3, batch 16, adamw",
            "DeCAF 0.002, FedAvg 0.06",
            "0.125 (majority class)",
        } <= set(page.words["dd"])
        assert "majority class" in {text.strip() for text in page.words["text"]}

    def test_alternative_texts_say_the_result(self, comparison: Path, page: Page) -> None:
        scores = next(text for text in page.figures if "by round. At the end" in text)
        assert scores.startswith("Line chart of the accuracy by round. At the end: centralized 0.92, FedAvg 0.83")
        assert all(re.search(r"\d", text) for text in page.figures)

    @pytest.mark.parametrize("names", [[], ["north", "south", "west"]])
    def test_sites_by_name_and_their_own_tests(self, tmp_path: Path, names: list[str]) -> None:
        run = make_run(tmp_path / "run", agents=3, rounds=1)
        facts = json.loads((run / "run.json").read_text())
        records.write_json(run / "run.json", facts | {"names": names})
        lines = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
        text = "".join(json.dumps(line | {"own_scores": [0.25, 0.5, 0.75]}) + "\n" for line in lines)
        (run / "records.jsonl").write_text(text)
        page = page_of(run)
        assert "Every site" in page.words["h3"]
        told = next(text for text in page.figures if text.startswith("Dot plot of the last score of every site."))
        assert f"DeCAF, own tests: {(names or ['agent 0'])[0]} 0.25" in told
        assert {"DeCAF, all tests", "DeCAF, its own tests"} <= {text.strip() for text in page.words["text"]}

    def test_a_run_with_a_baseline_opens_with_who_gained(self, tmp_path: Path) -> None:
        make_run(tmp_path / "run", "decaf")
        make_run(tmp_path / "run" / "alone", "local")
        page = page_of(tmp_path / "run")
        assert page.words["h1"] == ["DeCAF on digits"]
        assert page.words["h3"][0] == "Together and alone"
        assert "10 of 10 agents are better off than alone" in page.source
        assert page.source.index("better off than alone") < page.source.index("<table")


class TestFigures:
    @pytest.mark.parametrize(("suffix", "begins"), [(".pdf", b"%PDF"), (".svg", b"<?xml"), (".png", b"\x89PNG")])
    def test_files_of_every_format(self, tmp_path: Path, suffix: str, begins: bytes) -> None:
        run = make_run(tmp_path / "run", rounds=1)
        paths = report.write_figures(run, tmp_path / "figures", suffix)
        assert len(paths) >= 7
        assert all(path.suffix == suffix and path.read_bytes().startswith(begins) for path in paths)

    def test_the_command_takes_a_format(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run = make_run(tmp_path / "run", rounds=1)
        assert main(["report", str(run), "--figures", str(tmp_path / "f"), "--format", "svg"]) == 0
        assert all(path.suffix == ".svg" for path in (tmp_path / "f").iterdir())
        assert main(["report", str(run), "--format", "svg"]) == 2
        assert "format: it is that of the files of --figures" in capsys.readouterr().err


class TestMistakes:
    def test_no_run(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="holds no run"):
            report.write_report(tmp_path)

    def test_records_missing(self, tmp_path: Path) -> None:
        run = make_run(tmp_path / "run", rounds=1)
        (run / "records.jsonl").unlink()
        with pytest.raises(UserError, match=r"records\.jsonl"):
            report.write_report(run)
