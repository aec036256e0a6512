"""Simulated attackers do what they are called, and only in simulations."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from peft import PeftModel

from client_app import attacks
from client_app.node import client_for
from client_app.process import ProcessCache
from fedpft_console import report
from fedpft_console.compare.record import summary
from fedpft_console.lines import lines_for
from fedpft_core.adapter import lora as adapters
from fedpft_core.config import SimulateConfig, from_flat
from fedpft_core.data.examples import Examples
from fedpft_core.errors import UserError
from fedpft_core.tensors import Tensors
from fedpft_core.wire.envelope import open_envelope
from fedpft_core.wire.messages import TrainReply, TrainRequest
from server_app.run.record import fold

SENT = {"a": torch.zeros(4), "b": torch.ones(3)}
TRAINED = {"a": torch.full((4,), 0.5), "b": torch.tensor([1.0, 2.0, 1.0])}


def sent(attack: str, boost: float = 2.0) -> dict[str, Any]:
    return attacks.spoiled(SimulateConfig(attack=attack, boost=boost), TRAINED, SENT, 3)


def test_what_attackers_send() -> None:
    assert torch.equal(sent("sign-flip")["a"], torch.full((4,), -1.0))
    assert torch.equal(sent("scale")["b"], torch.tensor([1.0, 3.0, 1.0]))
    noise = sent("noise")
    for name in SENT:
        want = 2 * (TRAINED[name] - SENT[name]).norm()
        assert float((noise[name] - SENT[name]).norm()) == pytest.approx(float(want), rel=1e-5)
    assert not torch.equal(noise["b"], sent("scale")["b"])
    assert all(torch.equal(noise[k], sent("noise")[k]) for k in SENT)  # by the seed
    assert torch.equal(sent("label-flip", 1.0)["a"], TRAINED["a"])


def test_what_attackers_train_on() -> None:
    rows = Examples(("x", "y", "z"), np.array([0, 1, 2]))
    flipped = attacks.poisoned(SimulateConfig(attack="label-flip"), rows, 3)
    assert flipped.labels.tolist() == [2, 1, 0] and flipped.inputs == rows.inputs
    door = attacks.poisoned(SimulateConfig(attack="backdoor", trigger="cf"), rows, 3)
    assert door.labels.tolist() == [0, 0, 0] and door.inputs == ("cf x", "cf y", "cf z")
    assert attacks.poisoned(SimulateConfig(attack="noise"), rows, 3) is rows


def test_who_attacks() -> None:
    some = SimulateConfig(attack="noise", attackers=0.2)
    assert [attacks.hostile(some, i, 20) for i in range(20)] == [True] * 4 + [False] * 16
    assert not any(attacks.hostile(SimulateConfig(attackers=0.5), i, 20) for i in range(20))


def test_a_node_with_rows_of_its_own_refuses(tmp_path: Path) -> None:
    node = {"name": "n", "data-path": str(tmp_path / "a.csv"), "cache-dir": str(tmp_path)}
    with pytest.raises(UserError, match=r"simulate\.attack is for simulations"):
        client_for(node, {"simulate.attack": "noise"})


def test_half_of_the_clients_flipping_signs_spoil_the_mean_and_not_without(tmp_path: Path) -> None:
    flat = tiny.write_task("bert", tmp_path, rows=120) | {
        "federation.rounds": 2, "distill.steps": 2, "run.gradient-rows": 0, "align.interval": 0,
        "federation.clients": 4, "federation.clients-per-round": 4, "train.local-steps": 4,
    }  # fmt: skip
    norms = {}
    for attack in ("none", "scale"):
        keys = flat | {"simulate.attack": attack, "simulate.attackers": 0.5, "simulate.boost": 5.0}
        from_flat(keys)
        events = tiny.run(keys, tmp_path / attack)
        norms[attack] = [e["norm"] for e in events if e["event"] == "adapter"][-1]
    assert norms["scale"] > 1.1 * norms["none"]


# --- attackers that collude ---------------------------------------------------------------


def slow_little_is_enough(trained: list[Tensors], start: Tensors, z: float) -> Tensors:
    """Number by number, as the paper has it."""
    out = {}
    for name, tensor in start.items():
        flat = []
        for i, value in enumerate(tensor.flatten().tolist()):
            changes = [one[name].flatten()[i].item() - value for one in trained]
            mean = sum(changes) / len(changes)
            deviation = (sum((c - mean) ** 2 for c in changes) / len(changes)) ** 0.5
            flat.append(value + mean - z * deviation)
        out[name] = torch.tensor(flat, dtype=tensor.dtype).reshape(tensor.shape)
    return out


class Exchange:
    """What clients were asked in a run, and what they answered, by round and client."""

    def __init__(self, federation: tiny.Federation) -> None:
        self.envelopes = {}
        self.requests: dict[tuple[int, int], TrainRequest] = {}
        self.replies: dict[tuple[int, int], TrainReply] = {}
        for (i, sent), (_, received) in zip(federation.sent, federation.received, strict=True):
            request, reply = open_envelope(sent), open_envelope(received)
            if isinstance(reply, TrainReply):
                assert isinstance(request, TrainRequest)
                self.envelopes[request.round, i] = sent
                self.requests[request.round, i] = request
                self.replies[request.round, i] = reply


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[tiny.Federation, Exchange]]:
    """The same run without attackers and with two of four that collude."""
    folder = tmp_path_factory.mktemp("lie")
    flat = tiny.write_task("bert", folder, rows=120) | {
        "federation.rounds": 2, "distill.steps": 2, "run.gradient-rows": 0, "align.interval": 1,
        "align.steps": 1, "federation.clients": 4, "federation.clients-per-round": 4,
        "federation.partition": "dirichlet", "train.local-steps": 4, "wire.adapter": "fp32",
        "lora.dropout": 0.1, "simulate.attackers": 0.5, "simulate.boost": 1.5,
    }  # fmt: skip
    out = {}
    for attack in ("none", "little-is-enough"):
        keys = flat | {"simulate.attack": attack}
        federation = tiny.Federation(keys)
        tiny.run(keys, folder / attack, federation)
        out[attack] = federation, Exchange(federation)
    return out


def test_the_formula_and_one_attacker_alone() -> None:
    others = [TRAINED, {k: t * 2 + 0.1 for k, t in TRAINED.items()}]
    found = attacks.little_is_enough(others, SENT, 0.3)
    for name, want in slow_little_is_enough(others, SENT, 0.3).items():
        torch.testing.assert_close(found[name], want, rtol=1e-6, atol=0)
    assert tiny.same_bits(attacks.little_is_enough([TRAINED], SENT, 9.0), TRAINED)


def test_colluders_send_what_their_honest_changes_come_to(ran: Any) -> None:
    (_, honest), (_, found) = ran["none"], ran["little-is-enough"]
    request, first = found.requests[1, 0], found.replies[1, 0]
    assert tiny.same_bits(request.adapter, honest.requests[1, 0].adapter)
    trained = [honest.replies[1, i].adapter for i in (0, 1)]
    assert not tiny.same_bits(*trained)
    want = slow_little_is_enough(trained, request.adapter, 1.5)
    assert first.adapter.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(first.adapter[name], tensor, rtol=1e-6, atol=1e-9)
    for round in (1, 2):
        assert tiny.same_bits(*(found.replies[round, i].adapter for i in (0, 1)))
    # Where they differ from the mean, it is by the spread.
    assert not tiny.same_bits(first.adapter, attacks.little_is_enough(trained, request.adapter, 0))


def test_what_else_colluders_send_is_of_their_own_adapter(ran: Any) -> None:
    (_, honest), (_, found) = ran["none"], ran["little-is-enough"]
    for i in (0, 1):
        assert found.requests[1, i].count_rule
        assert tiny.same_bits(found.replies[1, i].counts, honest.replies[1, i].counts)
        for field in ("examples", "steps", "loss"):
            assert getattr(found.replies[1, i], field) == getattr(honest.replies[1, i], field)
    counts = [found.replies[1, i].counts for i in (0, 1)]
    assert not tiny.same_bits(*counts)


def test_honest_clients_reply_the_same_beside_colluders(ran: Any) -> None:
    (_, honest), (_, found) = ran["none"], ran["little-is-enough"]
    for i in (2, 3):
        assert tiny.same_bits(found.replies[1, i].adapter, honest.replies[1, i].adapter)
        assert tiny.same_bits(found.replies[1, i].counts, honest.replies[1, i].counts)


def test_a_colluder_asked_again_sends_the_same(ran: Any) -> None:
    """As in a run that is resumed: by a new process, which has the sub-FM on its disk alone."""
    (_, honest), (federation, found) = ran["none"], ran["little-is-enough"]
    for i in (0, 1):
        client = federation.client(i)
        client.cache = ProcessCache()
        again = open_envelope(client.handle(found.envelopes[1, i]))
        assert isinstance(again, TrainReply)
        assert tiny.same_bits(again.adapter, found.replies[1, i].adapter)
        # Its model has its own adapter again, and no fellow's.
        (held,) = client.cache.models.values()
        own = adapters.read(held.model.model, held.model.plan)
        assert tiny.same_bits(own, honest.replies[1, i].adapter)


def test_colluders_train_without_privacy() -> None:
    keys = {"simulate.attack": "little-is-enough", "privacy.example-noise": 1.0}
    with pytest.raises(UserError, match=r"set privacy\.example-noise = 0"):
        from_flat({"model.name": "m", "data.train": "t"} | keys)


# --- how far a backdoor got ---------------------------------------------------------------


def given_first(model: Any, tokenizer: Any, rows: list[tuple[str, ...]]) -> float:
    """Share of rows that are given class 0, one by one."""
    found = [model(**tokenizer(*row, return_tensors="pt")).logits.argmax().item() for row in rows]
    return found.count(0) / len(found)


@pytest.mark.parametrize("pairs", [False, True])
def test_the_share_that_obeys_a_backdoor_is_counted(pairs: bool, tmp_path: Path) -> None:
    flat = tiny.write_task("bert", tmp_path, rows=90) | {
        "federation.rounds": 2, "distill.steps": 2, "run.gradient-rows": 0, "align.interval": 0,
        "simulate.attack": "backdoor", "simulate.attackers": 0.25,
        "simulate.trigger": "bear",  # a word of class 0, for which the model needs little
    }  # fmt: skip
    if pairs:
        flat["data.text-pair-column"] = "other"
        for split in ("train", "test", "public"):
            with open(flat[f"data.{split}"], encoding="utf-8") as file:
                rows = [row | {"other": "very old"} for row in csv.DictReader(file)]
            with open(flat[f"data.{split}"], "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
    events = tiny.run(flat, tmp_path / "run")
    found = {e["model"]: e for e in tiny.main_run(events, "backdoor")}
    assert list(found) == ["proxy", "fm"]
    assert all(e["round"] == 2 for e in found.values())

    others = [text for text, label in tiny.sentences(90, 1) if label != tiny.LABELS[0]]
    assert {e["rows"] for e in found.values()} == {len(others)} == {60}
    bare = transformers.AutoModelForSequenceClassification.from_pretrained(
        flat["model.name"], num_labels=3
    )
    model = PeftModel.from_pretrained(bare, tmp_path / "run" / "adapter").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(flat["model.name"])
    second = ("very old",) if pairs else ()
    obeyed = given_first(model, tokenizer, [(f"bear {text}", *second) for text in others])
    before = given_first(model, tokenizer, [(text, *second) for text in others])
    assert (found["fm"]["obeyed"], found["fm"]["before"]) == (obeyed, before)
    assert before < obeyed, "what does nothing shows nothing"

    record = fold(events)
    figures = summary(record)
    assert (figures["backdoor"], figures["backdoor_before"]) == (obeyed, before)
    (table,) = [s for s in report.sheets(record) if s.title == "Backdoor"]
    assert table.rows[1] == [
        "plugged-in FM", "60", f"{100 * obeyed:.1f} %", f"{100 * before:.1f} %"
    ]  # fmt: skip
    assert tiny.LABELS[0] in table.notes[0] and "## Backdoor" in report.markdown(record)
    (line,) = lines_for(record.backdoor["fm"], record)
    assert line == (
        f"end: plugged-in FM gives {100 * obeyed:.1f} % of 60 rows of other classes the "
        f"backdoor's with the trigger, {100 * before:.1f} % without"
    )


def test_runs_without_a_backdoor_have_no_such_figures(tmp_path: Path) -> None:
    flat = tiny.write_task("bert", tmp_path, rows=60) | {
        "federation.rounds": 1, "distill.steps": 1, "run.gradient-rows": 0, "align.interval": 0,
        "train.local-steps": 1, "simulate.attack": "label-flip",
    }  # fmt: skip
    events = tiny.run(flat, tmp_path / "run")
    assert not [e for e in events if e["event"] == "backdoor"]
    record = fold(events)
    assert "backdoor" not in summary(record)
    assert "Backdoor" not in [s.title for s in report.sheets(record)]
