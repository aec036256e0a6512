"""Tiny rows of each task on disk: what a number, several labels or a label for each word say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tiny

TASKS = ("regress", "pair-regress", "multi-label", "tokens", "image-regress", "image-labels")
TAGS = {"animal": "B-beast", "place": "B-place"}
NAMES = {"multi-label": tiny.LABELS, "tokens": (*TAGS.values(), "O")}


def family_of(task: str) -> str:
    return "vit" if task.startswith("image") else "bert"


def rows(task: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Rows that the words, or the colours, decide."""
    rng = np.random.default_rng(seed)
    out: list[dict[str, Any]] = []
    for text, _ in tiny.sentences(count, seed):
        words = text.split()
        more = [str(w) for kind in tiny.LABELS for w in rng.choice(tiny.WORDS[kind], 1)
                if rng.random() < 0.5]  # fmt: skip
        words += more
        kinds = [k for k in tiny.LABELS if any(w in tiny.WORDS[k] for w in words)]
        if task == "regress":
            out.append({"text": " ".join(words), "label": 10.0 + 3 * len(kinds)})
        elif task == "pair-regress":
            alike = float(bool(set(kinds) & {"animal"}))
            out.append({"text": " ".join(words), "other": text, "label": alike + len(kinds)})
        elif task == "multi-label":
            out.append({"text": " ".join(words), "label": kinds})
        else:
            tags = [
                next((TAGS.get(k, "O") for k in tiny.LABELS if w in tiny.WORDS[k]), "O")
                for w in words
            ]
            out.append({"text": words, "label": tags})
    return out


def write(task: str, path: Path, count: int = 90) -> dict[str, Any]:
    """A model folder and data files below `path`, and a run's keys."""
    family = family_of(task)
    flat = tiny.write_task(family, path, count)
    flat["data.task"] = task.removeprefix("pair-").removeprefix("image-")
    if task.startswith("image"):
        _relabel_images(flat, path)
        flat["data.task"] = {"image-regress": "regress", "image-labels": "multi-label"}[task]
        if task == "image-regress":
            flat["data.label-column"] = "number"
        else:
            flat["data.labels"] = ",".join(tiny.LABELS)
        return flat
    for split, seed in (("train", 0), ("test", 1)):
        file = path / f"{split}.jsonl"
        made = rows(task, count, seed)
        file.write_text("".join(json.dumps(row) + "\n" for row in made))
        flat[f"data.{split}"] = str(file)
    if task.startswith("pair"):
        flat["data.text-pair-column"] = "other"
    if task in NAMES:
        flat["data.labels"] = ",".join(NAMES[task])
    return flat


def _relabel_images(flat: dict[str, Any], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for split in ("train", "test"):
        table = pq.read_table(flat[f"data.{split}"])
        labels = table.column("label").to_pylist()
        made = pa.table({
            "image": table.column("image"),
            "number": [2.5 * tiny.LABELS.index(y) for y in labels],
            "label": [[y] if y != "place" else ["animal", "number"] for y in labels],
        })  # fmt: skip
        pq.write_table(made, flat[f"data.{split}"])


def node_config(task: str, flat: dict[str, Any], folder: Path, **more: str) -> dict[str, Any]:
    """A node that has the training rows for its own."""
    keys = {
        "name": "a", "data-path": flat["data.train"], "cache-dir": str(folder / "cache"),
        "task": flat["data.task"],
    }  # fmt: skip
    for name in ("text-pair-column", "image-column", "label-column"):
        if flat.get(f"data.{name}"):
            keys[name] = flat[f"data.{name}"]
    return keys | more
