"""Make a small CLIP that knows CIFAR-10's classes, and images under a shift that it does not know.

    python scripts/make_small_clip.py DATA              # writes ~/.cache/decaf-lora/small_clip
    python scripts/make_small_clip.py DATA --out DIR

DATA is a folder with train.parquet and test.parquet: columns `image` (a JPEG or PNG of 32x32 pixels) and
`label_name`. The model, a `CLIPModel` with its `CLIPProcessor`, is trained from scratch on 40,000 of the training
images and captions of their classes. The other 10,000 are left to the agents: a part of them, and of the test images,
is turned and inverted and written to DIR/images, as the data of the task `image-text`. DIR/model is the model.

About a quarter of an hour on one core, seconds on a GPU. On one CPU thread the same versions on the same machine give
the same bytes.
"""

import argparse
import itertools
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from PIL import Image, ImageOps
from torch import Tensor, nn
from transformers import (
    AutoProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerBase,
)

from clip_training import Batch, draw_captions, sha256, text_config, train, word_tokenizer, zero_shot
from decaf_lora import data, randomness
from decaf_lora.config import TaskConfig

SEED = 0
SIZE = 32  # pixels
BASE = 40_000  # training images of the base model; the others are the agents'
AGENTS_TRAIN, AGENTS_TEST = 4_000, 2_000
EPOCHS = 8
BATCH = 128
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.05
MAX_SHIFT = 3  # pixels, in each direction
WIDTH, PATCH, VISION_LAYERS, TEXT_LAYERS = 128, 8, 4, 2

TEMPLATES = (
    "a photo of a {}.",
    "a picture of a {}.",
    "an image of a {}.",
    "a small photo of a {}.",
    "a blurry photo of the {}.",
    "this is a {}.",
    "the {}.",
    "{}",
)
CACHE = Path("~/.cache/decaf-lora/small_clip")


def main() -> None:
    """Train into a temporary folder beside the one asked for, then put it there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train.parquet and test.parquet")
    parser.add_argument("--out", type=Path, default=CACHE, help=f"where model/ and images/ go ({CACHE})")
    parser.add_argument("--steps", type=int, help="stop the training after so many steps, to check its bytes")
    arguments = parser.parse_args()
    out = arguments.out.expanduser()
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        make(arguments.data, Path(scratch) / "made", last_step=arguments.steps)
        shutil.rmtree(out, ignore_errors=True)
        (Path(scratch) / "made").rename(out)
    print((out / "README.md").read_text(), end="")


def make(source: Path, folder: Path, *, base: int = BASE, epochs: int = EPOCHS, last_step: int | None = None) -> None:
    """Train on `base` images of `source`, save, measure what was saved, and write the agents' images."""
    started = time.process_time()
    config = TaskConfig(name="image-text", data=str(source))
    examples = data.load(config, [], label="label_name", image="image")
    order = data.spread(examples.labels, SEED, "small_clip")
    known, left = np.sort(order[:base]), np.sort(order[base:][:AGENTS_TRAIN])
    tested = np.sort(data.spread(examples.test_labels, SEED, "small_clip test")[:AGENTS_TEST])

    tokenizer = word_tokenizer(TEMPLATES, examples.classes)
    processor = CLIPProcessor(image_processor(), tokenizer)
    model = build_model(tokenizer).to("cuda" if torch.cuda.is_available() else "cpu")
    pixels = data.Pixels(examples.train.select(known), "image", processor.image_processor)
    batch = min(BATCH, len(known))
    steps = epochs * (len(known) // batch)
    some = batches(pixels, examples.labels[known], examples.classes, batch, model.device)
    some = itertools.islice(some, steps if last_step is None else last_step)
    train(model, tokenizer, some, steps=steps, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    model.cpu().save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")

    model, processor = (
        CLIPModel.from_pretrained(folder / "model").eval(),
        AutoProcessor.from_pretrained(folder / "model"),
    )
    accuracy = {"upright": score(model, processor, examples.test, examples.test_labels, examples.classes)}
    for split, rows, labels, chosen in (
        ("train", examples.train, examples.labels, left),
        ("test", examples.test, examples.test_labels, tested),
    ):
        images = shifted_images(rows.select(chosen), labels[chosen], examples.classes)
        images.to_parquet(folder / "images" / f"{split}.parquet")
    rows = images.cast_column("image", datasets.Image(decode=False))
    accuracy["shifted"] = score(model, processor, rows, examples.test_labels[tested], examples.classes)
    seconds = time.process_time() - started
    (folder / "README.md").write_text(model_card(folder, model, accuracy, steps, seconds))


def image_processor() -> CLIPImageProcessor:
    """Images of SIZE pixels as they are, scaled to [-1, 1]."""
    size = {"height": SIZE, "width": SIZE}
    half = [0.5, 0.5, 0.5]
    return CLIPImageProcessor(do_resize=True, size=size, do_center_crop=False, image_mean=half, image_std=half)


def build_model(tokenizer: PreTrainedTokenizerBase) -> CLIPModel:
    """A CLIP with VISION_LAYERS layers over patches of PATCH x PATCH pixels, and TEXT_LAYERS layers of text."""
    shape = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_attention_heads": WIDTH // 32,
        "projection_dim": WIDTH,
        "hidden_act": "gelu",
    }
    config = CLIPConfig(
        vision_config={**shape, "num_hidden_layers": VISION_LAYERS, "image_size": SIZE, "patch_size": PATCH},
        text_config={**shape, "num_hidden_layers": TEXT_LAYERS, **text_config(tokenizer)},
        projection_dim=WIDTH,
    )
    torch.manual_seed(randomness.derive_seed(SEED, "small_clip", "init"))
    return CLIPModel(config)


def batches(
    pixels: data.Pixels, labels: np.ndarray, names: list[str], batch: int, device: torch.device
) -> Iterator[Batch]:
    """Batches without end, of `batch` images each, moved by up to MAX_SHIFT pixels and mirrored at random."""
    generator = randomness.torch_generator(SEED, "small_clip", "batches")
    moves = 2 * MAX_SHIFT + 1
    chosen = torch.empty(0, dtype=torch.long)
    while True:
        if len(chosen) < batch:
            chosen = torch.randperm(len(labels), generator=generator)
        rows, chosen = chosen[:batch].numpy(), chosen[batch:]
        padded = nn.functional.pad(pixels(rows), (MAX_SHIFT,) * 4, mode="reflect")
        windows = padded.unfold(2, SIZE, 1).unfold(3, SIZE, 1)  # (batch, 3, moves, moves, SIZE, SIZE)
        down, right = torch.randint(moves, (2, batch), generator=generator)
        images = windows[torch.arange(batch), :, down, right]
        mirrored = torch.rand(batch, 1, 1, 1, generator=generator) < 0.5
        images = torch.where(mirrored, images.flip(3), images)
        captions = draw_captions(TEMPLATES, names, generator)
        yield images.to(device), torch.from_numpy(labels[rows]).to(device), captions


def shifted_images(rows: datasets.Dataset, labels: np.ndarray, names: list[str]) -> datasets.Dataset:
    """The images of `rows`, each turned and inverted, with labels that know their names."""
    images = [shifted(data.decode_image(file)) for file in rows["image"]]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def shifted(image: Image.Image) -> Image.Image:
    """A quarter turn counter-clockwise, then inverted."""
    return ImageOps.invert(image.transpose(Image.Transpose.ROTATE_90))


def score(
    model: CLIPModel, processor: CLIPProcessor, rows: datasets.Dataset, labels: np.ndarray, names: list[str]
) -> float:
    """Zero-shot accuracy on `rows` with the first template."""
    images: Tensor = data.Pixels(rows, "image", processor.image_processor)(np.arange(len(rows)))
    captions = [TEMPLATES[0].format(name) for name in names]
    return zero_shot(model, processor.tokenizer, captions, images, torch.from_numpy(labels))


def model_card(folder: Path, model: CLIPModel, accuracy: dict[str, float], steps: int, seconds: float) -> str:
    """README.md of the folder: what it is, how good, and how to check it."""
    sums = "".join(f"    {sha256(path)}  {path.relative_to(folder)}\n" for path in sorted(folder.rglob("*.[ps]a*t*")))
    return f"""\
# small_clip

A CLIP of {model.num_parameters():,} parameters for images of {SIZE}x{SIZE} pixels, trained from scratch on a part of
CIFAR-10 (A. Krizhevsky, 2009) by scripts/make_small_clip.py of decaf-lora, and images for its agents.

| test images | zero-shot accuracy |
|---|---|
| upright, as in the training | {accuracy["upright"]:.3f} |
| turned by 90 degrees and inverted: the agents' task | {accuracy["shifted"]:.3f} |

{steps} steps of AdamW, batches of {BATCH}, {seconds:.0f} s of processor time in all; torch {torch.__version__},
transformers {transformers.__version__}, Python {platform.python_version()}, {platform.machine()}. SHA-256:

{sums}"""


if __name__ == "__main__":
    main()
