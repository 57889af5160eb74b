"""How are the rows of a data set preprocessed? In batches, in parallel, cached on disk by `datasets`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datasets import Dataset

from decaf_lora.config import TaskConfig
from decaf_lora.data.tables import writable_cache


def preprocess(
    rows: Dataset, function: Callable[..., Any], config: TaskConfig, title: str, **arguments: Any
) -> Dataset:
    """Maps the rows of a data set in batches; the result is cached on disk by the contents of all arguments.

    Args:
        rows: the data set.
        function: columns of a batch, and `arguments` -> the new columns, which replace all old ones.
        config: `num_workers` processes map.
        title: of the progress bar.
        arguments: further arguments of `function`.

    Raises:
        UserError: the cache cannot be written.
    """
    with writable_cache():
        return rows.map(
            function,
            batched=True,
            remove_columns=rows.column_names,
            fn_kwargs=arguments,
            num_proc=min(config.num_workers, len(rows)) or None,
            desc=title,
        )
