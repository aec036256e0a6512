"""Who a node is: its stable name, its rows and its store, from node config and run config."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from client_app import means, policy, private
from client_app.client import Client
from client_app.rowcache import RowCache, content_of_file, key_of
from client_app.rows import split_sizes
from client_app.simulated import simulated_client
from client_app.store import Store
from client_app.warm.ask import IDLE_SECONDS, MEMORY_MB
from fedpft_core import config as configs
from fedpft_core.data.examples import Examples
from fedpft_core.data.faults import check_limit
from fedpft_core.data.folders import images, is_folder
from fedpft_core.data.rows import Columns
from fedpft_core.errors import UserError
from fedpft_core.model.device import pick_device
from fedpft_core.task import Task, kind_of, make

_MOST_HELD_OUT = 0.9

# key: (type, default); types are those of Flower's node config.
NODE_KEYS: dict[str, tuple[type, Any]] = {
    "partition-id": (int, -1),
    "num-partitions": (int, 0),
    "name": (str, ""),
    "data-path": (str, ""),
    "text-column": (str, "text"),
    "text-pair-column": (str, ""),
    "image-column": (str, ""),
    "label-column": (str, "label"),
    "label-separator": (str, ","),
    "response-column": (str, ""),
    "messages-column": (str, ""),
    "task": (str, ""),
    "cache-dir": (str, ""),
    "validation-share": (float, 0.0),
    "max-bad-rows": (float, 0.01),
    "device": (str, "cpu"),
    "max-threads": (int, 0),
    "lora-rank": (int, 0),
    "dp-noise": (float, 0.0),
    "dp-clip": (float, 1.0),
    "dp-epsilon": (float, 0.0),
    "dp-delta": (float, 1e-5),
    "keep-rows": (int, 0),
    "worker-idle": (int, IDLE_SECONDS),
    "worker-memory": (int, MEMORY_MB),
    **means.KEYS,
    **{key: (kind, default) for key, (kind, default, _) in policy.KEYS.items()},
}


def client_for(node_config: Mapping[str, Any], run_config: Mapping[str, Any]) -> Client:
    """The client a node is.

    Args:
        node_config: as Flower has it; with data-path the node has its own rows, otherwise it is
            a partition of the run's training rows.
        run_config: the run's configuration, flat.

    Returns:
        The client; its rows are not read yet.

    Raises:
        UserError: naming the node config key that is wrong.
    """
    node = checked(node_config)
    config = configs.from_flat(run_config)
    if node["data-path"]:
        if config.simulate.attack != "none":
            text = "simulate.attack is for simulations; this node has rows of its own"
            raise UserError(f"{text}.", public=text)
        return _edge_client(node)
    if node["partition-id"] < 0 or node["num-partitions"] < 1:
        raise UserError(
            "this node has no data: its node config must set name and data-path "
            "(or partition-id and num-partitions)."
        )
    return simulated_client(node, config)


def checked(node_config: Mapping[str, Any]) -> dict[str, Any]:
    """Check a node config, and fill in what it leaves out.

    Args:
        node_config: some of the keys of `NODE_KEYS`.

    Returns:
        All keys with their values.

    Raises:
        UserError: naming the wrong key.
    """
    node = {k: default for k, (_, default) in NODE_KEYS.items()}
    for key, value in node_config.items():
        if key not in NODE_KEYS:
            raise UserError(f"node config: no such key {key!r} (known: {', '.join(NODE_KEYS)}).")
        want = NODE_KEYS[key][0]
        if want is float and type(value) is int and abs(value) < 2**53:
            value = float(value)
        if not isinstance(value, want) or isinstance(value, bool):
            raise UserError(f"node config: {key} expects {want.__name__}, got {value!r}.")
        node[key] = value
    if not 0 <= node["validation-share"] <= _MOST_HELD_OUT:
        raise UserError(
            f"node config: validation-share = {node['validation-share']:g} is not between 0 and "
            f"{_MOST_HELD_OUT:g}."
        )
    check_limit(node["max-bad-rows"], "node config: max-bad-rows")
    if node["max-threads"] < 0:
        raise UserError(
            f"node config: max-threads = {node['max-threads']} is below 0, which is no limit."
        )
    if node["lora-rank"] < 0:
        raise UserError(
            f"node config: lora-rank = {node['lora-rank']} is below 0, which is the run's own."
        )
    if node["worker-idle"] < 0:
        raise UserError(
            f"node config: worker-idle = {node['worker-idle']} is below 0, which is no worker."
        )
    if node["worker-memory"] < 1:
        raise UserError(f"node config: worker-memory = {node['worker-memory']} is below 1 MB.")
    for key in ("name", "data-path", "cache-dir"):
        try:
            possible = b"\0" not in os.fsencode(node[key])
        except UnicodeEncodeError:
            possible = False
        if not possible:
            raise UserError(f"node config: {key} = {node[key]!r} is a name that no file can have.")
    if node["task"] not in ("", *configs.TASKS):
        raise UserError(
            f"node config: task = {node['task']!r} is none of {', '.join(configs.TASKS)} "
            "(data.task)."
        )
    if not node["label-separator"]:
        raise UserError("node config: label-separator is empty.")
    means.check(node)
    policy.Policy.of(node)
    wrong = private.check(*(node[f"dp-{key}"] for key in ("noise", "clip", "epsilon", "delta")))
    if wrong:
        raise UserError(f"node config: {wrong}.")
    if node["dp-noise"] and node["validation-share"]:
        raise UserError(
            "node config: validation-share must be 0 with dp-noise: figures of the rows kept from "
            "training have no noise."
        )
    cache_root(node)
    pick_device(node["device"], "node config: device")
    return node


def columns_of(node: Mapping[str, Any]) -> Columns:
    """Which columns a node's own data file has.

    Args:
        node: a checked node config.

    Returns:
        The names of the columns; empty for those that rows of its kind do not have.
    """
    # A folder has no columns: that it is one says that it has images.
    of_folder = "image" if is_folder(node["data-path"]) else ""
    return Columns(
        node["text-column"], node["text-pair-column"], node["image-column"] or of_folder,
        node["label-column"], task=node["task"], separator=node["label-separator"],
        response=node["response-column"], messages=node["messages-column"],
        max_bad=node["max-bad-rows"],
    )  # fmt: skip


def own_task(node: Mapping[str, Any]) -> Task:
    """The kind of task a node's rows are for, as its task and columns tell.

    Args:
        node: a checked node config.

    Returns:
        A task without labels, which are not known yet.

    Raises:
        UserError: the columns and the task do not go together.
    """
    if node["task"] == "tokens" and (node["image-column"] or node["text-pair-column"]):
        raise UserError(
            "node config: task = tokens has lists of words; image-column and text-pair-column "
            "must be empty."
        )
    return make(kind_of(columns_of(node)))


def own_rows(node: Mapping[str, Any], task: Task) -> Examples:
    """Read the rows of a node's own data file.

    Args:
        node: a checked node config.
        task: says what a row and its label are.

    Returns:
        All rows, in file order.

    Raises:
        UserError: anything wrong in the file, naming it.
    """
    return task.read(Path(node["data-path"]), columns_of(node))


def rows_tell(node_config: Mapping[str, Any]) -> bool:
    """Whether the data file tells that its rows have changed.

    Args:
        node_config: as Flower has it.

    Returns:
        False for a file with a column of images: a cell may name an image file, whose content may
        change while the data file stays as it is.
    """
    return not node_config.get("image-column") or is_folder(str(node_config["data-path"]))


def cache_root(node: Mapping[str, Any]) -> Path:
    """The folder a node keeps everything in.

    Args:
        node: a node config with all keys.

    Returns:
        cache-dir; where that is empty, a folder of the node's name below $FEDPFT_HOME.

    Raises:
        UserError: cache-dir begins with ~NAME, and there is no such user.
    """
    given = node["cache-dir"]
    try:
        return Path(given).expanduser() if given else configs.home() / node["name"]
    except RuntimeError as error:
        raise UserError(f"node config: cache-dir = {given!r}: {error}") from error


def _edge_client(node: Mapping[str, Any]) -> Client:
    if not node["name"]:
        raise UserError("node config: a node with data-path needs a stable name.")
    path = Path(node["data-path"])
    share = node["validation-share"]

    def load_rows(task: Task) -> Examples:
        own = own_task(node).name
        if own != task.name:
            text = (
                f"this node's rows are for {own}, but the server's task is {task.name}: its node "
                "config (task, image-column, text-pair-column, response-column, messages-column) "
                "has to say so."
            )
            raise UserError(text, public=text)
        return own_rows(node, task)

    def count_rows() -> tuple[int, int]:
        return split_sizes(own_rows(node, own_task(node)), share)

    def rows_digest() -> str:
        if columns_of(node).image:
            return ""  # a cell may name an image file, whose content the data file does not tell
        named = (
            "text-column", "text-pair-column", "label-column", "label-separator", "task",
            "response-column", "messages-column", "max-bad-rows",
        )  # fmt: skip
        columns = [node[key] for key in named]
        try:
            return key_of(content_of_file(path), path.suffix.lower(), columns)
        except OSError:
            return ""  # reading the rows will say why

    root = cache_root(node)
    if not node["keep-rows"]:
        # Encoded rows are readable text to whoever has the tokenizer, which lies beside them.
        shutil.rmtree(root / "rows", ignore_errors=True)
    return Client(
        name=node["name"],
        count_rows=count_rows,
        load_rows=load_rows,
        store=Store(root / "store"),
        device=node["device"],
        max_threads=node["max-threads"],
        rows_id=_file_id(path),
        validation_share=share,
        max_bad_rows=node["max-bad-rows"],
        kept_rows=RowCache(root / "rows") if node["keep-rows"] else None,
        audit=root / "audit.jsonl",
        rows_digest=rows_digest,
        policy=policy.Policy.of(node),
        private=_private(node, root / "privacy.json"),
        means=means.of_node(node, root),
        rank=node["lora-rank"],
    )


def _private(node: Mapping[str, Any], ledger: Path) -> private.ExamplePrivacy | None:
    if not node["dp-noise"]:
        return None
    return private.ExamplePrivacy(
        node["dp-noise"], node["dp-clip"], node["dp-epsilon"], node["dp-delta"], ledger
    )


def _file_id(path: Path) -> tuple[object, ...]:
    """Differs when the file changes; a missing file is reported when its rows are read."""
    if is_folder(path):
        inside = [(str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in images(path)]
        return (str(path), *inside)
    try:
        stat = path.stat()
    except OSError:
        return (str(path),)
    # The time of the last change is nobody's to set back, unlike that of the last writing.
    return (str(path), stat.st_mtime_ns, stat.st_size, stat.st_ctime_ns, stat.st_ino)
