"""`decaf init`: a commented configuration for a person's own file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tyro.conf import Positional

from decaf_lora.cli.options import check_options, parsed


def init_command(args: list[str]) -> int:
    """`decaf init`."""

    def init(
        kind: Positional[str],
        data: Positional[str],
        out: Path | None = None,
        model: str | None = None,
        text_column: str | None = None,
        label_column: str | None = None,
        site_column: str | None = None,
        delimiter: str | None = None,
        encoding: str | None = None,
        subset: str | None = None,
    ) -> tuple[Any, ...]:
        """Looks at a file or folder and writes a commented configuration for `decaf run`. Asks nothing; says what it
        assumed; overwrites nothing.

        Args:
            kind: text (a table of texts and labels), images (a folder with a folder for each class, or a table of
                paths), or llm (prompts and answers, or texts).
            data: the file or folder.
            out: file to write. Unset: named after the data, here.
            model: the base model. Unset: a small one of the Hugging Face Hub.
            text_column: column of the text, or the prompt. Unset: detected.
            label_column: column of the label, or the answer. Unset: detected.
            site_column: column whose every value becomes an agent. Unset: detected, by its name.
            delimiter: separator of the columns of a CSV file, or `tab`. Unset: detected.
            encoding: of text files, such as cp1252. Unset: detected.
            subset: of a data set, or sheet of an Excel file.
        """
        given = {"text_column": text_column, "label_column": label_column, "site_column": site_column}
        given |= {"delimiter": delimiter, "encoding": encoding, "subset": subset}
        return kind, data, out, model, given

    own = ["out", "model", "text_column", "label_column", "site_column", "delimiter", "encoding", "subset", "help"]
    check_options(args, own)
    kind, data, out, model, given = parsed(init, "decaf init", args)
    from decaf_lora.init import named_after, write

    assumed = write(kind, data, out, model, **given)
    written = out or named_after(data)
    for line in assumed:
        print(f"- {line}")
    print(f"{written} is written. Next: decaf check {written}, then decaf run {written} --out runs/{written.stem}")
    return 0
