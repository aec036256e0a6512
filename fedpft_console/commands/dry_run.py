"""`fedpft run --dry-run`: a run's configuration with everything in it made small.

The model is a random one of the same family, rows are fabricated with the columns that the
configuration names, and there are two rounds. So a configuration can be tried where its model and
its data are not, and in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fedpft_core import config as configs
from fedpft_core.config import Config, Scalar
from fedpft_core.data import fabricated
from fedpft_core.data.splits import check_settings, columns_of
from fedpft_core.errors import UserError
from fedpft_core.model import shrunken
from fedpft_core.model.families import family_of_config
from fedpft_core.model.load import read_config
from fedpft_core.task import KINDS, kind_of, make
from fedpft_core.task.labels import label_names

_ROWS = {"train": 48, "test": 12}
_PUBLIC = 24
_LENGTH = 32  # tokens of a row at most

# What costs time, and the most that a dry run does of it.
_MOST: dict[str, int] = {
    "data.max-length": _LENGTH, "plan.saliency-batches": 1, "distill.steps": 2,
    "distill.batch-size": 2, "distill.length": _LENGTH, "distill.fit-batches": 2,
    "align.interval": 1, "align.selection-batches": 1, "align.steps": 1, "lora.rank": 8,
    "train.batch-size": 4, "train.local-steps": 1, "train.local-epochs": 1,
    "federation.clients": 3, "federation.clients-per-round": 2, "federation.min-clients": 2,
    "federation.enough": 2, "federation.enough-replies": 2, "federation.rounds": 2,
    "federation.score-every": 1, "federation.merge-every": 1, "federation.buffer": 2,
    "plug.distil-steps": 2, "plug.distil-batch-size": 4, "plug.rows": 16, "run.samples": 2,
    "run.sample-tokens": 4, "run.gradient-rows": 4, "run.eval-batch-size": 8,
    "run.evaluate-every": 2, "plan.qk-rank": 4, "plan.drop-to": 2, "head.max-features": 64,
}  # fmt: skip


def shrink(resolved: Config, folder: Path) -> dict[str, Scalar]:
    """Write a small model and fabricated rows, and make a run's configuration name them.

    Args:
        resolved: the configuration as it is meant.
        folder: where model and rows go; it is made.

    Returns:
        All keys, with small numbers; how the run is done (methods, formats, rules) stays as it is.

    Raises:
        UserError: the settings of the rows go together with no task, or nothing says which family
            of models it is.
    """
    check_settings(resolved.data)
    columns = columns_of(resolved.data)
    kind = kind_of(columns)
    task = KINDS[kind]
    named = task.named and resolved.data.labels
    labels = tuple(label_names(resolved.data.labels)) if named else ()
    flat = dict(configs.to_flat(resolved))
    for key, most in _MOST.items():
        value = flat[key]
        assert isinstance(value, int)
        flat[key] = min(value, most)
    if flat["plan.keep-neurons"]:
        # The FM's width is not known here; a quarter is what keeping 768 of 3072 neurons is.
        flat |= {"plan.keep-neurons": 0, "plan.keep-share": 0.25}
    if flat["federation.schedule"] == "one-shot":
        flat["federation.clients-per-round"] = flat["federation.clients"]  # it asks every client
    flat["plan.retained-layers"] = _retained(str(flat["plan.retained-layers"]))
    if flat["distill.budget"] == "thorough":
        flat["distill.budget"] = "quick"
    made = make(kind, (labels or ("a", "b")) if task.named else ())
    words = (*fabricated.WORDS, *labels)
    shrunken.write(folder / "model", _family(resolved), made.model(), words, 2 * _LENGTH, 0)
    files = fabricated.write(folder, kind, columns, labels, _ROWS)
    public_image = resolved.data.public_column or columns.image if columns.image else ""
    public_text = resolved.data.public_column or columns.text
    public = fabricated.write_public(folder, public_image, public_text, _PUBLIC)
    return flat | {
        "model.name": str(folder / "model"),
        "model.revision": "",
        "data.train": str(files["train"]) if resolved.data.train else "",
        "data.test": str(files["test"]),
        "data.validation": str(files["test"]) if resolved.data.validation else "",
        "data.public": str(public),
        "data.image-column": columns.image,
        "run.threads": 1,
        "run.device": "cpu",
        "run.proxy-cache": "",
    }


def _family(resolved: Config) -> str:
    """The family that the configuration names, or else that of its model."""
    if resolved.model.family:
        return resolved.model.family
    try:
        return family_of_config(read_config(resolved.model)).name
    except UserError as error:
        raise UserError(
            f"{str(error).rstrip('.')}; for a dry run without the model set model.family."
        ) from error


def _retained(given: str) -> str:
    """Blocks kept whole, in a model of few blocks: numbers beyond them fall away."""
    parts = [part.strip() for part in given.split(",") if part.strip()]
    kept = [p for p in parts if not p.isdigit() or int(p) < shrunken.BLOCKS - 1]
    return ",".join(kept)


def said(flat: Mapping[str, Scalar]) -> str:
    """What a dry run has shown.

    Args:
        flat: the small configuration.

    Returns:
        One sentence.
    """
    return (
        f"dry run: {flat['federation.rounds']} rounds on a random {flat['model.family'] or 'model'}"
        " and fabricated rows ended well; the scores mean nothing."
    )
