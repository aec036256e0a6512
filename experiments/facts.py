"""E2E NLG as a regression: the number of facts that a sentence states. See facts.yaml."""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def main(source: Path, target: Path) -> None:
    """Write train.parquet and test.parquet with the columns text and label.

    Args:
        source: the folder with E2E NLG's dev.parquet and test.parquet.
        target: the folder to write to, which is made.
    """
    target.mkdir(parents=True, exist_ok=True)
    for split, name in (("train", "dev"), ("test", "test")):
        table = pq.read_table(source / f"{name}.parquet")
        facts = [float(meaning.count("[")) for meaning in table["mr"].to_pylist()]
        pq.write_table(
            pa.table({"text": table["ref"], "label": facts}), target / f"{split}.parquet"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
