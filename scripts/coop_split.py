"""Turns a data set in the layout of CoOp (Zhou et al. 2022, arXiv 2109.01134) into a folder for `task.data`.

CoOp's copies of UCF101 (middle frames), Flowers 102 and Food-101 are folders of images with a file of splits,
`split_zhou_NAME.json`: {"train": [[path, class number, class name], ...], "val": ..., "test": ...}. Where to get
them stands in CoOp's DATASETS.md. This writes train.parquet, validation.parquet and test.parquet, the images in
them as they are:

    python scripts/coop_split.py UCF-101-midframes split_zhou_UCF101.json ucf101-middle-frames
"""

import argparse
import json
import sys
from pathlib import Path

import datasets
import pyarrow.parquet

SPLITS = {"train": "train", "val": "validation", "test": "test"}
BATCH = 200  # images in memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, help="folder that the paths of the split file count from")
    parser.add_argument("splits", type=Path, help="split_zhou_NAME.json")
    parser.add_argument("out", type=Path, help="folder to write, new or empty")
    args = parser.parse_args()
    if args.out.exists() and any(args.out.iterdir()):
        sys.exit(f"coop_split: {args.out} is not empty; choose another folder.")
    splits = json.loads(args.splits.read_text())
    rows = [row for name in SPLITS for row in splits[name]]
    if missing := [path for path, _, _ in rows if not (args.images / path).is_file()]:
        sys.exit(f"coop_split: {len(missing)} of {len(rows)} images are not in {args.images} (first: {missing[0]}).")
    named = {number: name for _, number, name in rows}
    classes = [named[number] for number in sorted(named)]
    if sorted(named) != list(range(len(named))) or len(set(classes)) != len(classes):
        sys.exit(f"coop_split: the classes of {args.splits} are not numbered from 0 with a name each.")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=classes))
    args.out.mkdir(parents=True, exist_ok=True)
    for name, written in SPLITS.items():
        path = args.out / f"{written}.parquet"
        with pyarrow.parquet.ParquetWriter(path, features.arrow_schema) as writer:
            for start in range(0, len(splits[name]), BATCH):
                some = splits[name][start : start + BATCH]
                image = [{"bytes": (args.images / file).read_bytes(), "path": Path(file).name} for file, _, _ in some]
                columns = {"image": image, "label": [number for _, number, _ in some]}
                writer.write_table(datasets.Dataset.from_dict(columns, features=features).data.table)
        print(f"{path}: {len(splits[name])} images of {len(classes)} classes")


if __name__ == "__main__":
    main()
