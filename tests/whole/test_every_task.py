"""Every task goes through a run, `fedpft inspect`, plan sizes, the node check and the product."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import flower
import pytest
import tasks
import tiny
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

from client_app.check.node import FAIL, PASS, Options, check
from client_app.node import client_for
from fedpft_core import config
from fedpft_core.errors import UserError
from fedpft_core.proxy import size as plansize
from fedpft_core.proxy.cost import inspect
from fedpft_core.task import load_task, make

SHORT = {
    "federation.rounds": 2, "distill.steps": 3, "align.interval": 1, "align.steps": 2,
    "data.validation-share": 0.2, "train.head-lr-scale": 1.0, "plug.distil-steps": 4,
    "head.start": "statistics", "head.end": "better", "plug.method": "best",
    "run.baselines": True, "run.gradient-rows": 8,
}  # fmt: skip
METRICS = {
    "regress": ["Pearson correlation", "Spearman correlation", "RMSE"],
    "multi-label": ["micro-F1", "macro-F1", "exact match", "ranking precision"],
    "tokens": ["entity F1", "token accuracy", "token macro-F1"],
}


def of(events: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [e for e in events if e["event"] == name]


@pytest.mark.parametrize("task", tasks.TASKS)
def test_run_inspect_sizes_and_node_check(task: str, tmp_path: Path) -> None:
    flat = tasks.write(task, tmp_path) | SHORT
    events = tiny.run(flat, tmp_path / "run")
    names = METRICS[flat["data.task"]]
    for event in of(events, "evaluation"):
        assert [event["metric"], *event["more"]] == names
    assert {e["model"] for e in of(events, "evaluation")} >= {"proxy", "fm"}
    # The statistics head knows something before round 1.
    first = of(events, "evaluation")[0]
    assert first["round"] == 0 and first["value"] > 0.3
    (plugged,) = of(events, "plugged")
    assert set(plugged["right"]) == {"as-trained", "refit", "mapped", "distil"}
    assert plugged["right"][plugged["method"]] == max(plugged["right"].values())
    assert [e["round"] for e in of(events, "head")] == [0, 2]
    want = ["linear-probe"] if task == "tokens" or "image" in task else ["linear-probe", "tf-idf"]
    assert [e["name"] for e in of(events, "baseline")] == want

    cfg = config.from_flat(flat)
    assert inspect(cfg)["step_ratio"] > 1
    sizes = plansize.describe(cfg)
    (said,) = of(events, "model")
    assert sizes.sub_fm_bytes == said["proxy_bytes"]
    path = tmp_path / "plan.json"
    path.write_text(sizes.to_json())
    assert plansize.read(path) == sizes
    node = tasks.node_config(task, flat, tmp_path)
    text = " ".join(f'{k}="{v}"' for k, v in node.items())
    found = {f.name: f for f in check(Options(text, plan=path))}
    assert not [f for f in found.values() if f.status == FAIL], found
    assert found["data"].status == found["training step"].status == PASS, found

    client = client_for(node, flat)
    assert client.count_rows() == (90, 0)


@pytest.mark.parametrize("task", ["regress", "multi-label", "tokens"])
def test_the_partition_does_not_change_the_start(task: str, tmp_path: Path) -> None:
    """However rows are shared out, round 1 begins with the same head but for rounding."""
    flat = tasks.write(task, tmp_path) | {
        "federation.rounds": 1, "distill.steps": 2, "align.interval": 0, "lora.dropout": 0.0,
        "head.start": "statistics", "train.lr": 1e-30, "wire.adapter": "fp32",
        "plug.refit": "none",
    }  # fmt: skip
    heads = []
    for scheme in ("iid", "dirichlet", "shards"):
        tiny.run(flat | {"federation.partition": scheme}, tmp_path / scheme)
        stored = load_file(tmp_path / scheme / "adapter" / "adapter_model.safetensors")
        heads.append({k: t for k, t in stored.items() if "classifier" in k})
    assert heads[0]
    for other in heads[1:]:
        for name, t in heads[0].items():
            torch.testing.assert_close(t, other[name], rtol=1e-3, atol=1e-4)


def test_the_product_is_an_ordinary_adapter(tmp_path: Path) -> None:
    """A number predictor answers in the unit of the file, loaded without this package."""
    flat = tasks.write("regress", tmp_path) | SHORT | {"run.baselines": False}
    tiny.run(flat, tmp_path / "run")
    fm = transformers.AutoModelForSequenceClassification.from_pretrained(
        flat["model.name"], num_labels=1
    )
    model = PeftModel.from_pretrained(fm, tmp_path / "run" / "adapter").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(flat["model.name"])
    texts = [row["text"] for row in tasks.rows("regress", 40, 1)]
    with torch.no_grad():
        found = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0]
    assert 10 < float(found.mean()) < 20  # labels are 13, 16 and 19


@pytest.mark.parametrize("task", ["regress", "multi-label", "tokens"])
def test_clients_send_what_the_score_needs_and_no_more(task: str, tmp_path: Path) -> None:
    from fedpft_core.wire.envelope import open_envelope
    from fedpft_core.wire.messages import TrainReply

    flat = tasks.write(task, tmp_path) | SHORT | {
        "run.baselines": False, "plug.method": "as-trained", "head.end": "trained",
    }  # fmt: skip
    federation = tiny.Federation(flat)
    plain = federation.client

    def holding_back(index: int) -> Any:
        client = plain(index)
        client.validation_share = 0.4
        counts = client.count_rows()[0]
        from client_app.rows import split_sizes
        from client_app.simulated import partition_rows

        cfg = config.from_flat(federation.flat)
        sizes = split_sizes(partition_rows(cfg, index, federation.count), 0.4)
        assert sum(sizes) == counts
        client.count_rows = lambda: sizes
        return client

    federation.client = holding_back  # type: ignore[method-assign]
    events = tiny.run(flat, tmp_path / "run", federation)
    scored = of(events, "client_validation")
    assert scored and all(e["metric"] == METRICS[task][0] for e in scored)
    replies = [open_envelope(e) for _, e in federation.received]
    sent = [r.validation_sums for r in replies if isinstance(r, TrainReply)]
    assert sent and all(len(sums) < 9 for sums in sent)
    assert all(e["status"] == "ok" for e in of(events, "reply")), of(events, "reply")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["pair-regress", "tokens"])
def test_two_real_nodes_and_one_with_another_task(task: str, tmp_path: Path) -> None:
    """Through Flower's processes: each node reads its own file as its node config says."""
    flat = tasks.write(task, tmp_path) | SHORT | {
        "data.train": "", "run.gradient-rows": 0, "run.baselines": False, "run.threads": 1,
        "federation.clients": 3, "federation.clients-per-round": 3, "federation.min-clients": 2,
        "federation.node-timeout": 60.0, "data.validation-share": 0.0,
        "data.validation": str(tmp_path / "test.jsonl"), "train.lr": 1e-3, "federation.rounds": 3,
    }  # fmt: skip
    conf = flower.write_config(tmp_path / "run.yaml", config.to_tree(flat))
    run = tmp_path / "run"
    with flower.deployment(tmp_path / "flower") as d:
        for seed, name in enumerate(("node-a", "node-b", "node-c"), start=5):
            rows = tasks.rows(task, 40, seed)
            file = d.folder / f"{name}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            more = tasks.node_config(task, flat, d.folder)
            del more["name"], more["data-path"]
            more |= {"cache-dir": str(d.folder / f"cache-{name}"), "validation-share": 0.3}
            if name == "node-c":  # numbers are names for a class, and lists are no text
                more["task"] = "classify"
            d.start_node(name, file, **more)
        cli = d.run(run, conf)
        assert cli.wait(500) == 0, d.logs()
    events = flower.events(run)
    good = {e["client"] for e in of(events, "reply") if e["status"] == "ok"}
    assert good == {"node-a", "node-b"}
    scored = of(events, "client_validation")
    assert scored and {e["metric"] for e in scored} == {METRICS[flat["data.task"]][0]}
    last = [e for e in of(events, "evaluation") if e["model"] == "fm"][-1]
    assert last["value"] > 0.3
    assert (run / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"data.task": "regress"}, r"data.task is 'regress', but builtin:docstrings has one class"),
        ({"data.label-separator": ""}, "data.label-separator is empty"),
        ({"data.task": "poem"}, "data.task: expected one of"),
        ({"data.task": "tokens", "data.text-pair-column": "b"}, "data.task = tokens has lists"),
        ({"data.task": "tokens", "data.image-column": "b"}, "data.task = tokens has lists"),
    ],
)
def test_settings_that_fit_no_task_are_refused(keys: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_task(config.from_flat(keys).data, 0)


def test_a_node_says_which_task_its_rows_are_for(tmp_path: Path) -> None:
    flat = tasks.write("regress", tmp_path, 20)
    node = tasks.node_config("regress", flat, tmp_path)
    assert len(client_for(node, {}).load_rows(make("text-regression"))) == 20
    with pytest.raises(UserError, match="rows are for text-regression, but the server's task is p"):
        client_for(node, {}).load_rows(make("pair", ("a", "b")))
    with pytest.raises(UserError, match=r"task = 'poem' is none of classify, regress"):
        client_for(node | {"task": "poem"}, {})
    with pytest.raises(UserError, match="label-separator is empty"):
        client_for(node | {"label-separator": ""}, {})
    with pytest.raises(UserError, match="task = tokens has lists of words"):
        client_for(node | {"task": "tokens", "text-pair-column": "b"}, {}).count_rows()
