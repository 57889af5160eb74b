"""What do the folders of an image data set mean? The class of an image is the folder that it lies in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from datasets.data_files import SPLIT_KEYWORDS
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from decaf_lora.errors import UserError

IMAGES = frozenset(ImageFolder.EXTENSIONS)
METADATA = frozenset(ImageFolder.METADATA_FILENAMES)
"""Names of files beside images that list the images and say what they are."""

_SPLITS = {word for words in SPLIT_KEYWORDS.values() for word in words}


def check_image_folder(root: Path, images: Sequence[Path]) -> None:
    """Checks that every image below a folder has one split and one class.

    Where a metadata file says what the images are, their folders need not mean classes.

    Args:
        root: the folder.
        images: the images that belong to a split.

    Raises:
        UserError: an image is in no split, or it is not clear which folder is an image's class.
    """
    below = [file for file in sorted(root.rglob("*")) if _is_image(file, root)]
    here = {file.resolve() for file in images}
    lost = [file for file in below if file.resolve() not in here]
    if lost:
        raise UserError(
            f"task.data: {len(lost)} of {len(below)} images in {root} are in no split (first: "
            f"{lost[0].relative_to(root)}), since other names there say train, test or the like; put every image below "
            "a folder of its split, or rename what is no split."
        )
    if any(
        (folder / name).exists() for folder in {root, *(p for p in root.rglob("*") if p.is_dir())} for name in METADATA
    ):
        return
    places = [(file, _classes(file, root)) for file in below]
    depths = {len(parts) for _, parts in places}
    if depths == {1}:
        names = {parts[0] for _, parts in places}
        if len(names) == 1:
            raise UserError(
                f"task.data: all images in {root} lie in one folder, {names.pop()!r}; classes need one each."
            )
        return
    if depths == {0}:
        raise UserError(
            f"task.data: the images in {root} lie in no folder of a class; put those of each class into a folder of "
            "its name, or add a metadata.csv with the columns file_name and label."
        )
    deepest, parts = max(places, key=lambda place: len(place[1]))
    if len(depths) > 1:
        flat = next(file for file, p in places if len(p) == min(depths))
        raise UserError(
            f"task.data: images lie at different depths ({flat.relative_to(root)}, {deepest.relative_to(root)}); put "
            "all images of a class directly into its folder."
        )
    raise UserError(
        f"task.data: {deepest.relative_to(root)} lies in folders of folders: its class could be {parts[0]!r} or "
        f"{parts[-1]!r}; put all images of a class directly into its folder, or add a metadata.csv with the columns "
        "file_name and label."
    )


def _is_image(file: Path, root: Path) -> bool:
    parts = file.relative_to(root).parts
    return file.suffix.lower() in IMAGES and not any(part.startswith((".", "__")) for part in parts) and file.is_file()


def _classes(file: Path, root: Path) -> tuple[str, ...]:
    """The folders above an image, without that of its split."""
    parts = file.relative_to(root).parts[:-1]
    is_split = bool(parts) and not _SPLITS.isdisjoint(re.split(r"[-._ 0-9]+", parts[0]))
    return parts[1:] if is_split else parts
