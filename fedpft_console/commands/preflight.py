"""What is wrong with a run's data, found before Flower is started.

Only what can be seen without loading a model: files, columns, rows. The server looks again, at
this and at the rest.
"""

from __future__ import annotations

from fedpft_core.config import Config
from fedpft_core.data.examples import Examples
from fedpft_core.data.public import load_public
from fedpft_core.data.splits import check_settings, columns_of, owned_split
from fedpft_core.errors import UserError
from fedpft_core.task import class_of, kind_of, make


def check(config: Config) -> None:
    """Read the data files that the configuration names. Built-in data is not looked at.

    Args:
        config: of a run whose files are on this machine.

    Raises:
        UserError: a setting, file, column or row cannot be used; or there are fewer training rows
            than clients.
    """
    data = config.data
    check_settings(data)
    columns = columns_of(data)
    kind = kind_of(columns)
    task = make(kind)
    if not owned_split(data)[0].startswith("builtin:"):
        found = class_of(kind)
        assert found is not None  # `make` has refused it
        task, read = found.open(kind, data, None)
    else:  # labels of built-in data are not looked up: each file is read by itself

        def read(source: str, split: str) -> Examples:
            return task.read(source, columns, f"data.{split}")

    for split, source in (
        ("train", data.train),
        ("validation", data.validation),
        ("test", data.test),
    ):
        if source and not source.startswith("builtin:"):
            rows = len(read(source, split))
            if split == "train" and rows < config.federation.clients:
                raise UserError(
                    f"data.train: {source}: {rows} rows are fewer than federation.clients = "
                    f"{config.federation.clients}, so some client would have none."
                )
    needs_public = config.plan.proxy != "full" or config.distill.method != "none"
    if needs_public and (task.reads == "image" or not data.public.startswith("builtin:")):
        column = data.public_column or data.image_column or data.text_column
        load_public(
            data.public, column, task.reads, (), data.max_public_rows, 0, max_bad=data.max_bad_rows
        )
