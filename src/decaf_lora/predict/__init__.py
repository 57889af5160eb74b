"""What does a trained model say of new examples? Predictions as a table, and scores where there are labels.

predict(Path("runs/visits"), "new.csv", Path("predictions"))        # the averaged model
predict(Path("runs/visits"), "new.csv", Path("predictions"), agent="mayo")
predict(Path("adapters/mayo"), "new.csv", Path("predictions"))      # what `decaf export` has written
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from decaf_lora.errors import UserError


def predict(
    source: Path,
    data: str,
    to: Path,
    *,
    agent: str | None = None,
    split: str | None = None,
    label_column: str | None = None,
    device: str = "auto",
    most_tokens: int = 64,
    **options: Any,
) -> dict[str, Any]:
    """Predicts the examples of a file or folder, prepared as they were in training.

    Writes predictions.csv (row from 1, text or path, predicted, probability, label) and scores.json to a new folder.

    Args:
        source: folder of a run, of an adapter that `decaf export` or `decaf merge` has written, or of a whole model.
        data: as `task.data`: a table, JSON lines, a folder of images, a data set of the Hub.
        to: folder to write, new or empty.
        agent: of a run: number or name; None: the averaged model.
        split: of a data set with several; None: `test`, or the only one.
        label_column: column of the true classes or answers; None: that of the task, if the data have it; "none": do
            not look.
        device: to compute on, as in a run's configuration.
        most_tokens: length of a written answer, at most.
        options: fields of `TaskConfig` that say how the data are read, such as `encoding` or `image_column`.

    Returns:
        The content of scores.json.

    Raises:
        UserError: something cannot be read, does not fit the model, or cannot be written; names the field.
    """
    from decaf_lora.adapters.portable import written_whole
    from decaf_lora.predict.described import described
    from decaf_lora.predict.model import ask
    from decaf_lora.predict.rows import read_rows
    from decaf_lora.predict.written import scores, write_predictions, write_scores
    from decaf_lora.tasks.scores import ClassScore

    if most_tokens < 1:
        raise UserError(f"most_tokens: must be at least 1, got {most_tokens}.")
    with described(source, agent) as found, written_whole(to) as aside:
        try:
            config = found.config(data, **options)
            rows = read_rows(found, config, split, label_column)
            said = ask(found, config, rows, device, most_tokens)
        except UserError as error:
            raise UserError(re.sub(r"^(task: )?task\.", "", str(error))) from error
        score = ClassScore(config.metric, config.classes, config.positive) if config.classes else None
        what = "path" if found.use == "image-text" else "text"
        write_predictions(aside / "predictions.csv", rows, said, config.classes, what)
        model = {"model": str(source), "of": found.made.get("model", "model"), "data": data}
        values = {**model, **scores(rows, said, config.classes, score)}
        write_scores(aside / "scores.json", values)
    return values


__all__ = ["predict"]
