"""Images: deep ones keep their shades, folders mean one class each, and what is no image is named."""

import struct
import warnings
import zlib

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from decaf_lora.data import decode_image
from decaf_lora.errors import UserError
from inputs import album, load, make, model

pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return model("clip", tmp_path_factory.mktemp("models"))


def images(source, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load(source, columns=[], image="image", test_split="test", **options)


def noise(dtype, top, seed=0):
    """Images that use all values from 0 to `top` alike."""
    generator = np.random.default_rng(seed)
    return lambda k, i: Image.fromarray((generator.random((20, 20)) * top).astype(dtype))


# More than 8 bits


@pytest.mark.parametrize(
    ("dtype", "top", "suffix", "pixel_range"),
    [
        (np.uint16, 65535, "png", None),
        (np.uint16, 4095, "png", (0, 4095)),
        (np.int32, 65535, "tiff", None),
        (np.float32, 1, "tiff", None),
        (np.float32, 255, "tiff", (0, 255)),
    ],
)
def test_deep_images_keep_their_shades(dtype, top, suffix, pixel_range, tmp_path):
    values = (np.random.default_rng(0).random((40, 40)) * top).astype(dtype)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    image = decode_image({"bytes": None, "path": str(tmp_path / f"a.{suffix}")}, "", pixel_range)
    assert image.mode == "RGB"
    shades = np.asarray(image)
    expected = values.astype(float) * 255 / top
    assert np.abs(shades - expected[:, :, None]).max() <= 0.5 + 1e-6
    assert np.isin(shades, (0, 255)).mean() < 0.02


def test_images_of_8_bits_are_as_ever(tmp_path):
    for mode in ("L", "RGB", "RGBA", "P", "1", "CMYK", "LA"):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)).convert(mode)
        path = tmp_path / f"{mode}.{'tiff' if mode == 'CMYK' else 'png'}"
        image.save(path)
        with Image.open(path) as plain:
            np.testing.assert_array_equal(
                np.asarray(decode_image({"bytes": None, "path": str(path)})), np.asarray(plain.convert("RGB"))
            )


def test_values_beyond_the_scale_are_refused_and_dark_ones_told(tmp_path):
    wide = album(tmp_path / "wide", make=lambda k, i: Image.fromarray(np.full((9, 9), -1000, np.int32)), suffix="tiff")
    message = r"task\.pixel_range: 8 of 8 train images have more than 8 bits a channel, and values beyond 0 to 65535"
    with pytest.raises(UserError, match=message):
        load(wide, columns=[], image="image", test_split="test")
    images(wide, pixel_range=(-1000, 3000))
    dark = album(tmp_path / "dark", make=noise(np.uint16, 4095))
    with pytest.warns(UserWarning, match=r"task\.pixel_range: 8 of 8 train images .* use only 6\.\d% of the scale"):
        load(dark, columns=[], image="image", test_split="test")
    images(dark, pixel_range=(0, 4095))
    images(album(tmp_path / "full", make=noise(np.uint16, 65535)))


def save_16_bit_png(path, value, colour_type):
    """PIL writes no PNG of 16 bits a channel with colours (type 2) or transparency (4: grey, 6: colours)."""
    channels = {2: 3, 4: 2, 6: 4}[colour_type]
    row = b"\0" + struct.pack(">H", value) * (9 * channels)

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    parts = {b"IHDR": struct.pack(">IIBBBBB", 9, 9, 16, colour_type, 0, 0, 0), b"IDAT": zlib.compress(row * 9)}
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts.items()) + chunk(b"IEND", b""))


@pytest.mark.parametrize("colour_type", [2, 4, 6])
def test_deep_images_with_colours_have_one_scale(colour_type, tmp_path):
    """PIL keeps the upper 8 of their 16 bits: values up to 4095 are nearly black, and no scale can mend it."""

    def deep(name, top):
        root = album(tmp_path / name)
        for i, path in enumerate(sorted(root.rglob("*.png"))):
            save_16_bit_png(path, top * (i % 4 + 1) // 4, colour_type)
        return root

    images(deep("full", 65535))
    message = r"task\.data: 8 of 8 train images have 16 bits a channel and use only 5\.9% of the scale from 0 to 65535"
    with pytest.warns(UserWarning, match=message):
        load(deep("dark", 4095), columns=[], image="image", test_split="test")
    with pytest.raises(UserError, match=r"task\.pixel_range: 8 of 8 train images have 16 bits a channel and colours"):
        load(tmp_path / "dark", columns=[], image="image", test_split="test", pixel_range=(0, 4095))


def test_the_task_reads_deep_images_as_the_scale_says(clip, tmp_path):
    root = album(tmp_path / "a", make=noise(np.uint16, 4095))
    bright = make("image-text", model=clip, data=root, pixel_range=(0, 4095)).train_batch(np.arange(8))["pixel_values"]
    with pytest.warns(UserWarning, match=r"task\.pixel_range"):
        dark = make("image-text", model=clip, data=root).train_batch(np.arange(8))["pixel_values"]
    assert (bright.std((0, 2, 3)) > 10 * dark.std((0, 2, 3))).all()


# Columns that hold none


@pytest.mark.parametrize("value", [1, 1.5, True, ["x.png"], {"a": 1}])
def test_columns_of_other_things_are_refused(value, tmp_path):
    path = tmp_path / "a.parquet"
    Dataset.from_dict({"image": [value] * 12, "label": ["cat", "dog"] * 6}).to_parquet(path)
    with pytest.raises(UserError, match=r"task\.image_column: column 'image' holds .*, not images; name a column"):
        load(path, columns=[], image="image")


def test_paths_to_nothing_are_counted(tmp_path):
    Dataset.from_dict({"image": ["x.png", ""] * 6, "label": ["cat", "dog"] * 6}).to_csv(tmp_path / "a.csv")
    with pytest.raises(
        UserError, match=r"6 of 12 train examples have nothing in column 'image' \(first: line 3 of a\.csv"
    ):
        load(tmp_path / "a.csv", columns=[], image="image")
    Dataset.from_dict({"image": ["x.png", "y.png"] * 6, "label": ["cat", "dog"] * 6}).to_csv(tmp_path / "b.csv")
    with pytest.raises(UserError, match=r"12 of 12 train images do not decode: x\.png, y\.png"):
        load(tmp_path / "b.csv", columns=[], image="image")


# Folders


@pytest.mark.parametrize("name", ["classes.txt", "README.txt", "labels.csv", "train/cat/Thumbs.db", "notes.json"])
def test_files_beside_images_are_counted(name, tmp_path):
    root = album(tmp_path / "a")
    (root / name).write_text("cat\ndog\n")
    with pytest.warns(UserWarning, match=rf"task\.data: 1 of the files in .* are not read: {name}\.") as seen:
        found = load(root, columns=[], image="image", test_split="test")
    assert len(seen) == 1
    assert (len(found.train), len(found.test), found.classes) == (8, 8, ["cat", "dog"])


def test_folders_of_folders_are_refused_with_both_readings(tmp_path):
    root = tmp_path / "a"
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            for session in ("one", "two"):
                (root / split / name / session).mkdir(parents=True)
                Image.new("RGB", (9, 9)).save(root / split / name / session / "0.png")
    with pytest.raises(UserError, match=r"its class could be 'cat' or 'one'; put all images of a class directly"):
        load(root, columns=[], image="image", test_split="test")


def test_one_image_deeper_is_named(tmp_path):
    root = album(tmp_path / "a")
    (root / "train" / "cat" / "more").mkdir()
    Image.new("RGB", (9, 9)).save(root / "train" / "cat" / "more" / "z.png")
    with pytest.raises(UserError, match=r"images lie at different depths \(.*cat0\.png, train/cat/more/z\.png\)"):
        load(root, columns=[], image="image", test_split="test")


def test_images_in_no_class_are_named(tmp_path):
    (tmp_path / "train").mkdir()
    for i in range(4):
        Image.new("RGB", (9, 9)).save(tmp_path / "train" / f"{i}.png")
    with pytest.raises(UserError, match=r"lie in no folder of a class; put those of each class into a folder"):
        load(tmp_path, columns=[], image="image")


def test_folders_without_splits(tmp_path):
    album(tmp_path / "a", splits=("",))
    found = load(tmp_path / "a", columns=[], image="image")
    assert (len(found.train) + len(found.test), found.classes) == (8, ["cat", "dog"])


def test_a_class_that_is_called_like_a_split_loses_no_image(tmp_path):
    album(tmp_path / "a", classes=("test", "car"), splits=("",))
    with pytest.raises(UserError, match=r"4 of 8 images in .* are in no split \(first: car/car0\.png\)"):
        load(tmp_path / "a", columns=[], image="image", test_share=0.5)


def test_a_table_of_metadata_says_the_classes(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for i in range(4):
            Image.new("RGB", (9, 9)).save(tmp_path / split / f"{i}.png")
        rows = "".join(f"{i}.png,{'cat' if i % 2 else 'dog'}\n" for i in range(4))
        (tmp_path / split / "metadata.csv").write_text("file_name,label\n" + rows)
    found = load(tmp_path, columns=[], image="image", test_split="test")
    assert found.classes == ["cat", "dog"]
    assert found.labels.tolist() == [1, 0, 1, 0]


def test_a_replaced_image_is_checked_again(tmp_path):
    import os

    root = album(tmp_path / "a")
    first = images(root)
    one = root / "train" / "cat" / "cat1.png"
    state = one.stat()
    one.write_bytes(b"no image")
    os.utime(one, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(UserError, match=r"1 of 8 train images do not decode: cat1\.png"):
        images(root)
    one.write_bytes((root / "train" / "cat" / "cat2.png").read_bytes())
    assert images(root).content == first.content
