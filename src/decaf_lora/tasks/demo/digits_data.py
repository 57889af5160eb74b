"""Which digits does the demo's base model know, and which do the agents learn from?

scikit-learn's 1797 handwritten digits (8x8 pixels) are divided once and for all:

- `base`, 600: the embedded CLIP-shaped model (`MODEL_DIR`) was trained on these, upright, bright on dark;
- `train`, 800, and `test`, 397: the agents' data, never seen by the base model.

The agents' task is a shift that the base has not met: every digit turned by 90 degrees and inverted.
The split is over images, not writers (the source does not name them): one hand may be on both sides of it.
"""

import functools
import hashlib
import importlib.util
from pathlib import Path
from typing import Final, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from decaf_lora import errors, extras, randomness

Split = Literal["base", "train", "test"]

MODEL_DIR: Final = Path(__file__).parent / "digits_clip"
CLASS_NAMES: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATE: Final = "a photo of the digit {}"
SPLIT_SIZES: Final[dict[Split, int]] = {"base": 600, "train": 800, "test": 397}
SPLIT_SHA256: Final = "fbb7cbc5f6a30a665d2c3a4374b13f7bdd063af38e0ee810cb41094b6928bb48"

_SEED: Final = 0


class LabelledImages(NamedTuple):
    """Labelled images of one split."""

    images: npt.NDArray[np.float32]
    """(k, 1, 8, 8), in [-1, 1]; upright digits are bright (up to 1) on a dark ground (-1)."""
    labels: npt.NDArray[np.int64]
    """(k,), the digit, an index into `CLASS_NAMES`."""


def load(split: Split, *, shift: bool = False) -> LabelledImages:
    """The digits of `split`, as they were written or, with `shift`, turned and inverted as the agents see them."""
    if split not in SPLIT_SIZES:
        raise errors.unknown("split", split, get_args(Split))
    pixels, labels = _source()
    chosen = split_indices()[split]
    images = (pixels[chosen, None] / 8 - 1).astype(np.float32)
    return LabelledImages(shifted(images) if shift else images, labels[chosen])


def shifted(images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The agents' shift of `images` (..., 8, 8): a quarter turn counter-clockwise, then inverted."""
    return np.ascontiguousarray(-np.rot90(images, axes=(-2, -1)))


@functools.cache
def split_indices() -> dict[Split, npt.NDArray[np.int64]]:
    """Rows of `sklearn.datasets.load_digits` in each split: disjoint, together all, of the same class mix.

    Raises `RuntimeError` if the split is not the one that the base model was trained with, since base images
    could then be among the agents'.
    """
    pixels, labels = _source()
    order = _stratified_order(labels)
    digest = hashlib.sha256()
    for array in (order, pixels[order], labels[order]):
        digest.update(array.astype("<i8").tobytes())
    if digest.hexdigest() != SPLIT_SHA256:
        raise RuntimeError(
            f"digits: the data or its order has SHA-256 {digest.hexdigest()}, expected {SPLIT_SHA256}; this "
            "scikit-learn or NumPy gives other digits than those the embedded base model was trained with."
        )
    order.setflags(write=False)  # the answer is cached
    base, train, test = np.split(order, np.cumsum(list(SPLIT_SIZES.values()))[:-1])
    return {"base": base, "train": train, "test": test}


def _stratified_order(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """A fixed random order of the rows of `labels` (k,); every stretch of it has nearly the same class mix.

    The j-th of a class's m shuffled members is placed at the fraction (j + 1/2) / m of the order.
    """
    order = randomness.numpy_generator(_SEED, "digits", "split").permutation(len(labels))
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels[order] == label)
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return order[np.argsort(place, kind="stable")]


@functools.cache
def _source() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Pixels (1797, 8, 8), whole numbers from 0 (ground) to 16 (ink), and labels (1797,)."""
    # scikit-learn takes longer to import than the whole model of the demo; its reader only reads this file.
    package = importlib.util.find_spec("sklearn")
    root = Path(package.origin).parent if package and package.origin else Path()
    file = root / "datasets" / "data" / "digits.csv.gz"
    if not file.is_file():  # another release may keep its digits elsewhere
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise extras.missing(error) or error from error
        digits = load_digits()
        return digits.images, digits.target.astype(np.int64)
    table = np.loadtxt(file, delimiter=",")
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)
