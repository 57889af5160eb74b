"""The embedded digits: is the asset whole, as good as its card says, and blind to what the agents learn?"""

import hashlib
import re
import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from transformers import AutoTokenizer, CLIPModel
from transformers.utils import logging

from decaf_lora import errors
from decaf_lora.tasks.demo import digits_data

SPLITS = ("base", "train", "test")
CARD = (digits_data.MODEL_DIR / "README.md").read_text()


@pytest.fixture(scope="module")
def model():
    return CLIPModel.from_pretrained(digits_data.MODEL_DIR).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(digits_data.MODEL_DIR)


@torch.no_grad()
def zero_shot_accuracy(model, tokenizer, digits, template=digits_data.TEMPLATE):
    captions = [template.format(name) for name in digits_data.CLASS_NAMES]
    text = tokenizer(captions, padding=True, return_tensors="pt")
    logits = model(pixel_values=torch.from_numpy(digits.images), **text).logits_per_image
    return (logits.argmax(dim=1).numpy() == digits.labels).mean()


# The asset


def test_checksums_match_every_file():
    lines = (digits_data.MODEL_DIR / "CHECKSUMS.sha256").read_text().splitlines()
    listed = {name: digest for digest, name in (line.split("  ") for line in lines)}
    present = {path.name: path for path in digits_data.MODEL_DIR.iterdir() if path.name != "CHECKSUMS.sha256"}
    assert listed == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in present.items()}


def test_asset_is_at_most_a_megabyte():
    assert sum(path.stat().st_size for path in digits_data.MODEL_DIR.iterdir()) <= 1_000_000


def test_loads_in_float32_without_a_warning(caplog):
    logger = logging.get_logger("transformers")
    logger.addHandler(caplog.handler)  # transformers' logger does not propagate to the root logger
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model, report = CLIPModel.from_pretrained(digits_data.MODEL_DIR, output_loading_info=True)
            AutoTokenizer.from_pretrained(digits_data.MODEL_DIR)
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records
    assert not any(report.values())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_base_knows_plain_digits_and_is_lost_on_shifted_ones(model, tokenizer):
    plain = zero_shot_accuracy(model, tokenizer, digits_data.load("test"))
    shifted = zero_shot_accuracy(model, tokenizer, digits_data.load("test", shift=True))
    assert plain >= 0.94
    assert shifted <= 0.2
    stated = [float(value) for value in re.findall(r"\| \**(0\.\d{3})\** \|", CARD)]
    assert stated == pytest.approx([plain, shifted], abs=0.006)  # two images: another CPU rounds otherwise


@pytest.mark.parametrize("template", ["a rotated photo of the digit {}", "a handwritten digit {}"])
def test_other_templates_name_the_same_classes(model, tokenizer, template):
    assert zero_shot_accuracy(model, tokenizer, digits_data.load("test"), template) >= 0.94


def test_the_text_is_pooled_at_its_end_whatever_the_padding(model, tokenizer):
    caption = "a photo of the digit seven"
    text = tokenizer(caption, return_tensors="pt")
    padded = tokenizer(caption, padding="max_length", return_tensors="pt")
    hidden = model.text_model(**text)
    assert text.input_ids[0, -1] == tokenizer.eos_token_id
    assert torch.equal(hidden.pooler_output, hidden.last_hidden_state[:, -1])
    assert padded.input_ids.shape == (1, model.config.text_config.max_position_embeddings)
    torch.testing.assert_close(model.text_model(**padded).pooler_output, hidden.pooler_output)


@pytest.mark.parametrize("name", digits_data.CLASS_NAMES)
@pytest.mark.parametrize(
    "template", [digits_data.TEMPLATE, "a rotated photo of the digit {}", "a handwritten digit {}"]
)
def test_tokenizer_round_trips(tokenizer, template, name):
    caption = template.format(name)
    ids = tokenizer(caption).input_ids
    assert len(ids) == len(caption.split()) + 2
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == caption
    assert tokenizer.decode(ids) == f"<bos> {caption} <eos>"


def test_tokenizer_ignores_case_and_marks_unknown_words(tokenizer):
    assert tokenizer("A Photo").input_ids == tokenizer("a photo").input_ids
    assert tokenizer("a zebra").input_ids[2] == tokenizer.unk_token_id


# The data


def test_splits_are_disjoint_and_together_all_digits():
    indices = digits_data.split_indices()
    assert {split: len(indices[split]) for split in SPLITS} == {"base": 600, "train": 800, "test": 397}
    np.testing.assert_array_equal(np.sort(np.concatenate([indices[split] for split in SPLITS])), np.arange(1797))


def test_splits_are_the_same_every_time():
    first = digits_data.split_indices()
    digits_data.split_indices.cache_clear()
    again = digits_data.split_indices()
    assert all(np.array_equal(first[split], again[split]) for split in SPLITS)


@pytest.mark.parametrize("split", SPLITS)
def test_splits_have_the_class_mix_of_the_whole(split):
    labels = digits_data.load(split).labels
    expected = np.bincount(load_digits().target) * len(labels) / 1797
    assert np.abs(np.bincount(labels, minlength=10) - expected).max() < 1.5


@pytest.mark.parametrize("shift", [False, True])
def test_no_base_image_is_among_the_agents_data(shift):
    base = {image.tobytes() for image in digits_data.load("base").images + 0.0}  # + 0.0: no negative zero
    agents = np.concatenate([digits_data.load(split, shift=shift).images for split in ("train", "test")]) + 0.0
    assert len(base) == 600
    assert not base & {image.tobytes() for image in agents}


@pytest.mark.parametrize("split", SPLITS)
def test_images_are_the_source_scaled_and_shifted(split):
    source = load_digits()
    rows = digits_data.split_indices()[split]
    plain, shifted = digits_data.load(split), digits_data.load(split, shift=True)
    for digits in (plain, shifted):
        assert digits.images.dtype == np.float32
        assert digits.images.shape == (len(rows), 1, 8, 8)
        assert digits.images.flags.c_contiguous
        assert digits.labels.dtype == np.int64
        np.testing.assert_array_equal(digits.labels, source.target[rows])
    for row, image, turned in zip(rows, plain.images, shifted.images, strict=True):
        np.testing.assert_array_equal(image[0], source.images[row] / 8 - 1)
        np.testing.assert_array_equal(turned[0], np.rot90(16 - source.images[row]) / 8 - 1)


def test_the_turn_is_counter_clockwise():
    image = np.zeros((1, 1, 8, 8), np.float32)
    image[..., 0, 7] = 1  # the corner at the top right goes to the top left
    expected = np.zeros_like(image)
    expected[..., 0, 0] = -1
    np.testing.assert_array_equal(digits_data.shifted(image), expected)


def test_a_caller_may_change_what_it_was_given():
    digits_data.load("test").images[:] = 0
    assert digits_data.load("test").images.min() == -1


def test_another_order_of_the_data_is_refused(monkeypatch):
    monkeypatch.setattr(digits_data, "_SEED", 1)
    digits_data.split_indices.cache_clear()
    with pytest.raises(RuntimeError, match="other digits than those the embedded base model was trained with"):
        digits_data.split_indices()


def test_an_unknown_split_is_a_users_mistake():
    with pytest.raises(errors.UserError, match="Did you mean 'train'"):
        digits_data.load("trian")
