"""What a node has and will take: what it says of it, and how it fails where that is too little."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from client_app.memory import available_memory
from fedpft_core.adapter.layers import readable
from fedpft_core.config import Config
from fedpft_core.config.widths import NOBODY, simulated_width
from fedpft_core.disk import whole
from fedpft_core.errors import ReplyError, UserError
from fedpft_core.proxy.int8 import BASES

KEYS: dict[str, tuple[type, Any]] = {
    "memory-mb": (int, 0),
    "max-package-mb": (float, 0.0),
    "width": (str, ""),
    "train-blocks": (str, ""),
    "base": (str, "float"),
}
"""Keys of a node config: type and default. Nothing set is no limit."""

_MEASURED = "means.json"
_MB = 10**6


def check(node: Mapping[str, Any]) -> None:
    """Refuse means that a node cannot have.

    Args:
        node: a node config with all keys.

    Raises:
        UserError: naming the key.
    """
    for key in ("memory-mb", "max-package-mb"):
        if node[key] < 0 and not (key == "memory-mb" and node[key] == -1):
            raise UserError(f"node config: {key} = {node[key]:g} is below 0, which is no limit.")
    if not readable(node["train-blocks"]):
        raise UserError(
            f"node config: train-blocks = {node['train-blocks']!r} is not first:n or last:n, with "
            "n blocks."
        )
    if node["base"] not in BASES:
        raise UserError(f"node config: base = {node['base']!r} is none of {', '.join(BASES)}.")
    if len(node["width"]) > 64:
        raise UserError("node config: width is no entry of a server's plan.widths.")


def of_node(node: Mapping[str, Any], root: Path) -> dict[str, int | str]:
    """What a node with rows of its own says to the server.

    Args:
        node: a checked node config.
        root: the folder that the node keeps everything in, with what `fedpft node check` measured.

    Returns:
        `HelloReply.means`: only what is limited.
    """
    memory = node["memory-mb"] * _MB
    if node["memory-mb"] == -1:
        memory = measured(root) or available_memory()
    found = {
        "memory": memory, "package": int(node["max-package-mb"] * _MB),
        "width": node["width"], "blocks": node["train-blocks"], "base": node["base"],
    }  # fmt: skip
    return {key: value for key, value in found.items() if value not in (0, "", "float")}


def of_simulated(node: Mapping[str, Any], config: Config, index: int) -> dict[str, int | str]:
    """What a simulated client says to the server.

    Args:
        node: a checked node config.
        config: the run's; federation.widths decides.
        index: the client's number, from 0.

    Returns:
        `HelloReply.means`. One that is to be left out has room for a package of one byte.
    """
    width = simulated_width(config, index)
    found = of_node(node, Path())
    if width == NOBODY:
        found["package"] = 1
    elif width:
        found["width"] = width
    return found


def check_blocks(means: Mapping[str, int | str], asked: str) -> None:
    """Refuse to train LoRA in other blocks than the node has said.

    Args:
        means: what the node has said.
        asked: what a request asks for; empty = all.

    Raises:
        ReplyError: they differ, or there are no such blocks.
    """
    own = str(means.get("blocks", ""))
    if own and asked != own:
        raise ReplyError(f"the request asks for LoRA in blocks {asked or 'all'}, not {own}")
    if not readable(asked):
        raise ReplyError("the request cannot be used (blocks)")


def check_rank(rank: int, adapter: Mapping[str, Tensor]) -> None:
    """Refuse an adapter of more components than the node has said that it trains.

    Args:
        rank: the node's `lora-rank`; 0 = any.
        adapter: as it came.

    Raises:
        UserError: it has more.
    """
    ranks = [t.shape[0] for k, t in adapter.items() if k.endswith("lora_A.weight")]
    if rank and max(ranks, default=0) > rank:
        text = f"this node's lora-rank = {rank}, and rank {max(ranks)} is asked for"
        raise UserError(text, public=text)


def base_of(means: Mapping[str, int | str]) -> str:
    """What the node holds a sub-FM's frozen linear layers in.

    Args:
        means: what it says to the server.

    Returns:
        One of `BASES`.
    """
    return str(means.get("base", BASES[0]))


def keep_measured(root: Path, memory: int) -> Path:
    """Keep what `fedpft node check` has found, for `memory-mb = -1`.

    Args:
        root: the folder that the node keeps everything in.
        memory: bytes that a process of this node can take.

    Returns:
        The file.

    Raises:
        OSError: it cannot be written.
    """
    root.mkdir(parents=True, exist_ok=True)
    whole.write(root / _MEASURED, json.dumps({"memory": memory}).encode())
    return root / _MEASURED


def measured(root: Path) -> int:
    """What `fedpft node check` has kept.

    Args:
        root: the folder that the node keeps everything in.

    Returns:
        Bytes of memory; 0 where nothing was kept, or it cannot be read.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        value = json.loads((root / _MEASURED).read_text(encoding="utf-8"))["memory"]
        return value if type(value) is int and value > 0 else 0
    return 0


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory.

    Args:
        error: what was raised.

    Returns:
        True for Python's own, and for what torch raises on CPU and accelerators.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "not enough memory" in text or "bad_alloc" in text
    )


__all__ = [
    "KEYS", "base_of", "check", "check_blocks", "check_rank", "keep_measured", "measured",
    "of_node", "of_simulated", "out_of_memory",
]  # fmt: skip
