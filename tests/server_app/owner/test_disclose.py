"""Whole runs in this process, and what is noted of what leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from fedpft_console.cli import main
from fedpft_core.errors import RunError, UserError
from fedpft_core.wire.envelope import open_envelope
from fedpft_core.wire.package import Package
from server_app.owner import disclose, neurons
from server_app.owner.neurons import known

SHORT: dict[str, Any] = {
    "federation__rounds": 3, "federation__clients": 2, "federation__clients_per_round": 2,
    "distill__steps": 3, "align__steps": 2, "train__local_steps": 3, "run__evaluate_every": 9,
    "run__gradient_rows": 0, "plan__retained_layers": "first",
}  # fmt: skip


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny.write_task("bert", tmp_path_factory.mktemp("task"))


@pytest.fixture
def deployed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients of this process count as machines of others."""
    monkeypatch.setattr(disclose, "leaves_machine", lambda transport: True)


def run(task: dict[str, Any], folder: Path, **keys: Any) -> list[dict[str, Any]]:
    flat = task | {"federation.clients": 2}
    ledger = {"plan__ledger": str(folder.parent / "ledger")}
    return tiny.run(flat, folder, **(SHORT | ledger | keys))


def noted(events: list[dict[str, Any]], arm: str = "") -> list[dict[str, Any]]:
    return [e for e in events if e["event"] == "exposed" and e.get("arm", "") == arm]


def test_a_run_notes_each_version_and_a_simulation_leaves_the_ledger_alone(
    task: dict[str, Any], tmp_path: Path
) -> None:
    events = run(task, tmp_path / "run", run__undistilled=True)
    first, second = noted(events)
    assert first["simulated"] and first["digest"] != second["digest"]
    assert (first["neurons"], first["disclosed"], first["ever"]) == (96, 24 + 3 * 12, 60)
    assert first["copied"] == 24  # distillation moves all but the whole block's
    parts = {p["part"]: p for p in first["parts"]}
    assert parts["embeddings"]["copied"] == parts["embeddings"]["fm"]
    (aside,) = noted(events, "undistilled")
    assert aside["copied"] == aside["disclosed"] == 60
    assert not (tmp_path / "ledger").exists()
    kinds = [e["event"] for e in events]
    assert kinds.index("exposed") < kinds.index("bytes")  # said before anything is sent


def test_runs_with_other_blocks_add_up_and_are_refused_past_the_budget(
    task: dict[str, Any], tmp_path: Path, deployed: None
) -> None:
    run(task, tmp_path / "a")
    events = run(task, tmp_path / "b", plan__retained_layers="last")
    assert noted(events)[-1]["ever"] == 24 + 12 + 12 + 24
    assert any("leave for the first time" in e.get("text", "") for e in events)
    ((_, state),) = known(tmp_path / "ledger")
    assert state.count == 72 and neurons.count(state.copied) == 48
    with pytest.raises(UserError, match=r"plan.disclosure-budget = 0.8: .* 87.5 % .* 75.0 %"):
        run(task, tmp_path / "c", plan__retained_layers="1", plan__disclosure_budget=0.8)
    log = (tmp_path / "c" / "events.jsonl").read_text()
    assert '"bytes"' not in log and '"run_failed"' in log
    events = run(task, tmp_path / "d", plan__disclosure_budget=0.8)
    assert noted(events)[-1]["ever"] == 72
    assert not any("leave for the first time" in e.get("text", "") for e in events)


def test_preferred_neurons_go_out_again(
    task: dict[str, Any], tmp_path: Path, deployed: None
) -> None:
    run(task, tmp_path / "a")
    other = {"plan__saliency": "random", "run__seed": 3}
    events = run(task, tmp_path / "b", plan__prefer_disclosed=True, **other)
    assert noted(events)[-1]["ever"] == 60
    plans = [json.loads((tmp_path / n / "plan.json").read_text()) for n in "ab"]
    assert plans[0]["blocks"] == plans[1]["blocks"]
    assert noted(run(task, tmp_path / "c", **other))[-1]["ever"] > 60
    # Fewer than have left are some of those; resumed, a run keeps its own.
    keys = {"plan__prefer_disclosed": True, "plan__keep_share": 0.25}
    with pytest.raises(RunError, match="stop"):
        run(task, tmp_path / "d", run__stop_after=1, **keys)
    before = (tmp_path / "d" / "plan.json").read_text()
    run(task, tmp_path / "e", plan__saliency="random", run__seed=9)
    run(task, tmp_path / "d", run__resume=True, **keys)
    assert (tmp_path / "d" / "plan.json").read_text() == before


def test_a_disguised_run_is_the_same_run(task: dict[str, Any], tmp_path: Path) -> None:
    def last(events: list[dict[str, Any]], model: str) -> float:
        found = [e for e in events if e["event"] == "evaluation" and e["model"] == model]
        return float(found[-1]["loss"])

    plain = run(task, tmp_path / "plain")
    flat = task | {"federation.clients": 2}
    watched = tiny.Federation(flat | {k.replace("__", ".").replace("_", "-"): v
                                      for k, v in SHORT.items()})  # fmt: skip
    keys = SHORT | {"plan__ledger": str(tmp_path / "l"), "plan__disguise": "permute-scale"}
    hidden = tiny.run(flat, tmp_path / "hidden", watched, **keys)
    for model in ("proxy", "fm"):
        assert last(plain, model) == pytest.approx(last(hidden, model), rel=1e-2)
    assert noted(hidden)[0]["disguised"] and noted(hidden)[0]["disclosed"] == 60
    packages = [
        Package.from_bytes(m.package)
        for _, e in watched.sent
        if (m := open_envelope(e)) and getattr(m, "package", b"")
    ]
    assert packages
    for package in packages:
        assert package.meta.plan.blocks[1].kept == tuple(range(12))
    secret = tmp_path / "hidden" / "disguise.safetensors"
    assert secret.stat().st_mode & 0o077 == 0
    plan = json.loads((tmp_path / "hidden" / "plan.json").read_text())
    assert plan == json.loads((tmp_path / "plain" / "plan.json").read_text())


def test_a_disguised_run_is_resumed_under_the_same_disguise(
    task: dict[str, Any], tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"plan__disguise": "permute-scale"}
    with pytest.raises(RunError, match="stop"):
        run(task, tmp_path / "run", run__stop_after=1, **keys)
    events = run(task, tmp_path / "run", run__resume=True, **keys)
    assert [e["event"] for e in events].count("run_finished") == 1
    digests = [e["digest"] for e in noted(events)]
    assert digests[0] == digests[1] and len(set(digests)) == 2  # noted again when resumed
    secret = tmp_path / "run" / "disguise.safetensors"
    secret.write_bytes(b"damaged")
    with pytest.raises(RunError, match=r"disguise of the resumed run"):
        run(task, tmp_path / "run", run__resume=True, **keys)


def test_settings_that_contradict_a_disguise_are_refused(
    task: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"plan\.disguise"):
        run(task, tmp_path / "a", plan__disguise="permute-scale", run__undistilled=True)


def test_embeddings_of_tokens_that_are_not_public_stay_home(
    task: dict[str, Any], tmp_path: Path
) -> None:
    public = tmp_path / "public.csv"
    tiny.write_csv(public, [(t, "x") for t, _ in tiny.sentences(60, 2) if "tokyo" not in t])
    events = run(
        task, tmp_path / "run", plan__embeddings="seen", data__public=str(public),
        federation__rounds=1,
    )  # fmt: skip
    (found,) = noted(events)
    table = next(p for p in found["parts"] if p["part"] == "embeddings")
    assert found["withheld"] >= 1
    assert table["fm"] - table["sent"] == 16 * found["withheld"]
    assert table["copied"] == table["sent"]


def test_the_audit_and_the_report_show_it(
    task: dict[str, Any], tmp_path: Path, deployed: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run(task, tmp_path / "a", run__undistilled=True)
    run(task, tmp_path / "b", plan__retained_layers="last")
    ledger = ["--ledger", str(tmp_path / "ledger")]
    assert main(["audit", str(tmp_path / "a"), str(tmp_path / "b"), *ledger]) == 0
    shown = capsys.readouterr().out
    assert "62.5 %" in shown and "Ledger of all runs in deployments" in shown
    assert "Side run undistilled: " in shown and "60 of 60 neurons sent left bit-equal" in shown
    assert "75.0 %" in shown  # both runs together, and in the ledger
    assert main(["report", str(tmp_path / "a")]) == 0
    for name in ("report.md", "report.html"):
        text = (tmp_path / "a" / name).read_text()
        assert "What left of the FM" in text and "62.5 %" in text
    assert main(["audit", *ledger]) == 0
    assert main(["audit", str(tmp_path / "nowhere")]) == 2


def test_runs_of_before_are_shown_without_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "old"
    old.mkdir()
    line = {"t": 1.0, "event": "run_started", "run_dir": "x", "version": "0", "seed": 0,
            "method": "fedpft", "rounds": 1, "clients_per_round": 1,
            "resumed_from": None}  # fmt: skip
    (old / "events.jsonl").write_text(json.dumps(line) + "\n")
    assert main(["audit", str(old), "--ledger", str(tmp_path / "no")]) == 0
    assert "did not note it" in capsys.readouterr().out
