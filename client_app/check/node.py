"""`fedpft node check`: everything a node needs, looked at before it joins a federation."""

from __future__ import annotations

import re
import resource
import sys
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client_app import means
from client_app import node as nodes
from client_app.audit import verify
from client_app.check import connection, room, step
from client_app.check.extent import refuse_giants
from client_app.check.findings import FAIL, PASS, SKIPPED, Finding, fault, guarded
from client_app.policy import Policy
from client_app.rows import split_sizes
from client_app.startup import collector_paused
from client_app.store import Store
from fedpft_core.data.examples import Examples
from fedpft_core.disk import plain
from fedpft_core.errors import UserError
from fedpft_core.model.families import Shape
from fedpft_core.model.processor import from_files
from fedpft_core.proxy import size as plansize
from fedpft_core.proxy.package import ClientModel, rebuild
from fedpft_core.proxy.size import PlanSize
from fedpft_core.task import Headless, make
from fedpft_core.wire.meta import PackageMeta

# Flower's own pattern: what it does not match, Flower leaves out without a word.
_PAIR = re.compile(r"(\S+?)=(\'[^\']*\'|\"[^\"]*\"|\S+)")
_BATCH = 16  # where no plan says how large a batch is
_SHOWN = 12  # labels in the table
_ADAPTER = 10**9  # bytes beside the weights of a package: no adapter is larger


@dataclass(frozen=True)
class Options:
    """What `fedpft node check` was asked to look at; empty or None is not looked at."""

    node_config: str
    superlink: str = ""
    insecure: bool = False
    root_certificates: Path | None = None
    key: Path | None = None
    plan: Path | None = None
    sub_fm_mb: float = 0.0
    labels: str = ""
    timeout: float = 10.0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            UserError: the size is negative or too large, or the timeout is not above 0 or too long.
        """
        if not 0.0 <= self.sub_fm_mb < 1e12:
            raise UserError(f"--sub-fm-mb {self.sub_fm_mb:g}: expected a number of megabytes.")
        if not 0.0 < self.timeout < 1e6:
            raise UserError(f"--timeout {self.timeout:g}: expected a number of seconds above 0.")


def check(options: Options) -> list[Finding]:
    """Look at everything a node needs.

    Args:
        options: what to look at.

    Returns:
        All findings, in reading order; what is not looked at is among them as skipped.

    Raises:
        UserError: within a single check alone, where it becomes a finding.
    """
    out: list[Finding] = []
    node: dict[str, Any] | None = None
    plan: PlanSize | None = None

    def parsed() -> str:
        nonlocal node
        node = nodes.checked(parse(options.node_config))
        if not node["name"] or not node["data-path"]:
            node = None
            raise UserError("node config: name and data-path are needed.")
        return f"{node['name']}: {node['data-path']}."

    out.append(guarded("node config", parsed))
    if options.plan:

        def read_plan() -> str:
            nonlocal plan
            plan = plansize.read(options.plan or Path())
            return f"{plan.model}: a sub-FM of {plan.sub_fm_bytes / 1e6:.0f} MB."

        out.append(guarded("plan", read_plan))
    held = _Held(node, plan) if node else None
    record = nodes.cache_root(node) / "audit.jsonl" if node else None
    if record and record.exists():
        at = record
        out.append(guarded("audit log", lambda: "{} entries, the last is {}.".format(*verify(at))))
    if node and plan:
        given, asked = node, plan
        out.append(guarded("policy", lambda: _allowed(given, asked)))
    if node and held:
        out += _data(node, options, plan, held)
        out += _room(node, options, plan, held, out)
    else:
        out += [
            Finding(name, SKIPPED, "the node config has to be right first.")
            for name in ("data", "labels", "cache-dir", "memory", "training step")
        ]
    return out + _network(options)


def parse(text: str) -> dict[str, Any]:
    """Read a node config as Flower reads it.

    Args:
        text: KEY=VALUE pairs, or the path of a file that ends in .toml.

    Returns:
        Values by key, of the types that TOML gives them.

    Raises:
        UserError: Flower would drop or refuse some of it, or the file cannot be read.
    """
    try:
        if text.endswith(".toml"):
            return dict(tomllib.loads(plain.read(Path(text).expanduser()).decode("utf-8")))
        left = _PAIR.sub("", text).split()
        if left:
            raise UserError(
                f"node config: {left[0]!r} is no KEY=VALUE, and Flower would leave it out."
            )
        return dict(tomllib.loads("\n".join(f"{k} = {v}" for k, v in _PAIR.findall(text))))
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(
            f"node config: {why}; texts are quoted, as in 'name=\"a\" max-threads=2'."
        ) from None
    except OSError as error:
        raise UserError(f"node config {text}: cannot be read ({error.strerror}).") from None
    except RuntimeError as error:  # ~nobody
        raise UserError(f"node config {text}: {error}") from None


def _allowed(node: dict[str, Any], plan: PlanSize) -> str:
    """Whether the node's policy lets a server train the plan's sub-FM."""
    policy = Policy.of(node)
    policy.check_package(plan.meta)
    if plan.batch_size < policy.min_step_rows:
        raise UserError(
            f"policy-min-step-rows = {policy.min_step_rows}, and the plan's steps are of "
            f"{plan.batch_size} rows."
        )
    return "the plan asks for nothing that the node's policy refuses."


class _Held:
    """The newest sub-FM in a node's store, when no plan is given; read once."""

    def __init__(self, node: dict[str, Any], plan: PlanSize | None) -> None:
        self.model: ClientModel | None = None
        self.files: dict[str, bytes] = {}
        self.shape: Shape | None = None
        self.max_length = 0
        self.bytes = 0
        self.rows: Examples | None = None
        self.named = True  # whether labels have names
        if plan:
            self._describe(plan.meta)
            self.bytes = plan.sub_fm_bytes
            return
        store = Store(nodes.cache_root(node) / "store")
        try:
            newest = sorted(store.digests(), key=lambda d: store.path(d).stat().st_mtime)
            package = store.get(newest[-1]) if newest else None
            if package is None:
                return
            size = sum(t.numel() * t.element_size() for t in package.weights.values())
            with collector_paused():
                refuse_giants(package.meta, size + _ADAPTER, room.available_memory())
                model = rebuild(package, node["base"])
            self._describe(package.meta)
        except Exception:
            # Whatever lies there is no sub-FM: the server sends one, and the room for it is
            # looked at by a check of its own.
            return
        self.model, self.files, self.bytes = model, package.files, size

    def _describe(self, meta: PackageMeta) -> None:
        self.shape, self.max_length = plansize.shape_of(meta), meta.max_length


def _data(
    node: dict[str, Any], options: Options, plan: PlanSize | None, held: _Held
) -> list[Finding]:
    def readable() -> str:
        task = nodes.own_task(node).learn(Path(node["data-path"]), nodes.columns_of(node))
        rows = nodes.own_rows(node, task)
        count = Counter(task.histogram(rows) or {task.name: len(rows)}).most_common()
        shown = ", ".join(f"{label} {n}" for label, n in count[:_SHOWN])
        more = f" and {len(count) - _SHOWN} more labels" if len(count) > _SHOWN else ""
        train, out = split_sizes(rows, node["validation-share"])
        if not train:
            raise UserError(f"validation-share leaves none of the {out} rows to train on.")
        apart = f", {out} of them kept for validation" if out else ""
        held.rows, held.named = rows, bool(task.labels)
        gone = f" {rows.left_out}." if rows.left_out else ""
        return f"{len(rows)} rows{apart}: {shown}{more}.{gone}"

    found = [guarded("data", readable)]

    def known() -> str:
        task = make(nodes.own_task(node).name, names)
        held.rows = nodes.own_rows(node, task)
        missing = [name for name, n in task.histogram(held.rows).items() if not n]
        lacking = f"; no row has {', '.join(missing[:_SHOWN])}" if missing else ""
        return f"every label is one of the {len(names)} known{lacking}."

    names: tuple[str, ...] = ()
    if options.labels:
        names = tuple(name.strip() for name in options.labels.split(","))
    elif plan and plan.labels:
        names = plan.labels
    elif held.model:
        names = held.model.task.labels
    if found[0].status == FAIL:
        found.append(Finding("labels", SKIPPED, "the data cannot be read."))
    elif isinstance(nodes.own_task(node), Headless):
        found.append(Finding("labels", SKIPPED, "the task has none."))
    elif not held.named:
        found.append(Finding("labels", PASS, "every label is a number."))
    elif not names:
        found.append(
            Finding("labels", SKIPPED, "give the names with --labels to have them checked.")
        )
    else:
        found.append(guarded("labels", known))
    return found


def _room(
    node: dict[str, Any],
    options: Options,
    plan: PlanSize | None,
    held: _Held,
    before: list[Finding],
) -> list[Finding]:
    size = held.bytes or int(options.sub_fm_mb * 1e6)
    batch = plan.batch_size if plan else _BATCH
    tokens = held.shape.length(held.max_length) if held.shape else 0
    root = nodes.cache_root(node)
    stored = room.STORED * (plan.package_bytes if plan else size)
    if size and held.rows is not None:
        stored += _row_bytes(held) * len(held.rows)
    out = [guarded("cache-dir", lambda: room.folder(root, stored))]
    if not size:
        why = "give --plan (from `fedpft inspect --json`) or --sub-fm-mb to have this checked."
        return [*out, Finding("memory", SKIPPED, why), Finding("training step", SKIPPED, why)]
    needed = room.memory_needed(size, held.shape, batch, tokens)
    if any(node[key] != default for key, (_, default) in means.KEYS.items()):
        out.append(guarded("told to the server", lambda: _means(node, root)))
    out.append(guarded("memory", lambda: room.memory(needed)))
    if out[-1].status == FAIL:
        why = "there is not enough memory to try one."
    elif held.shape is None:
        why = "only --plan, or a sub-FM in the store, tells the model's shape."
    elif plan is None and (held.rows is None or _failed(before, "labels")):
        why = "data and labels have to be right first."
    else:
        return [*out, guarded("training step", lambda: _step(node, plan, held, batch))]
    return [*out, Finding("training step", SKIPPED, why)]


def _means(node: dict[str, Any], root: Path) -> str:
    """What the node says of itself, by which the server chooses a width for it."""
    if node["memory-mb"] == -1:
        means.keep_measured(root, room.available_memory())
    said = means.of_node(node, root)
    megabytes = {k: f"{k} {v / 1e6:.0f} MB" for k, v in said.items() if isinstance(v, int)}
    words = {k: f"{k} {v}" for k, v in said.items() if isinstance(v, str)}
    return ", ".join([*megabytes.values(), *words.values()]) + "."


def _failed(findings: list[Finding], name: str) -> bool:
    return any(f.name == name and f.status == FAIL for f in findings)


def _row_bytes(held: _Held) -> int:
    """Bytes of one encoded row on disk, at most."""
    shape = held.shape
    if shape is None:
        return 0
    if shape.image_tokens:
        return shape.channels * shape.height * shape.width
    labels = 8
    if held.rows is not None and held.rows.labels.ndim > 1:  # of each word, or of each name
        labels = max(held.rows.labels[:1].nbytes, 8 * held.max_length)
    return 5 * held.max_length + 16 + labels


def _step(node: dict[str, Any], plan: PlanSize | None, held: _Held, batch: int) -> str:
    threads = plan.threads if plan else 1
    if node["max-threads"]:
        threads = min(threads, node["max-threads"])
    assert held.shape is not None
    free = room.available_memory()
    if plan:
        with collector_paused():
            try:
                refuse_giants(plan.meta, plan.sub_fm_bytes + plan.adapter_bytes, free)
            except UserError:
                raise
            except Exception:
                pass  # what makes no model is named next
            model = plan.client_model(node["base"])
        rows = step.full_rows(model.task, held.shape, held.max_length, batch)
        what = "a random model of the plan's shape, rows of full length"
    else:
        assert held.model is not None and held.rows is not None
        model = held.model
        some = held.rows.select(range(min(len(held.rows), 4 * batch)))
        processor = from_files(held.files, model.task.reads)
        rows = model.task.encode(some, processor, model.max_length)
        what = "the sub-FM in the store, own rows"
    model.model.to(nodes.pick_device(node["device"], "node config: device"))
    try:
        seconds = step.step_seconds(model.model, model.task, rows, min(batch, len(rows)), threads)
    except Exception as error:
        # Settings may make a model that no row fits, and what torch raises then is its secret.
        raise UserError(f"{what}: a step fails ({fault(error)}).") from error
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
    return (
        f"{seconds:.2f} s for {min(batch, len(rows))} rows on {node['device']} with {threads} "
        f"threads ({what}); this check took {peak / 1e6:.0f} MB of memory at most."
    )


def _network(options: Options) -> list[Finding]:
    out: list[Finding] = []
    reached: connection.Address | None = None
    if options.superlink:

        def reach() -> str:
            nonlocal reached
            at = connection.address(options.superlink)
            text = connection.reach(at, options.timeout)
            reached = at
            return text

        out.append(guarded("SuperLink", reach))
    else:
        out.append(Finding("SuperLink", SKIPPED, "give --superlink HOST:PORT to have it checked."))
    if reached is None:
        out.append(Finding("certificate", SKIPPED, "there is no connection to a SuperLink."))
    elif options.insecure:
        at = reached
        out.append(guarded("certificate", lambda: connection.speak_plainly(at, options.timeout)))
    else:
        at, roots = reached, options.root_certificates
        out.append(
            guarded("certificate", lambda: connection.certificate(at, roots, options.timeout))
        )
    if options.key is None:
        out.append(Finding("node key", SKIPPED, "no --auth-supernode-private-key was given."))
    elif options.insecure:
        out.append(Finding("node key", FAIL, "Flower authenticates nodes over TLS only."))
    else:
        key = options.key
        out.append(guarded("node key", lambda: connection.private_key(key)))
        if out[-1].status == PASS:
            why = "only the SuperLink knows (`flwr supernode list` there)."
            out.append(Finding("key is registered", SKIPPED, why))
    return out


__all__ = ["FAIL", "PASS", "SKIPPED", "Options", "check", "parse"]
