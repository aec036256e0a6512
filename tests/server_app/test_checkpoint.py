"""Checkpoints and run folders: whole or not at all, one server at a time, nothing lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import fabricate
import pytest
import torch

from fedpft_core.errors import RunError, UserError
from fedpft_core.model.names import PatchedWeights
from fedpft_core.train.inactivity import Counts
from fedpft_core.wire import codec
from server_app.run import schema as ev
from server_app.run.checkpoint import Checkpoints
from server_app.run.events import EventLog, read_events
from server_app.run.folder import RunFolder
from server_app.state import Pending, State

ROOT = Path(__file__).parents[2]


class Bench:
    """What checkpoints need of the server's workbench, with a memory of what it was given."""

    def __init__(self) -> None:
        self.frozen: dict[str, torch.Tensor] = {}
        self.adapter: dict[str, torch.Tensor] = {}

    def trained_names(self) -> list[str]:
        names = PatchedWeights(fabricate.PLAN)
        parts = fabricate.NEURON_PARTS + fabricate.SHARED_PARTS
        return [names.name(b, p) for b in fabricate.PLAN.pruned for p in parts]

    def load_frozen(self, weights: dict[str, torch.Tensor]) -> None:
        self.frozen = weights

    def plug(self, adapter: dict[str, torch.Tensor]) -> None:
        self.adapter = adapter


def advanced(state: State, rounds: int) -> State:
    """A state some rounds on, with an alignment after each."""
    for _ in range(rounds):
        state.round += 1
        state.adapter = fabricate.adapter(state.round)
        state.have[f"client-{state.round}"] = (state.digest,)
        fabricate.align(state, state.round)
    return state


def saved(root: Path, rounds: int, keep: int = 2) -> tuple[Checkpoints, State]:
    checkpoints, state = Checkpoints(root, keep), fabricate.state()
    for _ in range(rounds):
        checkpoints.save(advanced(state, 1), Bench(), 100 * state.round)  # type: ignore[arg-type]
    return checkpoints, state


def same(a: State, b: State) -> bool:
    return (
        (a.round, a.digest, a.digests, a.have, a.run)
        == (b.round, b.digest, b.digests, b.have, b.run)
        and codec.pack(a.adapter) == codec.pack(b.adapter)
        and a.package.to_bytes() == b.package.to_bytes()
        and [(p.source, p.target, p.fmt, p.to_bytes()) for p in a.patches]
        == [(p.source, p.target, p.fmt, p.to_bytes()) for p in b.patches]
    )


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    checkpoints, state = saved(tmp_path, 3)
    back = checkpoints.latest()
    assert back is not None and back.events_offset == 300
    bench = Bench()
    restored = back.restore(bench, fabricate.package())  # type: ignore[arg-type]
    assert same(restored, state)
    assert set(bench.frozen) == set(bench.trained_names())
    assert codec.pack(bench.adapter) == codec.pack(state.adapter)


def test_work_that_is_pending_comes_back(tmp_path: Path) -> None:
    counts = Counts({10: torch.arange(3), 2: torch.arange(4)}, {10: 7, 2: 9})
    for round, pending in enumerate((None, Pending(), Pending(counts)), start=1):
        state = fabricate.state()
        state.round, state.pending = round, pending
        checkpoints = Checkpoints(tmp_path, 2)
        checkpoints.save(state, Bench(), 0)  # type: ignore[arg-type]
        back = checkpoints.latest()
        assert back is not None and back.round == round
        found = back.restore(Bench(), fabricate.package()).pending  # type: ignore[arg-type]
        if pending is None or pending.counts is None:
            assert found == pending
            continue
        assert found is not None and found.counts is not None
        assert found.counts.tokens == counts.tokens
        assert list(found.counts.inactive) == [2, 10]
        assert all(torch.equal(found.counts.inactive[b], counts.inactive[b]) for b in (2, 10))


def test_only_the_last_ones_are_kept(tmp_path: Path) -> None:
    checkpoints, _ = saved(tmp_path, 5, keep=2)
    assert [p.name for p in checkpoints.all()] == ["round-0004", "round-0005"]


def test_rounds_are_ordered_as_numbers(tmp_path: Path) -> None:
    checkpoints, state = saved(tmp_path, 1)
    for round in (9999, 10_000):
        state.round = round
        checkpoints.save(state, Bench(), 0)  # type: ignore[arg-type]
    back = checkpoints.latest()
    assert back is not None and back.round == 10_000
    assert [p.name for p in checkpoints.all()] == ["round-9999", "round-10000"]


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none", 2).latest() is None
    (tmp_path / ".new").mkdir()
    (tmp_path / "round-x").mkdir()
    assert Checkpoints(tmp_path, 2).latest() is None


FILES = ["state.json", "adapter.safetensors", "frozen.safetensors", "patch-0000.safetensors"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone", "other"])
def test_a_corrupt_newest_falls_back_to_the_one_before(
    tmp_path: Path, name: str, damage: str
) -> None:
    checkpoints, state = saved(tmp_path, 2)
    path = checkpoints.all()[-1] / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 4
    made = {"cut": data[: len(data) // 2], "empty": b"", "other": b'["x"]'}.get(damage, data)
    path.write_bytes(made)
    if damage == "gone":
        path.unlink()
    back = checkpoints.latest()
    assert back is not None and back.round == 1
    # Going on from there replaces the corrupt one, and never drops the last good one early.
    again = back.restore(Bench(), fabricate.package())  # type: ignore[arg-type]
    checkpoints.save(advanced(again, 1), Bench(), 200)  # type: ignore[arg-type]
    newest = checkpoints.latest()
    assert newest is not None and newest.round == 2
    assert same(newest.restore(Bench(), fabricate.package()), state)  # type: ignore[arg-type]


def test_corrupt_later_ones_do_not_push_out_good_ones(tmp_path: Path) -> None:
    checkpoints, state = saved(tmp_path, 1, keep=2)
    for round in (3, 4, 5):
        folder = tmp_path / f"round-{round:04d}"
        folder.mkdir()
        (folder / "state.json").write_text("{}")
    checkpoints.save(advanced(state, 1), Bench(), 0)  # type: ignore[arg-type]
    assert [p.name for p in checkpoints.all()] == ["round-0001", "round-0002"]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"state": 1, "sha256": "x"}', '{"state": "{}"}', "9" * 5000]
)
def test_all_corrupt_is_a_clear_error(tmp_path: Path, text: str) -> None:
    checkpoints, _ = saved(tmp_path, 2)
    for folder in checkpoints.all():
        (folder / "state.json").write_text(text)
    with pytest.raises(RunError, match="every checkpoint is corrupt"):
        checkpoints.latest()


def test_another_model_is_noticed(tmp_path: Path) -> None:
    checkpoints, _ = saved(tmp_path, 1)
    back = checkpoints.latest()
    assert back is not None
    with pytest.raises(RunError, match="not those the run began with"):
        back.restore(Bench(), fabricate.package(seed=1))  # type: ignore[arg-type]
    smaller = replace(fabricate.package(), weights={})
    with pytest.raises(RunError, match="does not fit this model"):
        back.restore(Bench(), smaller)  # type: ignore[arg-type]


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_full_disk_keeps_the_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    checkpoints, state = saved(tmp_path, 2)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(advanced(state, 1), Bench(), 0)  # type: ignore[arg-type]
    monkeypatch.undo()
    back = checkpoints.latest()
    assert back is not None and back.round == 2
    checkpoints.save(state, Bench(), 0)  # type: ignore[arg-type]
    newest = checkpoints.latest()
    assert newest is not None and newest.round == 3


# --- run folders --------------------------------------------------------------------------


def test_a_folder_is_opened_once_and_can_be_resumed(tmp_path: Path) -> None:
    config = fabricate.config(run__dir=str(tmp_path / "run"))
    with RunFolder.open(config) as folder:
        assert folder.path == tmp_path / "run"
        folder.events.emit(ev.RunFailed(reason="x"))
        saved(folder.path / "checkpoints", 1)
    with pytest.raises(UserError, match="already holds a run"), RunFolder.open(config):
        pass
    again = fabricate.config(run__dir=str(tmp_path / "run"), run__resume=True)
    with RunFolder.open(again) as folder:
        assert len(list(read_events(folder.path / "events.jsonl"))) == 1


def test_resuming_what_never_began(tmp_path: Path) -> None:
    config = fabricate.config(run__dir=str(tmp_path / "run"), run__resume=True)
    with pytest.raises(UserError, match="nothing to resume"), RunFolder.open(config):
        pass


@pytest.mark.parametrize("resume", [True, False])
def test_a_run_without_a_checkpoint_starts_over(tmp_path: Path, resume: bool) -> None:
    with RunFolder.open(fabricate.config(run__dir=str(tmp_path))) as folder:
        folder.events.emit(ev.RunFinished(seconds=1.0))
    (tmp_path / "checkpoints" / ".new").mkdir(parents=True)
    with RunFolder.open(fabricate.config(run__dir=str(tmp_path), run__resume=resume)) as folder:
        folder.events.emit(ev.RunFinished(seconds=2.0))
    events = [e["seconds"] for _, e in read_events(tmp_path / "events.jsonl")]
    assert events == [2]


def test_a_torn_line_of_the_event_log_is_mended(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"t":1,"event":"a"}\n{"t":2,"event":"b"}\n{"t":3,"ev')
    log = EventLog(path)
    log.emit(ev.Warned(text="c"))
    log.close()
    assert [e["event"] for _, e in read_events(path)] == ["a", "b", "warning"]


def test_a_log_shorter_than_the_checkpoint_remembers_stays_readable(tmp_path: Path) -> None:
    """As after a power cut: the checkpoint was flushed to the disk, the end of the log was not."""
    log = EventLog(tmp_path / "events.jsonl")
    log.emit(ev.Warned(text="a"))
    log.rewind(log.offset() + 100)
    log.emit(ev.Warned(text="b"))
    log.close()
    assert [e["text"] for _, e in read_events(tmp_path / "events.jsonl")] == ["a", "b"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="cannot be written"),
        RunFolder.open(fabricate.config(run__dir=str(tmp_path / "file" / "run"))),
    ):
        pass


def server(folder: Path, pipe: Any) -> None:
    """A second process that holds a run folder until it is told to let go."""
    try:
        with RunFolder.open(fabricate.config(run__dir=str(folder))):
            pipe.send("opened")
            pipe.recv()
    except UserError as error:
        pipe.send(str(error))


def started(folder: Path) -> tuple[Any, str]:
    """A second process and what it says about the folder."""
    context = fabricate.processes()
    here, there = context.Pipe()
    process = context.Process(target=server, args=(folder, there))
    process.start()
    there.close()
    assert here.poll(60)
    # Kept open with the process: its end would tell the server to let go.
    process.pipe = here
    return process, here.recv()


def test_a_second_server_on_one_folder_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first, said = started(folder)
    try:
        assert said == "opened"
        with (
            pytest.raises(UserError, match="another server is running in this folder"),
            RunFolder.open(fabricate.config(run__dir=str(folder))),
        ):
            pass
    finally:
        first.kill()
        first.join()
    with RunFolder.open(fabricate.config(run__dir=str(folder))):  # the lock died with its holder
        second, said = started(folder)
        assert "another server is running in this folder" in said
        second.join()


# --- kill -9 ------------------------------------------------------------------------------


def kill_loop(folder: Path, kills: int, schedule: str, timeout: float) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "kill_loop.py"), "--kills", str(kills),
         "--schedule", schedule, str(folder)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    shutil.rmtree(folder, ignore_errors=True)
    return result


@pytest.mark.parametrize(
    "schedule", ["multi-round", pytest.param("overlap", marks=pytest.mark.slow)]
)
def test_killed_runs_end_with_the_same_bits(tmp_path: Path, schedule: str) -> None:
    kills = 50 if os.environ.get("FEDPFT_LONG") else 4
    assert kill_loop(tmp_path / "runs", kills, schedule, 60 * kills)["kills"] >= kills
