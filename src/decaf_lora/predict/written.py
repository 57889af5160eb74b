"""What does a prediction leave? predictions.csv, a row an example, and scores.json."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from decaf_lora.predict.model import Said
from decaf_lora.predict.rows import ROW, UNKNOWN, Rows
from decaf_lora.tasks.scores import ClassScore

ENCODING = "utf-8-sig"
"""UTF-8 with a byte order mark, by which spreadsheets know it."""


def cell(text: str) -> str:
    """A text as a cell that no spreadsheet takes for a formula: an apostrophe goes before its first sign if need be."""
    if text[:1] not in ("=", "+", "-", "@", "\t", "\r"):
        return text
    try:
        float(text)
        return text
    except ValueError:
        return f"'{text}"


def write_predictions(path: Path, rows: Rows, said: Said, classes: Sequence[str], what: str) -> None:
    """Writes row (from 1), text or path, predicted, probability and label of each example.

    Args:
        path: the file.
        rows: the examples.
        said: what the model says of them.
        classes: names of the classes.
        what: "text" or "path".
    """
    numbers = rows.table[ROW][:]
    with path.open("w", encoding=ENCODING, newline="") as file:
        out = csv.writer(file)
        out.writerow(["row", what, "predicted", "probability", "label"])
        for i, number in enumerate(numbers):
            told = [rows.shown[i], said.predicted[i], _label(rows, classes, i)]
            text, predicted, label = map(cell, told)
            out.writerow([number + 1, text, predicted, f"{said.probabilities[i]:.6f}", label])


def _label(rows: Rows, classes: Sequence[str], i: int) -> str:
    if rows.answers is not None:
        return rows.answers[i]
    return "" if rows.labels is None or rows.labels[i] == UNKNOWN else classes[int(rows.labels[i])]


def scores(rows: Rows, said: Said, classes: Sequence[str], score: ClassScore | None) -> dict[str, Any]:
    """The numbers of scores.json, in JSON's types.

    For classes: how often each is predicted and, over the examples with a label, the task's own score, precision,
    recall and F1 of each class, and the confusion matrix (a row for each true class, a column for each predicted one).
    For written answers: the share that is equal to the label, and the log-likelihood per token of the labels.
    """
    found: dict[str, Any] = {"examples": len(rows.table), "left_out": rows.skipped}
    if said.logits is None:
        if rows.answers is None:
            return {**found, "labelled": 0}
        pairs = [(p, a.strip()) for p, a in zip(said.predicted, rows.answers, strict=True) if a.strip()]
        same = sum(predicted == answer for predicted, answer in pairs)
        exact = same / len(pairs) if pairs else None
        return {**found, "labelled": len(pairs), "exact_match": exact, "log-likelihood per token": said.likelihood}
    predicted = said.logits.argmax(-1).numpy()
    counts = np.bincount(predicted, minlength=len(classes))
    found["predicted"] = {name: int(count) for name, count in zip(classes, counts, strict=True)}
    known = np.zeros(len(predicted), bool) if rows.labels is None else rows.labels != UNKNOWN
    found["labelled"] = int(known.sum())
    if rows.labels is None or not known.any() or score is None:
        return found
    true, told = rows.labels[known], predicted[known]
    sums = score.statistics(said.logits[torch.from_numpy(known)], torch.from_numpy(true), 1)
    matrix = confusion(true, told, len(classes))
    return {
        **found,
        "score_name": score.name,
        "score": float(score.score(sums)[0]),
        "accuracy": float((true == told).mean()),
        "majority": float(np.bincount(true).max() / len(true)),
        "classes": per_class(matrix, classes),
        "confusion": {"labels": list(classes), "true_by_predicted": matrix.tolist()},
    }


def confusion(true: NDArray[np.int64], predicted: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """(count, count) number of examples of each true class (row) for which each class (column) was predicted."""
    return np.bincount(true * count + predicted, minlength=count * count).reshape(count, count)


def per_class(matrix: NDArray[np.int64], classes: Sequence[str]) -> dict[str, dict[str, float | int | None]]:
    """Class -> precision, recall, F1 and support; None where one is 0 divided by 0."""
    found: dict[str, dict[str, float | int | None]] = {}
    for i, name in enumerate(classes):
        right, told, support = (int(n) for n in (matrix[i, i], matrix[:, i].sum(), matrix[i].sum()))
        found[name] = {
            "precision": right / told if told else None,
            "recall": right / support if support else None,
            "f1": 2 * right / (told + support) if told + support else None,
            "support": support,
        }
    return found


def write_scores(path: Path, values: dict[str, Any]) -> None:
    """Writes scores.json."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
