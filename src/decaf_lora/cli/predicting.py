"""`decaf predict`: what a trained model says of new examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tyro.conf import Positional

from decaf_lora.cli.options import check_options, parsed


def predict_command(args: list[str]) -> int:
    """`decaf predict`."""

    def predict(
        model: Positional[Path],
        data: str,
        to: Path,
        agent: str | None = None,
        split: str | None = None,
        label_column: str | None = None,
        image_column: str | None = None,
        subset: str | None = None,
        delimiter: str | None = None,
        encoding: str | None = None,
        device: str = "auto",
        most_tokens: int = 64,
    ) -> tuple[Any, ...]:
        """Predicts new examples, prepared as in training. Writes predictions.csv and scores.json.

        Args:
            model: folder of a run, or of an adapter or model that `decaf export` or `decaf merge` has written.
            data: a file, folder or data set, as task.data. Labels are optional.
            to: folder to write, new or empty.
            agent: of a run: number or name of the agent. Unset: the averaged model.
            split: of a data set with several. Unset: `test`, or the only one.
            label_column: column of the true classes or answers; `none`: do not look. Unset: that of the task.
            image_column: column of the images in a table. Unset: that of the training data.
            subset: of the data set, or sheet of an Excel file.
            delimiter: separator of the columns of a CSV file, or `tab`. Unset: detected.
            encoding: of text files, such as cp1252. Unset: detected.
            device: to compute on: cpu, cuda, cuda:1, or auto.
            most_tokens: length of an answer that a language model writes, at most.
        """
        options = {"image_column": image_column, "subset": subset, "delimiter": delimiter, "encoding": encoding}
        rest = {"agent": agent, "split": split, "label_column": label_column, "device": device}
        return model, data, to, rest | {"most_tokens": most_tokens} | options

    own = ("data", "to", "agent", "split", "label_column", "image_column", "subset", "delimiter", "encoding", "device")
    check_options(args, [*own, "most_tokens", "help"])
    model, data, to, options = parsed(predict, "decaf predict", args)
    from decaf_lora.predict import predict as write_predictions

    found = write_predictions(model, data, to, **{k: v for k, v in options.items() if v is not None})
    said = f"{found['examples']} examples of {data} in {to / 'predictions.csv'}"
    if "score" in found:
        said += f"; {found['score_name']} {found['score']:.3f} of {found['labelled']} with a label"
        said += f" (always the most frequent: {found['majority']:.3f})"
    elif found.get("exact_match") is not None:
        said += f"; {found['exact_match']:.3f} of {found['labelled']} answers are exactly the label"
    print(f"{said}; {to / 'scores.json'}")
    return 0
