"""Text generation from rows to product: whole runs, what clients hold, what PEFT loads."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import flower
import numpy as np
import pytest
import tiny
import torch
import transformers
from peft import PeftModel, PeftModelForCausalLM
from safetensors.torch import load_file

import fedpft_core as fp
from client_app.check.node import FAIL, Options, check
from client_app.node import client_for
from fedpft_core import config
from fedpft_core.data.batches import batches
from fedpft_core.data.chat import PLAIN
from fedpft_core.data.examples import Examples
from fedpft_core.errors import RunError, UserError
from fedpft_core.model.families import FAMILIES
from fedpft_core.proxy import size as plansize
from fedpft_core.proxy.cost import inspect
from fedpft_core.proxy.package import make_package, rebuild
from fedpft_core.task import make
from fedpft_core.wire.package import Package
from server_app.phases.load import load

SHORT = {
    "federation.rounds": 2, "federation.clients": 3, "federation.clients-per-round": 2,
    "run.evaluate-every": 1, "align.interval": 1, "distill.steps": 8, "align.steps": 3,
    "plug.distil-steps": 10, "run.baselines": True, "run.undistilled": True,
    "data.validation-share": 0.2, "run.samples": 3,
}  # fmt: skip


class Silent:
    """Events that nobody reads, but for the warnings."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def emit(self, event: Any) -> None:
        if event.event == "warning":
            self.said.append(event.text)


def of(events: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [e for e in events if e["event"] == name and "arm" not in e]


def pairs_of(node: dict[str, Any]) -> str:
    return " ".join(f"{k}={json.dumps(v)}" for k, v in node.items())


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids).logits
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_run_from_rows_to_product(family: str, tmp_path: Path) -> None:
    flat = tiny.write_dialogues(family, tmp_path) | SHORT
    events = tiny.run(flat, tmp_path / "run")
    assert events[-1]["event"] == "run_finished"
    (task,) = of(events, "task")
    assert (task["kind"], task["metric"], task["higher_is_better"], task["share"]) == (
        "generate", "perplexity", False, False,
    )  # fmt: skip
    scores = {(e["round"], e["model"]): e for e in of(events, "evaluation")}
    for score in scores.values():
        assert set(score["more"]) == {"exact match", "ROUGE-L"} and score["error"] > 0
    # Before round 1 the FM is as it came, which is what zero-shot means.
    named = {e["name"]: e for e in of(events, "baseline")}
    assert named["zero-shot"]["value"] == scores[0, "fm"]["value"]
    assert scores[2, "fm"]["value"] < 0.7 * scores[0, "fm"]["value"]
    assert scores[2, "proxy"]["value"] < 0.7 * scores[0, "proxy"]["value"]
    assert named["undistilled"]["value"] != scores[2, "fm"]["value"]
    # No head: nothing was asked of the clients for one, and the plug-in chose between two.
    assert not of(events, "head") and not of(events, "refit")
    (plugged,) = of(events, "plugged")
    assert set(plugged["losses"]) == {"as-trained", "distil"}
    assert plugged["losses"][plugged["method"]] == min(plugged["losses"].values())
    written = of(events, "samples")
    assert {e["model"] for e in written} == {"proxy", "fm", "fm-as-trained"}
    assert len({tuple(s["prompt"] for s in e["samples"]) for e in written}) == 1
    assert all(len(e["samples"]) == 3 for e in written)
    assert len(of(events, "alignment")) == 1
    check_product(tmp_path / "fm", tmp_path / "run" / "adapter", scores[2, "fm"])


def check_product(fm: Path, adapter: Path, score: dict[str, Any]) -> None:
    """PEFT takes the adapter for the vanilla model, and the library's pipeline writes with it."""
    bare = transformers.AutoModelForCausalLM.from_pretrained(fm)
    before = tiny.weights(bare)
    plugged = PeftModel.from_pretrained(bare, adapter).eval()
    assert isinstance(plugged, PeftModelForCausalLM)
    saved = load_file(adapter / "adapter_model.safetensors")
    assert saved and all("lora_" in name for name in saved)
    assert json.loads((adapter / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    made = transformers.AutoTokenizer.from_pretrained(adapter)
    text = made.apply_chat_template(
        [{"role": "user", "content": "the cat"}], tokenize=False, add_generation_prompt=True
    )
    pipe = transformers.pipeline("text-generation", model=plugged, tokenizer=made)
    (out,) = pipe(text, max_new_tokens=5, do_sample=False)
    assert out["generated_text"].startswith(text)
    kept = tiny.weights(plugged.unload())
    assert all(torch.equal(kept[name], value) for name, value in before.items())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_product_is_the_fm_that_was_scored(family: str, tmp_path: Path) -> None:
    """The vanilla model with the exported adapter has the logits of the server's FM, to the bit
    where the server changed nothing of how the model computes."""
    flat = tiny.write_dialogues(family, tmp_path) | SHORT | {"run.undistilled": False}
    flat |= {"federation.rounds": 1, "plug.method": "as-trained"}
    tiny.run(flat, tmp_path / "run")
    cfg = config.from_flat(flat)
    bench = load(cfg, Silent())  # type: ignore[arg-type]
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    adapter = {k.removeprefix("base_model.model."): t for k, t in saved.items()}
    bench.models.plug(adapter)
    bare = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fm")
    plugged = PeftModel.from_pretrained(bare, tmp_path / "run" / "adapter")
    ids = torch.randint(5, len(tiny.vocabulary()), (3, 9))
    torch.testing.assert_close(
        logits(plugged, ids), logits(bench.models.fm, ids), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_clients_get_tied_weights_once_and_the_same_logits(family: str, tmp_path: Path) -> None:
    """Also in another process, from the bytes alone."""
    flat = tiny.write_dialogues(family, tmp_path)
    sizes = {}
    for name, tied in ((str(tmp_path / "apart"), False), (str(tmp_path / "tied"), True)):
        made = tiny.vanilla_writer(family, tie_word_embeddings=tied)
        same = made.get_output_embeddings().weight is made.get_input_embeddings().weight
        assert same == tied
        made.save_pretrained(name)
        tiny.writer_tokenizer().save_pretrained(name)
        bench = load(config.from_flat(flat | {"model.name": name}), Silent())  # type: ignore[arg-type]
        m = bench.models
        package = make_package(
            m.proxy, m.plan, m.spec, bench.rows.processor, "generate", (), 24
        )  # fmt: skip
        data = package.to_bytes()
        table = m.proxy.get_base_model().get_input_embeddings().weight.detach()
        assert data.count(table.numpy().tobytes()) == 1
        sizes[name] = sum(t.numel() for t in package.weights.values())
        again = Package.from_bytes(data)
        assert again.digest() == package.digest()
        client = rebuild(again)
        client.model.load_state_dict(m.proxy.state_dict())  # the adapter, which travels apart
        fresh = rebuild(again)
        ids = torch.randint(5, len(tiny.vocabulary()), (2, 7))
        with m.proxy.disable_adapter(), fresh.model.disable_adapter():
            assert torch.equal(logits(m.proxy, ids), logits(fresh.model, ids))
        assert torch.equal(logits(m.proxy, ids), logits(client.model, ids))
    (tmp_path / "package").write_bytes(data)
    torch.save(ids, tmp_path / "ids")
    code = (
        "import sys, torch; from fedpft_core.proxy.package import rebuild;"
        "from fedpft_core.wire.package import Package; from pathlib import Path;"
        "p = Path(sys.argv[1]); m = rebuild(Package.from_bytes((p / 'package').read_bytes()));\n"
        "with torch.no_grad(), m.model.disable_adapter():"
        " print(m.model(input_ids=torch.load(p / 'ids')).logits.double().sum().item().hex())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    with m.proxy.disable_adapter():
        assert done.stdout.split()[-1] == float(logits(m.proxy, ids).double().sum()).hex()
    untied, once = sizes.values()
    shape = FAMILIES[family].shape(made.config)
    assert untied - once == shape.vocabulary * shape.hidden


def test_chats_and_texts_of_nodes_own(tmp_path: Path) -> None:
    """Nodes with files of their own: conversations at both, and rows kept for validation."""
    flat = tiny.write_dialogues("llama", tmp_path) | SHORT | {"data.messages-column": "messages"}
    flat |= {"run.undistilled": False, "data.response-column": ""}
    flat |= {"federation.clients": 2}
    nodes = []
    for name, seed, rows in (("train", 0, 30), ("test", 1, 20), ("a", 2, 40), ("b", 3, 30)):
        file = tmp_path / f"{name}.jsonl"
        chats = [
            [
                {"role": "user", "content": p}, {"role": "assistant", "content": r},
                {"role": "user", "content": "the cat"}, {"role": "assistant", "content": "seen"},
            ]
            for p, r in tiny.dialogues(rows, seed)
        ]  # fmt: skip
        file.write_text("\n".join(json.dumps({"messages": c}) for c in chats), encoding="utf-8")
        if len(name) == 1:
            nodes.append({
                "name": name, "data-path": str(file), "messages-column": "messages",
                "cache-dir": str(tmp_path / f"cache-{name}"), "validation-share": 0.3,
            })  # fmt: skip
        else:
            flat[f"data.{name}"] = str(file)
    flat["data.train"] = ""
    flat["data.validation"] = str(tmp_path / "train.jsonl")

    class Edge(tiny.Federation):
        def client(self, index: int) -> Any:
            made = client_for(nodes[index], {})
            made.cache = self.caches[index]
            return made

    events = tiny.run(flat, tmp_path / "run", Edge(flat))
    assert events[-1]["event"] == "run_finished"
    found = of(events, "client_validation")
    assert len(found) == 2 and all(e["value"] > 1 and e["error"] is None for e in found)
    assert all(e["metric"] == "perplexity" and e["rows"] > 5 for e in found)
    findings = check(Options(pairs_of(nodes[0])))
    assert not [f for f in findings if f.status == FAIL], findings
    assert any("40 rows, " in f.text for f in findings if f.name == "data")


def test_a_node_with_rows_for_another_task_says_so(tmp_path: Path) -> None:
    flat = tiny.write_dialogues("llama", tmp_path) | SHORT
    flat |= {"federation.clients": 2, "federation.attempts": 1}
    data = tiny.write_csv(tmp_path / "labels.csv", tiny.sentences(20))

    class Wrong(tiny.Federation):
        def client(self, index: int) -> Any:
            node = {"name": f"n{index}", "data-path": str(data), "cache-dir": str(tmp_path / "c")}
            return client_for(node, {})

    with pytest.raises(RunError, match="this node's rows are for"):
        tiny.run(flat | {"run.undistilled": False}, tmp_path / "run", Wrong(flat))


def test_inspection_and_sizes_know_language_models(tmp_path: Path) -> None:
    flat = tiny.write_dialogues("llama", tmp_path)
    cfg = config.from_flat(flat)
    assert inspect(cfg)["step_ratio"] > 1
    size = plansize.describe(cfg)
    assert size.meta.kind == "generate" and size.labels == ()
    (tmp_path / "size.json").write_text(size.to_json(), encoding="utf-8")
    again = plansize.read(tmp_path / "size.json")
    node = {
        "name": "n", "data-path": flat["data.train"], "text-column": "prompt",
        "response-column": "response", "cache-dir": str(tmp_path / "cache"),
    }  # fmt: skip
    assert again.meta == size.meta
    findings = check(Options(pairs_of(node), plan=tmp_path / "size.json"))
    assert not [f for f in findings if f.status == FAIL], findings
    assert any("rows of full length" in f.text for f in findings)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model.name": "bert"}, "a bert model writes no text"),
        ({"data.max-length": 4}, "leaves nothing of the responses"),
        ({"data.prompt-template": "no place"}, r"data\.prompt-template is 'no place'"),
        ({"data.response-column": "answer"}, "no column named 'answer'"),
        ({"data.train": "builtin:docstrings", "data.test": ""}, "needs files of its own"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(
    change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    flat = tiny.write_dialogues("llama", tmp_path)
    if change.get("model.name") == "bert":
        change = {"model.name": str(tiny.folder("bert", tmp_path / "bert"))}
    if "data.max-length" in change:
        with open(flat["data.test"], "w", newline="", encoding="utf-8") as out:
            csv.writer(out).writerows([("prompt", "response"), ("the very big old cat", "one")])
    with pytest.raises(UserError, match=reason):
        load(config.from_flat(flat | change), Silent())  # type: ignore[arg-type]


def test_what_was_cut_and_set_is_said(tmp_path: Path) -> None:
    flat = tiny.write_dialogues("llama", tmp_path) | {"data.max-length": 9, "data.max-bad-rows": 20}
    silent = Silent()
    load(config.from_flat(flat), silent)  # type: ignore[arg-type]
    assert sum("chat template" in text for text in silent.said) == 1
    assert sum("40 rows are longer than" in text for text in silent.said) == 1
    assert not any("head" in text for text in silent.said)


@pytest.mark.slow
def test_generation_under_flower(tmp_path: Path) -> None:
    """`fedpft run` in simulation, then the product."""
    flat = tiny.write_dialogues("llama", tmp_path) | SHORT | {"run.undistilled": False}
    config.write_yaml(tmp_path / "run.yaml", flat)
    run = tmp_path / "run"
    done = subprocess.run(
        [str(flower.BIN / "fedpft"), "run", "--quiet", "--config", str(tmp_path / "run.yaml"),
         "--run-dir", str(run)],
        env=flower.environment(tmp_path / "flwr"), capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    log: Any = flower.events(run)
    assert of(log, "run_finished")
    last = [e for e in log if e["event"] == "evaluation"][-1]
    check_product(tmp_path / "fm", run / "adapter", last)
    assert "## Samples" in (run / "report.md").read_text(encoding="utf-8")


def test_the_library_takes_language_models(tmp_path: Path) -> None:
    """Plan, proxy, distillation, adapter without a head, tuning, plug-in: no Flower."""
    fm = tiny.writer("llama")
    made = tiny.writer_tokenizer()
    made.chat_template = PLAIN
    rows = Examples(tuple(tiny.dialogues(24)), np.zeros(24))
    served = list(batches(make("generate").encode(rows, made, 24), 8, None))
    plan = fp.make_plan(fm, keep_share=0.5, saliency="gradient", batches=served)
    proxy = fp.build_proxy(fm, plan)
    fp.distil(fm, proxy, plan, served, steps=3)
    fm, proxy = fp.attach(fm, plan, rank=2), fp.attach(proxy, plan, rank=2)
    assert all(".lora_" in k for k, p in proxy.named_parameters() if p.requires_grad)
    before = fp.tune(proxy, served, lr=1e-6).loss
    for _ in range(3):
        fp.tune(proxy, served, lr=2e-2)
    assert fp.tune(proxy, served, lr=1e-6).loss < before
    product = fp.plug_in(proxy, fm, plan)
    fp.export(product, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    assert set(fp.gradient_agreement(product, proxy, plan, served)) >= {"cosine"}
    with pytest.raises(UserError, match="no head to refit"):
        fp.plug_in(proxy, fm, plan, batches=served)
