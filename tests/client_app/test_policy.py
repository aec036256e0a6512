"""What a node's owner does not allow is refused before anything runs, by the name of the rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from client_app import client as client_module
from client_app.app_hash import app_hash
from client_app.client import Client
from client_app.node import NODE_KEYS, checked, client_for
from client_app.policy import KEYS, Policy, table, trained
from client_app.process import ProcessCache
from fedpft_core.errors import UserError
from fedpft_core.model.families import family_of
from fedpft_core.wire.envelope import open_envelope, seal
from fedpft_core.wire.messages import (
    Hello,
    Message,
    RefusalReply,
    StatisticsReply,
    StatisticsRequest,
    TrainReply,
)
from fedpft_core.wire.package import Package

Ask = Callable[..., Any]


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    """What a node with 12 rows and such a policy answers."""
    tiny.write_csv(tmp_path / "rows.csv", [
        ("the cat", tiny.LABELS[i % 2]) for i in range(11)
    ] + [("the dog", tiny.LABELS[2])])  # fmt: skip

    def answer(message: Message, **rules: Any) -> Any:
        node = {"name": "n", "data-path": str(tmp_path / "rows.csv")}
        node |= {"cache-dir": str(tmp_path / "cache")}
        node |= {f"policy-{k.replace('_', '-')}": v for k, v in rules.items()}
        made = client_for(node, {})
        made.cache = ProcessCache()
        return open_envelope(made.handle(seal(message)))

    return answer


def refused(answer: Any, rule: str) -> None:
    assert isinstance(answer, RefusalReply), answer
    assert f"policy-{rule} = " in answer.reason, answer.reason


def statistics(package: Package, adapter: Any) -> StatisticsRequest:
    return StatisticsRequest(
        round=0, digest=package.digest(), adapter=adapter, fmt="fp32", seed=0, width=64,
        batch_size=8, threads=1, package=package.to_bytes(),
    )  # fmt: skip


def with_spec(package: Package, **changes: Any) -> Package:
    """The package with another adapter; what it trains whole is left out of its weights."""
    spec = replace(package.meta.adapter, **changes)
    weights = {k: t for k, t in package.weights.items() if not k.startswith(tuple(spec.modules))}
    return Package(replace(package.meta, adapter=spec), package.files, weights)


@pytest.mark.parametrize("modules", [
    ("classifier", "bert.embeddings"), ("bert.embeddings.word_embeddings", "classifier"),
    ("bert.encoder.layer.0", "classifier"), ("bert",),
    ("bert.encoder.layer.1.output.dense", "classifier"),
])  # fmt: skip
def test_a_package_that_trains_more_than_adapter_and_head_is_refused(
    ask: Ask, request_for: Any, sub_fm: Any, modules: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    """A row's words could be read off the change of the embeddings."""

    def never(*_: Any) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr(client_module, "rebuild", never)
    package = with_spec(sub_fm[0], modules=modules)
    refused(ask(request_for(package)), "adapter")
    assert not list((tmp_path / "cache" / "store").glob("*"))  # nor is it kept


def test_lora_on_other_layers_is_refused(ask: Ask, request_for: Any, sub_fm: Any) -> None:
    package = with_spec(sub_fm[0], targets=("bert.encoder.layer.0.intermediate.dense",))
    refused(ask(request_for(package)), "adapter")
    refused(ask(request_for(), adapter="lora"), "adapter")
    refused(ask(request_for(), max_rank=1), "max-rank")


def test_the_rules_refuse_by_name(ask: Ask, request_for: Any, sub_fm: Any) -> None:
    good = request_for()
    assert isinstance(ask(good), TrainReply)
    settings = good.settings
    refused(ask(good, families="vit"), "families")
    refused(ask(good, min_rows=13), "min-rows")
    one = replace(good, settings=replace(settings, batch_size=1, steps=1))
    assert isinstance(ask(one), TrainReply)
    refused(ask(one, min_rows=2), "min-rows")  # one row is looked at, however many there are
    refused(ask(one, min_step_rows=4), "min-step-rows")
    refused(ask(good, min_step_rows=13), "min-step-rows")
    refused(ask(replace(good, settings=replace(settings, steps=10**6)), max_steps=100),
            "max-steps")  # fmt: skip
    epochs = replace(good, settings=replace(settings, steps=0, epochs=50))
    refused(ask(epochs, max_steps=100), "max-steps")
    refused(ask(replace(good, count_rule="nonpositive"), leave="adapter"), "leave")
    assert isinstance(ask(good, leave="adapter"), TrainReply)
    asked = statistics(*sub_fm)
    refused(ask(asked, leave="adapter,counts"), "leave")
    refused(ask(asked, min_class_rows=2), "min-class-rows")
    assert not isinstance(ask(asked), RefusalReply)
    refused(ask(good, leave="statistics"), "leave")
    assert isinstance(ask(good, max_mb=1), TrainReply)


def slopes(package: Package, adapter: Any, weight: float = 0.0) -> StatisticsRequest:
    """A request for the slope at a head of equal weights."""
    classes, width = adapter["classifier.weight"].shape
    head = {
        "weight": torch.full((classes, width), weight, dtype=torch.float64),
        "bias": torch.zeros(classes, dtype=torch.float64),
    }
    return replace(statistics(package, adapter), head=head)


def test_slopes_leave_where_the_owner_lets_them(ask: Ask, sub_fm: Any) -> None:
    asked = slopes(*sub_fm)
    assert isinstance(ask(asked), StatisticsReply)
    refused(ask(asked, leave="adapter,counts,statistics"), "leave")
    refused(ask(asked, leave="adapter,slopes"), "leave")
    refused(ask(asked, min_class_rows=2), "min-class-rows")
    wide = {k: torch.cat([t, t]) for k, t in asked.head.items()}
    answer = ask(replace(asked, head=wide))
    assert isinstance(answer, RefusalReply) and "type or shape" in answer.reason


def test_a_message_that_is_too_large_is_not_opened(
    ask: Ask, request_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("it was opened")

    monkeypatch.setattr(client_module, "open_envelope", never)
    big = request_for(package=None)
    refused(ask(replace(big, package=bytes(2 * 10**6)), max_mb=1), "max-mb")


def test_the_rule_of_today_holds_for_what_was_stored_before(
    ask: Ask, request_for: Any, sub_fm: Any
) -> None:
    package = with_spec(sub_fm[0], targets=("bert.encoder.layer.0.intermediate.dense",))
    whole = request_for(package)
    ask(whole, adapter="any")
    refused(ask(replace(whole, package=b"")), "adapter")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_this_program_sends_is_allowed(family: str) -> None:
    from fedpft_core.adapter.lora import make_spec
    from fedpft_core.config import LoraConfig

    model = tiny.model(family)
    plan = tiny.plan_for(model, keep_share=0.5)
    spec = make_spec(family_of(family), plan, (), LoraConfig())
    meta: Any = type("Meta", (), {"plan": plan, "adapter": spec})
    assert {part for part, _ in trained(spec, family_of(family), meta)} == {"lora", "head"}
    Policy().check_package(meta)


def test_a_pooler_without_trained_weights_belongs_to_the_head(sub_fm: Any) -> None:
    spec = replace(sub_fm[0].meta.adapter, modules=("classifier", "bert.pooler"))
    Policy().check_package(replace(sub_fm[0].meta, adapter=spec))


@pytest.mark.parametrize(("key", "value"), [
    ("policy-adapter", "embeddings"), ("policy-families", "gpt7"), ("policy-leave", "rows"),
    ("policy-min-rows", -1), ("policy-min-rows", "3"), ("policy-unknown", 1),
])  # fmt: skip
def test_a_rule_that_is_none_is_refused_with_its_key(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=key):
        checked({"name": "n", "data-path": "x.csv", key: value})


def test_every_rule_is_a_key_and_shown() -> None:
    assert {k for k in NODE_KEYS if k.startswith("policy-")} == set(KEYS)
    shown = table(Policy())
    assert [row[0] for row in shown] == list(KEYS)
    assert shown[0][:2] == ("policy-adapter", "lora,head")


@pytest.mark.parametrize(("field", "value"), [
    ("threads", 0), ("threads", -1), ("threads", 10**6), ("batch_size", 0), ("steps", -1),
    ("lr", float("nan")), ("lr", -1.0), ("clip", -1.0), ("head_lr_scale", float("inf")),
])  # fmt: skip
def test_work_that_cannot_be_done_is_refused_before_a_model_is_built(
    request_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, value: Any
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr(client_module, "rebuild", never)
    from client_app.store import Store

    node = Client("n", lambda: (3, 0), lambda task: tiny.examples("bert", 3), Store(tmp_path),
                  cache=ProcessCache())  # fmt: skip
    request = request_for()
    request = replace(request, settings=replace(request.settings, **{field: value}))
    answer = open_envelope(node.handle(seal(request)))
    assert isinstance(answer, RefusalReply) and field in answer.reason


@pytest.mark.parametrize("changes", [
    {"attn_implementation": "kernels-community/flash-attn"},
    {"_attn_implementation": "kernels-community/flash-attn"},
    {"experts_implementation": "x/y"}, {"quantization_config": {"quant_method": "gptq"}},
    {"auto_map": {"AutoModel": "x--y.Z"}}, {"num_attention_heads": 0},
    {"num_attention_heads": 3}, {"hidden_size": -4}, {"num_hidden_layers": 10**9},
    {"model_type": "gpt7"}, {"max_position_embeddings": 4},
])  # fmt: skip
def test_a_config_that_makes_no_model_or_reaches_further_is_refused_before_building(
    sub_fm: Any, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    from fedpft_core.errors import ReplyError
    from fedpft_core.proxy.package import rebuild

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("transformers was asked")

    monkeypatch.setattr(transformers.AutoConfig, "for_model", never)
    meta = sub_fm[0].meta
    meta = replace(meta, model_config=meta.model_config | changes)
    with pytest.raises(ReplyError, match="malformed"):
        rebuild(Package(meta, sub_fm[0].files, sub_fm[0].weights))


@pytest.mark.parametrize("name", [
    "C:evil", "con", "NUL.txt", "com1.json", "a:b", "vocab.txt.", "a b", "ä.txt", "x" * 200, "..",
])  # fmt: skip
def test_file_names_that_some_system_would_take_for_more_are_refused(
    sub_fm: Any, name: str
) -> None:
    from fedpft_core.errors import ReplyError

    package = Package(sub_fm[0].meta, {name: b"x"}, sub_fm[0].weights)
    with pytest.raises(ReplyError, match="file name"):
        Package.from_bytes(package.to_bytes())


def test_only_the_code_that_the_owner_has_seen_answers(ask: Ask, sub_fm: Any) -> None:
    package, adapter = sub_fm[0], sub_fm[1]
    asked = statistics(package, adapter)
    assert not isinstance(ask(asked, app_hash=app_hash()), RefusalReply)
    refused(ask(asked, app_hash="ab" * 32), "app-hash")
    with pytest.raises(UserError, match="sha256"):
        Policy.of({"policy-app-hash": "abc"})


def test_the_console_shows_what_a_server_could_ask(capsys: pytest.CaptureFixture[str]) -> None:
    import json

    from fedpft_console.cli import main

    config = 'name="a" data-path="rows.csv" policy-min-rows=100 policy-leave="adapter"'
    assert main(["node", "check", "--node-config", config, "--policy", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["policy-min-rows"] == "100" and shown["policy-leave"] == "adapter"
    assert list(shown) == list(KEYS)


@pytest.mark.parametrize("rule", ["fisher", "gram"])
def test_merging_figures_leave_only_where_the_owner_says_so(
    ask: Ask, request_for: Any, rule: str
) -> None:
    asked = replace(request_for(), merging_rule=rule)
    refused(ask(asked), "leave")
    answer = ask(asked, leave="adapter,merging")
    assert isinstance(answer, TrainReply) and answer.merging
    assert not ask(replace(asked, merging_rule=""), leave="adapter,merging").merging
    odd = ask(replace(asked, merging_rule="rows"), leave="adapter,merging")
    assert isinstance(odd, RefusalReply) and "unknown merging figures 'rows'" in odd.reason


def test_a_node_trains_at_no_more_than_its_rank(
    tmp_path: Path, request_for: Any
) -> None:  # fmt: skip
    tiny.write_csv(tmp_path / "rows.csv", tiny.sentences(12))
    node = {"name": "n", "data-path": str(tmp_path / "rows.csv"), "lora-rank": 1}
    made = client_for(node | {"cache-dir": str(tmp_path / "cache")}, {})
    made.cache = ProcessCache()
    assert open_envelope(made.handle(seal(Hello()))).rank == 1  # type: ignore[union-attr]
    answer = open_envelope(made.handle(seal(request_for())))
    assert isinstance(answer, RefusalReply) and "lora-rank = 1, and rank 2" in answer.reason
    with pytest.raises(UserError, match="lora-rank = -1"):
        checked({"lora-rank": -1})
