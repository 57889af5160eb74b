"""The vision-language results in small: a CLIP made from a handful of images, then adapted to turned, inverted ones."""

import io
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModel, AutoProcessor

from decaf_lora import config as configs
from decaf_lora.config import CompareConfig
from decaf_lora.partition import parse
from decaf_lora.runs.build import build_run
from decaf_lora.runs.compare import cells

ROOT = Path(__file__).parent.parent
NAMES = ["airplane", "bird", "cat"]
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("datasets_cache")]


@pytest.fixture(scope="module", autouse=True)
def scripts():
    """scripts/ and benchmarks/ on the path, as when a script of theirs is run."""
    before = sys.path[:]
    sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "benchmarks")]
    yield
    sys.path[:] = before


def picture(label, generator):
    """Noise, a bar in red, green or blue on top: its colour is the class."""
    pixels = generator.integers(0, 60, (32, 32, 3), dtype=np.uint8)
    pixels[:16, :, label] = 250
    return pixels


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """60 training and 12 test images as PNG bytes with the columns that make_small_clip.py reads."""
    folder, generator = tmp_path_factory.mktemp("source"), np.random.default_rng(0)
    for split, count in (("train", 60), ("test", 12)):
        rows = {"image": [], "label_name": []}
        for i in range(count):
            file = io.BytesIO()
            Image.fromarray(picture(i % 3, generator)).save(file, "PNG")
            rows["image"].append(file.getvalue())
            rows["label_name"].append(NAMES[i % 3])
        datasets.Dataset.from_dict(rows).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    import make_small_clip

    folder = tmp_path_factory.mktemp("made") / "clip"
    make_small_clip.make(source, folder, base=30, epochs=20)
    return folder


def test_the_model_is_a_clip_with_its_processor_and_has_learnt(made):
    model, processor = AutoModel.from_pretrained(made / "model").eval(), AutoProcessor.from_pretrained(made / "model")
    generator = np.random.default_rng(9)
    images = [Image.fromarray(picture(label, generator)) for label in (0, 1, 2)]
    captions = [f"a photo of a {name}." for name in NAMES]
    inputs = processor(images=images, text=captions, padding=True, return_tensors="pt")
    assert processor.tokenizer.unk_token_id not in inputs["input_ids"]
    assert inputs["pixel_values"].shape == (3, 3, 32, 32)
    expected = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(inputs["pixel_values"], expected, rtol=0, atol=1e-6)
    with torch.no_grad():
        assert model(**inputs).logits_per_image.argmax(1).tolist() == [0, 1, 2]


def test_the_same_images_make_the_same_bytes(source, made, tmp_path):
    import make_small_clip

    make_small_clip.make(source, tmp_path / "again", base=30, epochs=20)
    files = sorted(p.relative_to(made) for p in made.rglob("*") if p.is_file() and p.name != "README.md")
    assert len(files) >= 6
    for name in files:
        assert (made / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_the_agents_images_are_turned_inverted_and_unseen(source, made):
    original = {
        split: {Image.open(io.BytesIO(row["image"])).tobytes(): row["label_name"] for row in rows}
        for split, rows in datasets.load_dataset(str(source)).items()
    }
    agents = datasets.load_dataset(str(made / "images"))
    assert {split: len(rows) for split, rows in agents.items()} == {"train": 30, "test": 12}
    for split, rows in agents.items():
        for row in rows:
            back = np.rot90(255 - np.asarray(row["image"]), -1)
            assert original[split][back.tobytes()] == rows.features["label"].int2str(row["label"])


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_the_benchmark_deals_forty_images_a_class(partition):
    import results_clip

    base = results_clip.config(partition)
    labels = np.repeat(np.arange(10), 60)
    shards = parse(base.partition, labels, base.agents, 0)
    assert shards.label_table().sum(0).tolist() == [40] * 10
    assert (shards.label_table() == 4).all() == (partition == "iid")


def test_agents_adapt_it_and_peft_loads_what_they_learnt(made, tmp_path):
    values = configs.load(CompareConfig, ROOT / "benchmarks" / "clip.yaml").model_dump()
    values["task"] |= {"model": str(made / "model"), "data": str(made / "images")}
    values |= {"partition": "shots:10", "rounds": 2, "algorithms": ["decaf"], "seeds": [0]}
    values["training"]["learning_rate"] = 0.02
    (cell,) = cells(CompareConfig.model_validate(values))
    run = build_run(cell.config)
    try:
        _, first, second = run.train()
        assert np.mean(second.losses) < np.mean(first.losses)
        assert {site.split(".")[0] for site in run.attached.sites} == {"text_model", "vision_model"}
        batch = run.task.test_batch(np.arange(12))
        run.save_adapter(tmp_path / "agent", 4)
        theirs = PeftModel.from_pretrained(AutoModel.from_pretrained(made / "model").eval(), tmp_path / "agent").eval()
        with torch.no_grad(), run.attached.bind(run.adapter.select([4])):
            ours = run.task.logits(batch["pixel_values"], 1)
            expected = theirs(pixel_values=batch["pixel_values"], **run.task._tokens).logits_per_image
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    finally:
        run.close()


def test_the_benchmark_searches_and_ends_in_a_table_and_figures(made, tmp_path, monkeypatch, capsys):
    import results_clip

    full = results_clip.config("iid").model_dump()
    task = full["task"] | {"model": str(made / "model"), "data": str(made / "images")}
    few = {"task": task, "partition": "shots:10", "algorithms": ["dlora_fa"], "rounds": 1, "seeds": [0, 1]}
    monkeypatch.setattr(results_clip, "config", lambda partition: CompareConfig.model_validate(full | few))
    monkeypatch.setattr(results_clip, "RATES", (0.01, 0.02))
    monkeypatch.setattr(sys, "argv", ["results_clip.py", "--out", str(tmp_path), "--partitions", "iid"])
    results_clip.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| dlora_fa |")]
    assert "0.04: " in rows[0]  # four times the others' rate
    assert rows[1].startswith("| dlora_fa | ring | shots:10 | 2 |")
    assert {p.suffix for p in (tmp_path / "iid" / "figures").iterdir()} == {".png"}
