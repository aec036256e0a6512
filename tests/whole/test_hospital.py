"""The recommended configuration on real SuperNodes: TLS, registered names, policies, keys renewed.

`pytest -m slow tests/whole/test_hospital.py`
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import flower
import pytest
import tiny
import yaml

from client_app.app_hash import app_hash
from fedpft_console.cli import main

ROOT = Path(__file__).parents[2]
# What a clinic's node.env has, but for the rows, of which tiny ones have fewer.
POLICY: dict[str, str | int] = {
    "policy-min-rows": 20, "policy-min-step-rows": 8, "policy-min-class-rows": 5,
    "policy-max-steps": 200, "policy-max-rank": 16, "policy-max-mb": 500,
}  # fmt: skip
FEWER = (
    "federation.clients=3 federation.clients-per-round=3 federation.enough=3 "
    "federation.min-clients=2 federation.rounds=1 federation.attempts=1"
)
# One exchange a round and none besides: what is looked at in the second run is who takes part.
TRAINED = "head.start=zero head.end=trained plug.method=refit federation.round-timeout=120"


def configuration(folder: Path) -> Path:
    """The recommended file with a tiny model and data in it."""
    folder.mkdir()
    tree = yaml.safe_load((ROOT / "examples" / "hospital" / "run.yaml").read_text())
    own = flower.job(folder)
    tree |= {k: own[k] for k in ("model", "distill", "align")}
    tree["data"] = own["data"] | {"train": ""}
    tree["plan"] |= {"retained-layers": "first"}  # four tiny blocks: 44 % of the neurons
    tree["run"] |= {"threads": 1}
    return flower.write_config(folder / "run.yaml", tree)


@pytest.mark.slow
def test_the_recommended_configuration_runs_and_keeps_its_rules(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conf = configuration(tmp_path / "job")
    tls = flower.certificates(tmp_path / "tls")
    names = ("clinic-a", "clinic-b", "clinic-c")
    keys = {n: flower.node_key(tmp_path / n) for n in (*names, "other", "renewed")}

    def public(key: str) -> str:
        return str(keys[key].with_suffix(".pub"))

    def join(d: flower.Deployment, name: str, key: str, app: str = "") -> None:
        rows = tmp_path / f"{name}.csv"
        if not rows.exists():
            tiny.write_csv(rows, tiny.sentences(60, ord(name[-1])))
        config: dict[str, str | int] = {"cache-dir": str(tmp_path / f"cache-{key}"), **POLICY}
        d.start_node(
            name, rows, "--auth-supernode-private-key", str(keys[key]),
            **config, **({"policy-app-hash": app} if app else {}),
        )  # fmt: skip

    def register(d: flower.Deployment, name: str, key: str) -> str:
        """The id that Flower gives the key."""

        def ids() -> set[str]:
            said = json.loads(d.flwr("supernode", "list", "test", "--format", "json"))
            return {n["node-id"] for n in said["nodes"]}

        before = ids()
        d.flwr("supernode", "register", public(key), "test", "--name", name)
        (new,) = ids() - before
        return new

    def run(d: flower.Deployment, folder: Path, *more: str) -> int:
        return d.run(folder, conf, "-c", FEWER, *more).wait(500)

    with flower.deployment(tmp_path / "flower", tls) as d:
        ids = {}
        for name in names:
            ids[name] = register(d, name, name)
            join(d, name, name, app_hash() if name == "clinic-a" else "")
        assert run(d, tmp_path / "first") == 0, d.logs()
        found = flower.events(tmp_path / "first")
        replies = {e["client"]: e["status"] for e in found if e["event"] == "reply"}
        assert replies == dict.fromkeys(names, "ok")
        (exposed,) = {e["digest"]: e for e in found if e["event"] == "exposed"}.values()
        assert not exposed["simulated"] and exposed["disguised"]
        assert exposed["ever"] == exposed["disclosed"] == 24 + 3 * 6
        assert (tmp_path / "flower" / "flwr" / "fedpft" / "disclosed").is_dir()

        # Revoked, renewed, and a member who takes another's name.
        d.flwr("supernode", "unregister", ids["clinic-b"], "test")
        d.stop_node("clinic-b")
        register(d, "clinic-b", "renewed")
        join(d, "clinic-b", "renewed")
        d.stop_node("clinic-c")
        register(d, "clinic-d", "other")
        join(d, "clinic-c", "other")
        assert run(d, tmp_path / "second", "-c", TRAINED) == 0, d.logs()
        found = flower.events(tmp_path / "second")
        good = {e["client"] for e in found if e["event"] == "reply" and e["status"] == "ok"}
        assert good == {"clinic-a", "clinic-b"}
        said = [str(e["text"]) for e in found if e["event"] == "warning"]
        assert any("its key is registered as clinic-d" in text for text in said), said
        # More than the budget is refused before anything is sent.
        third = tmp_path / "third"
        assert run(d, third, "-c", "plan.retained-layers=last plan.disclosure-budget=0.5") != 0
        kinds = {e["event"] for e in flower.events(third)}
        assert "run_failed" in kinds and "bytes" not in kinds
    shutil.rmtree(tmp_path / "job" / "fm")
    capsys.readouterr()
    ledger = tmp_path / "flower" / "flwr" / "fedpft" / "disclosed"
    assert main(["audit", str(tmp_path / "first"), "--ledger", str(ledger)]) == 0
    assert "43.8 %" in capsys.readouterr().out
