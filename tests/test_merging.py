"""Merging adapters: against dense SVDs in float64, against PEFT, and what must not be merged."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from decaf_lora import adapters
from decaf_lora.cli import main
from decaf_lora.errors import UserError

LAYERS = {"block.q": (6, 10), "block.v": (7, 5)}  # (d_out, d_in)


def write(
    directory: Path, rank: int = 2, alpha: float = 4, seed: int = 0, head: int = 0, **fields: Any
) -> tuple[Path, dict[str, Tensor]]:
    """An adapter by hand; returns its directory, and its updates s B A in float64 by layer."""
    draw = torch.Generator().manual_seed(seed)
    layers = fields.pop("layers", LAYERS)
    ranks = {layer: fields.get("rank_pattern", {}).get(layer, rank) for layer in layers}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "some/base",
        "task_type": "SEQ_CLS" if head else None,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": ["q", "v"],
        "modules_to_save": ["classifier"] if head else None,
        **fields,
    }
    tensors, updates = {}, {}
    for layer, (d_out, d_in) in layers.items():
        a, b = (torch.randn(*shape, generator=draw) for shape in ((ranks[layer], d_in), (d_out, ranks[layer])))
        tensors |= {f"base_model.model.{layer}.lora_{k}.weight": t for k, t in (("A", a), ("B", b))}
        scale = alpha / (ranks[layer] ** 0.5 if fields.get("use_rslora") else ranks[layer])
        updates[layer] = scale * (b.double() @ a.double())
    if head:
        tensors["base_model.model.classifier.weight"] = torch.randn(head, 5, generator=draw)
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory, updates


def updates_of(directory: Path) -> dict[str, Tensor]:
    """The updates s B A of a written adapter, by PEFT's rule of ranks and scales."""
    config = LoraConfig.from_pretrained(str(directory))
    tensors = load_file(directory / "adapter_model.safetensors")
    found = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = tensors[name.replace("lora_A", "lora_B")]
            rank, alpha = len(a), config.lora_alpha
            for pattern, value in config.alpha_pattern.items():
                alpha = value if layer == pattern.removeprefix("^").replace("\\.", ".") else alpha
            found[layer] = alpha / rank * (b.double() @ a.double())
    return found


def cut(matrix: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


class TestAgainstDenseSvd:
    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
        rank=st.none() | st.integers(1, 6),
        alphas=st.lists(st.sampled_from([1, 4, 7.5]), min_size=4, max_size=4),
        weights=st.none() | st.lists(st.floats(0.1, 9), min_size=4, max_size=4),
        rslora=st.booleans(),
    )
    def test_any_ranks_scales_and_weights(
        self,
        tmp_path: Path,
        ranks: list[int],
        rank: int | None,
        alphas: list[float],
        weights: list[float] | None,
        rslora: bool,
    ) -> None:
        place = Path(str(tmp_path / f"{np.random.default_rng().integers(2**62)}"))
        given_ = [
            write(place / str(i), r, alphas[i], seed=i, use_rslora=rslora and i % 2 == 0) for i, r in enumerate(ranks)
        ]
        own = None if weights is None else weights[: len(ranks)]
        merged = adapters.merge([d for d, _ in given_], place / "m", weights=own, rank=rank)
        shares = np.full(len(ranks), 1.0) if own is None else np.array(own)
        shares = shares / shares.sum()
        found = updates_of(place / "m")
        cut_all = whole_all = 0.0
        for layer, (d_out, d_in) in LAYERS.items():
            mean = sum(float(w) * u[layer] for w, (_, u) in zip(shares, given_, strict=True))
            best = cut(mean, min(rank or max(ranks), d_out, d_in))
            norm = torch.linalg.norm(mean)
            assert torch.linalg.norm(found[layer] - best) <= 1e-5 * norm
            lost = torch.linalg.norm(mean - best)
            assert merged.lost[layer] == pytest.approx(float(lost / norm), abs=1e-6)
            cut_all, whole_all = cut_all + float(lost**2), whole_all + float(norm**2)
        assert merged.lost_in_all == pytest.approx((cut_all / whole_all) ** 0.5, abs=1e-6)
        assert sum(merged.weights) == pytest.approx(1)

    def test_adapters_that_cancel_lose_nothing(self, tmp_path: Path) -> None:
        """Two opposite adapters and a small third: what remains is right to its own size, not to theirs."""
        one, updates = write(tmp_path / "a", 3, seed=1)
        two, _ = write(tmp_path / "b", 3, seed=1)
        tensors = load_file(two / "adapter_model.safetensors")
        save_file({k: (-t if "lora_B" in k else t) for k, t in tensors.items()}, two / "adapter_model.safetensors")
        small, remains = write(tmp_path / "c", 1, alpha=1e-4, seed=2)
        adapters.merge([one, two, small], tmp_path / "m")
        for layer, update in updates_of(tmp_path / "m").items():
            expected = remains[layer] / 3
            assert torch.linalg.norm(update - expected) <= 1e-5 * torch.linalg.norm(expected)
        assert updates

    def test_a_layer_smaller_than_the_rank(self, tmp_path: Path) -> None:
        layers = {"block.q": (20, 30), "block.v": (3, 9)}
        pattern = {"block.v": 2}
        given_ = [
            write(tmp_path / str(i), 4, 8, seed=i, layers=layers, rank_pattern=pattern, alpha_pattern={"block.v": 8})
            for i in range(3)
        ]
        adapters.merge([d for d, _ in given_], tmp_path / "m", rank=9)
        config = json.loads((tmp_path / "m" / "adapter_config.json").read_text())
        assert (config["r"], list(config["rank_pattern"].values())) == (9, [3])
        ratios = {config["lora_alpha"] / 9, *(a / 3 for a in config["alpha_pattern"].values())}
        assert len({round(r, 9) for r in ratios}) == 1, "one lora_alpha / r for all layers"
        for layer, update in updates_of(tmp_path / "m").items():
            mean = sum(u[layer] for _, u in given_) / 3
            assert torch.linalg.norm(update - cut(mean, 9)) <= 1e-5 * torch.linalg.norm(mean)

    def test_heads_are_averaged_plainly(self, tmp_path: Path) -> None:
        for i in range(3):
            write(tmp_path / str(i), i + 1, seed=i, head=2)
        adapters.merge([tmp_path / str(i) for i in range(3)], tmp_path / "m", weights=[1, 2, 5])
        heads = [
            load_file(tmp_path / n / "adapter_model.safetensors")["base_model.model.classifier.weight"]
            for n in ("0", "1", "2", "m")
        ]
        torch.testing.assert_close(heads[3], (heads[0] + 2 * heads[1] + 5 * heads[2]) / 8)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write("bert", tmp_path_factory.mktemp("merging") / "bert")


def trained(base: Path, to: Path, seed: int, kind: str = "SEQ_CLS", **lora: Any) -> Path:
    """An adapter of PEFT's own on the tiny model, with random weights, its tokenizer and labels beside it."""
    labels = ("no", "yes", "so")
    cls = transformers.AutoModelForSequenceClassification if kind == "SEQ_CLS" else transformers.AutoModel
    options = {"num_labels": len(labels)} if kind == "SEQ_CLS" else {}
    torch.manual_seed(0)
    model = get_peft_model(
        cls.from_pretrained(base, **options),
        LoraConfig(**{"r": 2, "target_modules": ["query", "value"], "task_type": kind, **lora}),
    )
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    model.save_pretrained(to)
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(to)
    (to / "labels.json").write_text(json.dumps({"id2label": {str(i): n for i, n in enumerate(labels)}}))
    return to


@pytest.mark.filterwarnings("ignore")
class TestWithPeft:
    def test_equals_pefts_own_where_peft_can(self, bert: Path, tmp_path: Path) -> None:
        """`add_weighted_adapter` with "svd": adapters without heads."""
        ranks = (4, 8, 2)
        given_ = [
            trained(bert, tmp_path / str(i), i, kind="FEATURE_EXTRACTION", r=r, lora_alpha=3 * r)
            for i, r in enumerate(ranks)
        ]
        merged = adapters.merge(given_, tmp_path / "m", rank=5)
        model = PeftModel.from_pretrained(transformers.AutoModel.from_pretrained(bert), given_[0], adapter_name="0")
        for i in (1, 2):
            model.load_adapter(given_[i], adapter_name=str(i))
        model.add_weighted_adapter(
            ["0", "1", "2"], [1 / 3] * 3, "peft", combination_type="svd", svd_rank=5, svd_full_matrices=False
        )
        model.load_adapter(tmp_path / "m", adapter_name="ours")
        layers = [m for m in model.modules() if hasattr(m, "get_delta_weight")]
        assert len(layers) == len(merged.lost) > 0
        for layer in layers:
            theirs, ours = layer.get_delta_weight("peft"), layer.get_delta_weight("ours")
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
            assert float(ours.norm()) > 0.1

    def test_peft_loads_the_merged_adapter_with_its_head(self, bert: Path, tmp_path: Path) -> None:
        """At a rank that loses nothing the merged model's weights are the average of the merged full models'."""
        given_ = [trained(bert, tmp_path / str(i), i, r=r) for i, r in enumerate((2, 3, 1))]
        merged = adapters.merge(given_, tmp_path / "m", weights=[3, 2, 1], rank=6, base=str(bert))
        assert max(merged.lost.values()) < 1e-6

        def full(directory: Path) -> dict[str, Tensor]:
            model = transformers.AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
            return PeftModel.from_pretrained(model, directory).merge_and_unload().state_dict()

        alone = [full(directory) for directory in given_]
        ours = full(tmp_path / "m")
        written = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "m" / "model")
        assert written.config.id2label == {0: "no", 1: "yes", 2: "so"}
        for name, tensor in written.state_dict().items():
            expected = (3 * alone[0][name] + 2 * alone[1][name] + alone[2][name]) / 6
            torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-5)
        for directory in (tmp_path / "m", tmp_path / "m" / "model"):
            files = {path.name for path in directory.iterdir()}
            assert {"tokenizer.json", "labels.json", "README.md", "decaf_lora.json"} <= files


def line_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("decaf: ")
    assert err.count("\n") == 0, err
    return err


def labels(directory: Path, *names: str) -> None:
    (directory / "labels.json").write_text(json.dumps({"id2label": {str(i): n for i, n in enumerate(names)}}))


MISTAKES: dict[str, tuple[Callable[[Path], Any], Sequence[str]]] = {
    "another base": (
        lambda d: write(d, base_model_name_or_path="other/base", head=2),
        ("some/base", "other/base", "--base"),
    ),
    "another revision": (lambda d: write(d, revision="abc", head=2), ("revision", "abc")),
    "another task": (lambda d: write(d, task_type="CAUSAL_LM", head=2, modules_to_save=None), ("task_type",)),
    "another layer": (lambda d: write(d, layers={"block.q": (6, 10)}, head=2), ("block.v", "target_modules")),
    "another size": (lambda d: write(d, layers=LAYERS | {"block.q": (6, 11)}, head=2), ("6 x 10", "6 x 11")),
    "another head": (lambda d: write(d, head=3), ("classifier.weight", "(2, 5)", "(3, 5)")),
    "no head": (lambda d: write(d, task_type="SEQ_CLS"), ("classifier.weight", "missing")),
    "another order": (lambda d: write(d, head=2) and labels(d, "yes", "no"), ("no, yes", "yes, no")),
    "another initialisation": (lambda d: write(d, head=2, init_lora_weights="pissa"), ("pissa",)),
    "dora": (lambda d: write(d, head=2, use_dora=True), ("use_dora",)),
    "not there": (lambda d: None, ("adapter_config.json",)),
}


class TestMistakes:
    @pytest.mark.parametrize("mistake", MISTAKES)
    def test_what_must_not_be_merged(self, tmp_path: Path, capsys: pytest.CaptureFixture[str], mistake: str) -> None:
        write(tmp_path / "a", head=2, revision="first" if "revision" in mistake else None)
        labels(tmp_path / "a", "no", "yes")
        make, named = MISTAKES[mistake]
        make(tmp_path / "b")
        line = line_of(capsys, "merge", tmp_path / "a", tmp_path / "b", "--to", tmp_path / "m")
        assert all(part in line for part in named), line
        assert str(tmp_path / "b") in line
        assert not (tmp_path / "m").exists()

    @pytest.mark.parametrize(
        "options",
        [
            ("--weights", 1),
            ("--weights", -1, 2),
            ("--weights", 0, 0),
            ("--weights", "nan", 1),
            ("--rank", 0),
            ("--rank", 7),
        ],
    )
    def test_numbers_that_make_no_sense(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[object, ...]
    ) -> None:
        for name in ("a", "b"):
            write(tmp_path / name)
        line = line_of(capsys, "merge", tmp_path / "a", tmp_path / "b", "--to", tmp_path / "m", *options)
        assert options[0].removeprefix("--") + ":" in line  # type: ignore[attr-defined]

    def test_a_base_that_is_not_named(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """One line, and it goes on."""
        write(tmp_path / "a", base_model_name_or_path="", seed=1)
        write(tmp_path / "b", base_model_name_or_path=None, seed=2)
        write(tmp_path / "c")
        paths = [tmp_path / name for name in "abc"]
        assert main(["merge", *map(str, paths), "--to", str(tmp_path / "m")]) == 0
        told = capsys.readouterr()
        assert told.err.count("does not say which base") == 2
        config = json.loads((tmp_path / "m" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "some/base"
        assert "3 adapters (weights 0.333, 0.333, 0.333) at rank 2; the cut lost" in told.out

    def test_labels_that_are_not_known(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write(tmp_path / "a", head=2)
        write(tmp_path / "b", head=2, seed=1)
        labels(tmp_path / "a", "no", "yes")
        assert main(["merge", str(tmp_path / "a"), str(tmp_path / "b"), "--to", str(tmp_path / "m")]) == 0
        assert "labels.json" in capsys.readouterr().err
        assert (tmp_path / "m" / "labels.json").exists()

    def test_a_full_model_without_a_place(self, tmp_path: Path) -> None:
        write(tmp_path / "a")
        with pytest.raises(UserError, match="base: "):
            adapters.merge([tmp_path / "a"], base="some/base")
        with pytest.raises(UserError, match="no adapter"):
            adapters.merge([])

    def test_a_base_that_cannot_be_loaded_leaves_nothing(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write(tmp_path / "a")
        line = line_of(capsys, "merge", tmp_path / "a", "--base", tmp_path / "nowhere", "--to", tmp_path / "m")
        assert "nowhere" in line
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_one_adapter_is_cut_to_a_smaller_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, updates = write(tmp_path / "a", 4)
    shutil.copy(one / "adapter_config.json", tmp_path / "kept.json")
    assert main(["merge", str(one), "--rank", "1", "--to", str(tmp_path / "m")]) == 0
    assert "the cut lost" in capsys.readouterr().out
    for layer, update in updates_of(tmp_path / "m").items():
        torch.testing.assert_close(update, cut(updates[layer], 1), rtol=1e-5, atol=1e-5)
    assert (one / "adapter_config.json").read_bytes() == (tmp_path / "kept.json").read_bytes()


@pytest.mark.filterwarnings("ignore")
def test_the_merge_of_all_agents_is_the_averaged_model(tmp_path: Path) -> None:
    """Agents of unequal ranks: what a run exports as its average, and the merge of what it exports of each."""
    ranks = ("--agents", 3, "--lora.ranks", 1, 4, 2, "--rounds", 1, "--training.agents_per_pass", 1, "--lr", 0.05)
    assert main([str(a) for a in ("run", "digits", *ranks, "--algorithm", "local", "--out", tmp_path / "r")]) == 0
    for whose in ("all", "averaged"):
        assert main(["export", str(tmp_path / "r"), "--agent", whose, "--to", str(tmp_path / whose)]) == 0
    adapters.merge([tmp_path / "all" / f"agent-{i}" for i in range(3)], tmp_path / "m")
    ours, runs = updates_of(tmp_path / "m"), updates_of(tmp_path / "averaged")
    assert ours.keys() == runs.keys()
    for layer, update in runs.items():
        assert torch.linalg.norm(ours[layer] - update) <= 1e-5 * torch.linalg.norm(update)
    assert {"tokenizer.json", "labels.json", "decaf_lora.json"} <= {path.name for path in (tmp_path / "m").iterdir()}
