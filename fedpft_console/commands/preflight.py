"""What is wrong with a run's data, found before Flower is started.

Only what can be seen without loading a model: files, columns, rows. The server looks again, at
this and at the rest.
"""

from __future__ import annotations

from fedpft_core.config import Config
from fedpft_core.data.public import load_public
from fedpft_core.data.rows import read_split
from fedpft_core.data.splits import check_settings, columns_of
from fedpft_core.errors import UserError


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
    for split, source in (
        ("train", data.train),
        ("validation", data.validation),
        ("test", data.test),
    ):
        if source and not source.startswith("builtin:"):
            table = read_split(source, split, columns, None)
            if split == "train" and len(table.cells) < config.federation.clients:
                raise UserError(
                    f"{table.where}: {len(table.cells)} rows are fewer than federation.clients = "
                    f"{config.federation.clients}, so some client would have none."
                )
    needs_public = config.plan.proxy != "full" or config.distill.method != "none"
    kind = "image" if columns.image else "text"
    if needs_public and (kind == "image" or not data.public.startswith("builtin:")):
        column = data.image_column or data.text_column
        load_public(data.public, column, kind, (), data.max_public_rows, 0)
