"""TensorBoard: an event file in the run folder, below `tensorboard/`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.summary.writer.event_file_writer import EventFileWriter


class _TensorBoard:
    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.writer = EventFileWriter(str(folder), flush_secs=5)
        # As TensorBoard's plugin for texts wants it: Markdown, in which an indented block is code.
        block = "".join(f"    {line}\n" for line in json.dumps(dict(config), indent=1).splitlines())
        text = TensorProto(
            dtype="DT_STRING", string_val=[block.encode()],
            tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
        )  # fmt: skip
        kind = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        value = Summary.Value(tag="configuration", metadata=kind, tensor=text)
        self.writer.add_event(Event(summary=Summary(value=[value])))

    def log(self, figures: Mapping[str, float], step: int, now: float) -> None:
        """Add one point to each curve."""
        values = [Summary.Value(tag=name, simple_value=v) for name, v in figures.items()]
        self.writer.add_event(Event(wall_time=now, step=step, summary=Summary(value=values)))

    def finish(self, state: str) -> None:
        """Write what is left."""
        self.writer.close()


def start(folder: Path, name: str, config: Mapping[str, Any]) -> _TensorBoard:
    """Write an event file; `tensorboard --logdir RUNS` shows all runs of a folder.

    Args:
        folder: the run folder.
        name: of the run; TensorBoard takes the folder's.
        config: every key with its value, shown as a text.

    Returns:
        The tracker.
    """
    return _TensorBoard(folder / "tensorboard", config)
