"""`fedpft node check` as a whole, against real files, models and servers on loopback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from cryptography.hazmat.primitives.asymmetric import ec
from superlinks import openssh, server

from client_app.check import node as node_check
from client_app.check import room
from client_app.check.findings import FAIL, PASS, SKIPPED, Finding
from client_app.check.node import Options, check, parse
from client_app.store import Store
from fedpft_console import cli
from fedpft_core import config
from fedpft_core.adapter import lora as adapters
from fedpft_core.errors import UserError
from fedpft_core.model.families import family_of
from fedpft_core.proxy import size as plansize
from fedpft_core.proxy.build import build
from fedpft_core.proxy.package import make_package


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `fedpft inspect --json` prints for a tiny model."""
    folder = tmp_path_factory.mktemp("fm")
    flat = {
        "model.name": str(tiny.folder("bert", folder / "fm")), "plan.keep-share": 0.5,
        "data.labels": ",".join(tiny.LABELS), "data.max-length": 16,
    }  # fmt: skip
    path = folder / "plan.json"
    path.write_text(plansize.describe(config.from_flat(flat)).to_json())
    return path


def findings(options: Options) -> dict[str, Finding]:
    return {f.name: f for f in check(options)}


def node_config(tmp_path: Path, **more: Any) -> str:
    keys = {
        "name": "a", "data-path": str(tmp_path / "rows.csv"), "cache-dir": str(tmp_path / "cache"),
    } | more  # fmt: skip
    return " ".join(f"{k}={json.dumps(v)}" for k, v in keys.items())


def test_a_machine_that_is_ready(tls: Any, plan: Path, tmp_path: Path) -> None:
    tiny.write_csv(tmp_path / "rows.csv", tiny.sentences(60))
    key = openssh(tmp_path / "key", ec.generate_private_key(ec.SECP384R1()))
    with tls() as port:
        found = findings(
            Options(
                node_config(tmp_path, **{"validation-share": 0.2}),
                f"127.0.0.1:{port}",
                root_certificates=tmp_path / "ca.pem",
                key=key,
                plan=plan,
            )
        )
    # Whether the key is registered only the SuperLink knows, and nothing here claims to.
    assert found.pop("key is registered").status == SKIPPED
    assert {f.status for f in found.values()} == {PASS}, found
    assert list(found) == [
        "node config", "plan", "policy", "data", "labels", "cache-dir", "memory", "training step",
        "SuperLink", "certificate", "node key",
    ]  # fmt: skip
    text = found["data"].text
    assert "60 rows" in text and "kept for validation" in text
    assert all(f"{label} 20" in text for label in tiny.LABELS)
    assert "s for 8 rows on cpu with 1 threads (a random model" in found["training step"].text
    assert "the 3 known." in found["labels"].text


def test_the_plans_description_tells_no_secret(plan: Path) -> None:
    size = plansize.read(plan)
    made = size.client_model()
    kept = [b.kept for b in made.plan.blocks if b.kept]
    assert kept and all(k == tuple(range(len(k))) for k in kept)
    fm = tiny.model("bert")
    real = build(fm, tiny.plan_for(fm, keep_share=0.5))
    assert size.sub_fm_bytes == sum(4 * p.numel() for p in real.parameters())
    assert size.package_bytes > size.sub_fm_bytes - size.adapter_bytes > 0
    assert plan.stat().st_size < 10_000


def test_each_fault_of_the_data_is_named(plan: Path, tmp_path: Path) -> None:
    def status(row: str, words: str, text: str | None = None, **more: Any) -> dict[str, Finding]:
        if text is not None:
            (tmp_path / "rows.csv").write_text(text)
        found = findings(Options(node_config(tmp_path, **more), plan=plan))
        assert found[row].status == FAIL and words in found[row].text, found
        return found

    found = status("data", "there is no such file")
    assert found["labels"].status == SKIPPED
    status("data", "has no text", "text,label\n,animal\n")
    found = status(
        "labels", "row 2 has the unknown label 'ghost'", "text,label\na,animal\nb,ghost\n"
    )
    assert found["data"].status == PASS and "ghost 1" in found["data"].text
    assert found["training step"].status == PASS  # random rows do not need these
    status("data", "label", "text,kind\na,animal\n")
    status("node config", "no such key 'nmae'", "text,label\na,animal\n", nmae="x")
    found = status("node config", "name and data-path", name="")
    assert found["data"].status == found["training step"].status == SKIPPED
    status("node config", "max-threads expects int", **{"max-threads": "2"})
    status("node config", "validation-share", **{"validation-share": 1.5})


def test_no_room(plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.write_csv(tmp_path / "rows.csv", tiny.sentences(30))
    monkeypatch.setattr(room, "available_memory", lambda: 10**6)
    found = findings(Options(node_config(tmp_path), plan=plan))
    assert found["memory"].status == FAIL and found["training step"].status == SKIPPED
    (tmp_path / "file").write_text("")
    found = findings(Options(node_config(tmp_path, **{"cache-dir": str(tmp_path / "file")})))
    assert found["cache-dir"].status == FAIL


def test_sizes_alone_and_nothing_at_all(tmp_path: Path) -> None:
    tiny.write_csv(tmp_path / "rows.csv", tiny.sentences(30))
    found = findings(Options(node_config(tmp_path), sub_fm_mb=1e9))
    assert found["memory"].status == found["cache-dir"].status == FAIL
    found = findings(Options(node_config(tmp_path), sub_fm_mb=1, labels="animal,number"))
    assert found["memory"].status == PASS and found["training step"].status == SKIPPED
    assert found["labels"].status == FAIL and "'place'" in found["labels"].text
    found = findings(Options(node_config(tmp_path)))
    assert [n for n, f in found.items() if f.status == PASS] == ["node config", "data", "cache-dir"]
    assert not [f for f in found.values() if f.status == FAIL]


def test_the_sub_fm_in_the_store_tells_labels_and_speed(tmp_path: Path) -> None:
    tiny.write_csv(tmp_path / "rows.csv", tiny.sentences(30))
    fm = tiny.model("bert")
    plan = tiny.plan_for(fm, keep_share=0.5)
    spec = adapters.make_spec(
        family_of("bert"), plan, (), config.LoraConfig(rank=2, alpha=4.0, dropout=0.1)
    )
    package = make_package(
        build(fm, plan), plan, spec, tiny.tokenizer("bert"), "text", tiny.LABELS, 16
    )
    Store(tmp_path / "cache" / "store").put(package.digest(), package)
    found = findings(Options(node_config(tmp_path)))
    assert found["labels"].status == PASS
    assert "the sub-FM in the store, own rows" in found["training step"].text, found
    assert found["memory"].status == PASS
    for text in ("text,label\na,ghost\n", "text\na\n"):
        (tmp_path / "rows.csv").write_text(text)
        found = findings(Options(node_config(tmp_path)))
        assert found["training step"].status == SKIPPED, found
        assert FAIL in (found["labels"].status, found["data"].status)


def test_images(tmp_path: Path) -> None:
    flat = {"model.name": str(tiny.folder("vit", tmp_path / "fm")), "data.image-column": "image"}
    path = tmp_path / "plan.json"
    path.write_text(plansize.describe(config.from_flat(flat)).to_json())
    tiny.write_images(tmp_path / "rows.parquet", "vit", 12, 0)
    text = node_config(
        tmp_path, **{"image-column": "image", "data-path": str(tmp_path / "rows.parquet")}
    )
    found = findings(Options(text, plan=path))
    assert found["training step"].status == PASS, found
    assert found["data"].status == PASS and found["labels"].status == SKIPPED


def test_plans_that_are_none(plan: Path, tmp_path: Path) -> None:
    good = json.loads(plan.read_text())
    cases = {
        "is not JSON": "{",
        "was not made by": "[]",
        "was not made": json.dumps(good | {"format": "x"}),
        "another version": json.dumps({k: v for k, v in good.items() if k != "threads"}),
        "by another version": json.dumps(good | {"threads": "1"}),
    }
    for words, text in cases.items():
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(UserError, match=words):
            plansize.read(tmp_path / "plan.json")
    with pytest.raises(UserError, match="cannot be read"):
        plansize.read(tmp_path / "missing.json")
    (tmp_path / "plan.json").write_text(json.dumps(good | {"meta": {}}))
    tiny.write_csv(tmp_path / "rows.csv", tiny.sentences(30))
    found = findings(Options(node_config(tmp_path), plan=tmp_path / "plan.json"))
    assert found["plan"].status == FAIL and "another version" in found["plan"].text
    odd = good["meta"] | {"architecture": "x", "plan": good["meta"]["plan"] | {"blocks": []}}
    (tmp_path / "plan.json").write_text(json.dumps(good | {"meta": odd}))
    found = findings(Options(node_config(tmp_path), plan=tmp_path / "plan.json"))
    step = found["training step"]
    assert step.status == FAIL and "makes no model" in step.text


def test_node_configs_as_flower_reads_them(tmp_path: Path) -> None:
    text = "name=\"a b\" max-threads=2 validation-share=0.5 data-path='/x y'"
    assert parse(text) == {
        "name": "a b", "max-threads": 2, "validation-share": 0.5, "data-path": "/x y",
    }  # fmt: skip
    from flwr.common.config import parse_config_args

    assert parse(text) == parse_config_args([text])
    for bad, words in (
        ("name=a", "texts are quoted"),
        ('name="a" stray', "'stray' is no KEY=VALUE"),
        ('name="a" name="b"', "node config"),
        ("/missing.toml", "cannot be read"),
    ):
        with pytest.raises(UserError, match=words):
            parse(bad)
    (tmp_path / "node.toml").write_text('name = "a"\n')
    assert parse(str(tmp_path / "node.toml")) == {"name": "a"}


def test_key_without_tls_and_bad_address(tmp_path: Path) -> None:
    tiny.write_csv(tmp_path / "rows.csv", tiny.sentences(30))
    key = openssh(tmp_path / "key", ec.generate_private_key(ec.SECP384R1()))
    found = findings(Options(node_config(tmp_path), "http://x", insecure=True, key=key))
    assert found["SuperLink"].status == FAIL and found["certificate"].status == SKIPPED
    assert found["node key"].status == FAIL and "TLS only" in found["node key"].text


def test_the_command(
    tmp_path: Path, plan: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_csv(tmp_path / "rows.csv", tiny.sentences(30))
    args = ["node", "check", "--node-config", node_config(tmp_path), "--plan", str(plan)]
    with server(None) as port:
        args += ["--superlink", f"127.0.0.1:{port}", "--insecure"]
        assert cli.main([*args, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["ok"] and {c["status"] for c in told["checks"]} == {PASS, SKIPPED}
    # The server is gone now.
    assert cli.main(args) == 1
    out = capsys.readouterr().out
    assert "refuses connections" in out and "Traceback" not in out
    assert cli.main([*args, "--json"]) == 1
    assert not json.loads(capsys.readouterr().out)["ok"]
    assert cli.main([*args, "--root-certificates", "x"]) == 2
    assert "exclude each other" in capsys.readouterr().err
    assert {f.status for f in node_check.check(Options("x"))} == {FAIL, SKIPPED}
