"""Whole runs in this process: load, distil, federate, align, export, resume."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file

from fedpft_core import config
from fedpft_core.adapter import lora as adapters
from fedpft_core.data.encoding import encode
from fedpft_core.errors import RunError, UserError
from fedpft_core.model import load as models
from fedpft_core.model.plan import Plan
from fedpft_core.task import load_task, make
from fedpft_core.task.classify import logits
from fedpft_core.train.evaluate import evaluate
from fedpft_core.wire.envelope import open_envelope, seal
from fedpft_core.wire.messages import RefusalReply
from server_app.run.events import event_of, line_of
from server_app.run.schema import KINDS

CHANCE = 1 / 3
ADAPTER = "adapter/adapter_model.safetensors"
# What a clock or a folder name decides; all else must be the same in two equal runs.
_FREE = {
    *("t", "seconds", "train_seconds", "exchange_seconds", "evaluate_seconds", "overhead_seconds"),
    *("timings", "peak_rss_bytes", "run_dir", "paths", "resumed_from", "bytes"),
}


@dataclass
class Done:
    """A finished run and what it left."""

    flat: dict[str, Any]
    folder: Path
    events: list[dict[str, Any]]
    federation: tiny.Federation

    def of(self, name: str) -> list[dict[str, Any]]:
        return tiny.main_run(self.events, name)

    def scores(self, model: str) -> list[float]:
        return [
            e["value"]
            for e in self.of("evaluation")
            if e["model"] == model and e["split"] == "test"
        ]

    @property
    def adapter(self) -> bytes:
        return (self.folder / ADAPTER).read_bytes()


def go(flat: dict[str, Any], folder: Path, **keys: Any) -> Done:
    federation = tiny.Federation(flat)
    events = tiny.run(flat, folder, federation, **keys)
    return Done(federation.flat, folder, events, federation)


@pytest.fixture(scope="module", params=["bert", "vit"])
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A run with everything switched on: baselines, distillation, two alignments possible."""
    path = tmp_path_factory.mktemp(request.param)
    flat = tiny.write_task(request.param, path)
    keys = {"run.baselines": True, "run.undistilled": True}
    return go(flat | keys, path / "run")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A quick task for runs whose accuracy is of no interest."""
    quick = {
        "distill.steps": 4,
        "align.steps": 3,
        "align.interval": 1,
        "train.local-epochs": 1,
        "federation.rounds": 3,
    }
    return tiny.write_task("bert", tmp_path_factory.mktemp("text"), rows=90) | quick


@pytest.fixture(scope="module")
def through(text: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Done:
    """The quick task from beginning to end, to compare others with."""
    return go(text, tmp_path_factory.mktemp("through"))


def kind_of(done: Done) -> str:
    return "image" if "data.image-column" in done.flat else "text"


# --- what a run achieves ------------------------------------------------------------------


def test_both_models_learn_the_task(done: Done) -> None:
    for model in ("proxy", "fm"):
        scores = done.scores(model)
        assert len(scores) == 5  # before round 1 and after each of 4
        assert scores[-1] > 0.9 > 2 * CHANCE, scores
        losses = [e["loss"] for e in done.of("evaluation") if e["model"] == model]
        assert losses[-1] < 0.4 * losses[0]


def test_a_side_run_leaves_no_trace(text: dict[str, Any], through: Done, tmp_path: Path) -> None:
    """The federation on the undistilled sub-FM must not hand its adapter to the main run."""
    on = config.from_flat(through.flat).run.undistilled
    other = go(text, tmp_path / "run", run__undistilled=not on)
    assert other.adapter == through.adapter


def test_the_exported_adapter_makes_the_untouched_fm_the_plugged_in_fm(done: Done) -> None:
    """Loaded the way a user would, by transformers and PEFT alone."""
    import transformers

    auto: Any = (
        transformers.AutoModelForSequenceClassification
        if kind_of(done) == "text"
        else transformers.AutoModelForImageClassification
    )
    cfg = config.from_flat(done.flat)
    torch.manual_seed(123)  # another random head than the run's
    untouched = auto.from_pretrained(cfg.model.name, num_labels=3)
    product = PeftModel.from_pretrained(untouched, str(done.folder / "adapter")).eval()

    loaded = models.load(cfg.model, make(kind_of(done), tiny.LABELS).model(), cfg.run.seed)
    plan = Plan.from_json((done.folder / "plan.json").read_text())
    spec = adapters.make_spec(loaded.family, plan, loaded.fresh, cfg.lora)
    plugged_in = adapters.attach(loaded.model, spec)
    stored = load_file(done.folder / ADAPTER)
    adapters.load(plugged_in, {k.removeprefix("base_model.model."): v for k, v in stored.items()})
    batch = tiny.batch_of("bert" if kind_of(done) == "text" else "vit")
    with torch.no_grad():
        assert torch.equal(logits(product, batch), logits(plugged_in, batch))

    task = load_task(cfg.data, cfg.run.seed)
    rows = encode(task.test, loaded.processor, cfg.data.max_length)
    score = evaluate(product, task.task, rows, cfg.run.eval_batch_size)
    last = [e for e in done.of("evaluation") if e["model"] == "fm" and e["split"] == "test"][-1]
    assert (score.value, score.loss) == (last["value"], last["loss"])


def test_only_the_head_of_the_exported_adapter_is_not_the_last_rounds_average(
    text: dict[str, Any], through: Done, tmp_path: Path
) -> None:
    as_trained = go(text, tmp_path / "run", plug__refit="none")
    always = go(text, tmp_path / "always", plug__refit="validation")
    last = as_trained.of("adapter")[-1]
    stored, refitted = (load_file(x.folder / ADAPTER) for x in (as_trained, always))
    assert adapters.norm(stored) == last["norm"] == through.of("adapter")[-1]["norm"]
    other = {k for k, t in stored.items() if not torch.equal(t, refitted[k])}
    assert other and all("classifier" in k for k in other)
    assert as_trained.scores("fm")[1:] == through.scores("fm-as-trained")  # not before round 1
    assert not as_trained.of("refit") and not as_trained.scores("fm-as-trained")
    # By default the better of the two heads is taken, by the labels of the validation rows.
    for event in through.of("refit"):
        assert event["taken"] == (event["score_after"] > event["score_before"])
    taken = through.of("refit")[-1]["taken"]
    assert through.adapter == (always if taken else as_trained).adapter


def test_refitting_brings_the_features_together(done: Done) -> None:
    found = done.of("refit")
    assert [e["round"] for e in found] == [1, 2, 3, 4, 4]  # each scored round, and the export
    assert all(e["error_after"] < e["error_before"] for e in found)
    assert found[-2]["error_after"] == found[-1]["error_after"]


def test_without_validation_rows_the_head_stays_as_trained(
    text: dict[str, Any], tmp_path: Path
) -> None:
    run = go(text, tmp_path / "run", data__validation_share=0.0, data__validation="")
    assert not run.of("refit")
    assert any("plugged in as trained" in e["text"] for e in run.of("warning"))
    public = go(text, tmp_path / "public", plug__refit="public", data__validation_share=0.0)
    assert public.of("refit")[-1]["source"] == "public"


def test_distillation_and_alignment_lower_the_output_error(done: Done) -> None:
    (distilled,) = done.of("distilled")
    before, after = (distilled[k].values() for k in ("error_before", "output_error"))
    assert sum(after) < sum(before)
    for event in done.of("alignment"):
        blocks = event["blocks"]
        assert [b["block"] for b in blocks] == [1, 2]
        assert sum(b["error_after"] for b in blocks) < sum(b["error_before"] for b in blocks)
        assert event["digest_from"] != event["digest_to"]


def test_changed_weights_reach_the_clients_as_patches(done: Done) -> None:
    (alignment,) = done.of("alignment")
    assert alignment["round"] == 2
    asked = [open_envelope(e) for _, e in done.federation.sent if e.kind == "train"]
    main = [m for m in asked if m.digest in (alignment["digest_from"], alignment["digest_to"])]
    assert {m.digest for m in main if m.round <= 2} == {alignment["digest_from"]}
    assert {m.digest for m in main if m.round > 2} == {alignment["digest_to"]}
    down = {
        (e["round"], e["kind"]): e["bytes"] for e in done.of("bytes") if e["direction"] == "down"
    }
    assert down[3, "patch"] > 0
    assert (2, "patch") not in down
    assert down[3, "patch"] < down[1, "package"]


def test_reference_points_are_scored(done: Done) -> None:
    names = {e["name"]: e["value"] for e in done.events if e["event"] == "baseline"}
    want = {"majority-class", "linear-probe", "undistilled"} | (
        {"tf-idf"} if kind_of(done) == "text" else set()
    )
    assert set(names) == want
    assert names["linear-probe"] > 0.9


# --- events -------------------------------------------------------------------------------


def test_every_line_is_of_the_schema(done: Done) -> None:
    """What is written is what the classes say, and is read back as it was meant."""
    for line in done.events:
        event = event_of(line)
        assert event is not None, line
        unknown = set(line) - {"t", "event", "arm"} - {f.name for f in fields(event)}
        assert not unknown, line
        # Lists of blocks are plain mappings, whose keys are written down beside the classes.
        hint = get_type_hints(type(event)).get("blocks")
        known = get_args(hint)[0].__annotations__ if hint else {}
        assert all(set(entry) == set(known) for entry in line.get("blocks", [])), line
        again = json.loads(json.dumps(line_of(event)))
        assert again == {k: v for k, v in line.items() if k not in ("t", "arm")}


def test_a_whole_run_emits_every_event_that_is_not_about_trouble(done: Done) -> None:
    seen = {e["event"] for e in done.events}
    optional = {"warning", "waiting", "run_failed", "alignment_check", "client_validation"}
    optional |= {"head", "plugged"}  # of options that are off by default; see test_heads.py
    optional |= {"joined", "merged"}  # of other schedules; see whole/test_schedules.py
    optional |= {"aggregated"}  # of rules with figures of their own; see test_lora_rules.py
    optional |= {"privacy"}  # of privacy.client-noise; see test_private_runs.py
    optional |= {"samples"}  # of generation; see whole/test_generation.py
    optional |= {"check", "stopped"}  # of federation.early-stopping; see test_early.py
    # of several sub-FMs; see test_widths.py
    optional |= {"widths", "width_given", "width_distilled", "width_scored", "width_agreement"}
    optional |= {"guarded"}  # of head.guard; see test_head_guard.py
    optional |= {"backdoor"}  # of simulate.attack=backdoor; see client_app/test_attacks.py
    optional |= {"pictures"}  # of text-to-image; see whole/test_pictures.py
    assert len(KINDS) > 15
    assert set(KINDS) - seen <= optional
    assert done.events[0]["event"] == "run_started"
    assert done.events[-1]["event"] == "run_finished"
    assert all(e["status"] == "ok" for e in done.of("reply"))


def test_phases_are_closed_in_order(done: Done) -> None:
    open_phases: list[str] = []
    for event in done.events:
        if event["event"] == "phase_started":
            open_phases.append(event["phase"])
        elif event["event"] == "phase_finished":
            assert open_phases.pop() == event["phase"]
            assert event["seconds"] >= 0
    assert not open_phases


# --- alignment ----------------------------------------------------------------------------


@pytest.mark.parametrize(("interval", "want"), [(1, [1, 2]), (2, [2]), (3, []), (4, []), (0, [])])
def test_alignment_fires_exactly_when_due(
    interval: int, want: list[int], text: dict[str, Any], tmp_path: Path
) -> None:
    done = go(text, tmp_path, align__interval=interval, run__gradient_rows=0)
    assert [e["round"] for e in done.of("alignment")] == want
    with_counts = {
        open_envelope(e).round for _, e in done.federation.received if "counts" in e.parts
    }
    assert with_counts == set(want)
    assert len(done.of("round_finished")) == 3


def test_where_every_neuron_moves_no_client_counts(text: dict[str, Any], tmp_path: Path) -> None:
    done = go(text, tmp_path, align__interval=1, align__proportion=1.0)
    assert not any("counts" in e.parts for _, e in done.federation.received)
    neurons = sum(b["neurons"] for b in done.of("model")[0]["blocks"] if b["kind"] == "pruned")
    assert [e["neurons"] for e in done.of("alignment")] == [neurons] * 2


def test_alignment_records_the_gap_before_and_after(through: Done) -> None:
    """Against the evaluations of its round; afterwards only the sub-FM has changed."""
    scores = {(e["round"], e["model"]): e["value"] for e in through.of("evaluation")}
    found = through.of("alignment")
    assert found
    for e in found:
        fm = scores[e["round"], "fm"]
        assert e["gap_before"] == scores[e["round"], "proxy"] - fm
        right = (e["gap_after"] + fm) * 90  # of 90 test rows
        assert abs(right - round(right)) < 1e-6


@pytest.mark.parametrize("measure", ["cosine", "relative-l2", "output-error"])
def test_a_threshold_aligns_only_where_disagreement_is_above_it(
    measure: str, text: dict[str, Any], tmp_path: Path
) -> None:
    """Below every measured value it always fires, above each it never does."""
    keys = {"align__disagreement": measure, "federation__rounds": 4, "align__steps": 2}
    low = go(text, tmp_path / "low", align__threshold=1e-9, **keys)
    checks = low.of("alignment_check")
    assert [e["round"] for e in checks] == [1, 2, 3]
    assert [e["round"] for e in low.of("alignment")] == [1, 2, 3]
    assert {e["measure"] for e in checks} == {measure}
    first = checks[0]["value"]
    agreed = {e["round"]: e for e in low.of("agreement") if e["when"] == "before-align"}
    if measure == "output-error":
        blocks = low.of("alignment")[0]["blocks"]
        want = sum(b["error_before"] for b in blocks) / len(blocks)
    else:
        want = 1 - agreed[1]["cosine"] if measure == "cosine" else agreed[1]["relative_l2"]
    assert first == pytest.approx(want)

    high = go(text, tmp_path / "high", align__threshold=1e9, **keys)
    assert not high.of("alignment") and len(high.of("alignment_check")) == 3
    assert not any(e["aligned"] for e in high.of("alignment_check"))
    # The first check is the same whatever the threshold; just below and just above its value.
    for factor, fires in ((1 - 1e-6, True), (1 + 1e-6, False)):
        folder = tmp_path / f"at{fires}"
        done = go(text, folder, align__threshold=first * factor, **keys | {"federation__rounds": 2})
        assert [e["aligned"] for e in done.of("alignment_check")] == [fires]
        assert len(done.of("alignment")) == fires


def test_a_threshold_on_gradients_needs_rows_to_measure_them_on() -> None:
    for keys, sentence in (
        ({"run.gradient-rows": 0}, r"align\.threshold = 0\.1 .* needs run\.gradient-rows"),
    ):
        with pytest.raises(UserError, match=sentence):
            config.from_flat({"align.threshold": 0.1} | keys)
    config.from_flat(
        {"align.threshold": 0.1, "align.disagreement": "output-error", "run.gradient-rows": 0}
    )


def test_without_a_threshold_nothing_is_checked(through: Done) -> None:
    assert not through.of("alignment_check") and through.of("alignment")


@pytest.mark.parametrize("method", ["closed-form", "block-local+sgd"])
def test_other_alignments_before_and_during(
    method: str, text: dict[str, Any], tmp_path: Path
) -> None:
    keys = {"distill__method": method, "align__method": method, "distill__fit_batches": 3}
    done = go(text, tmp_path, **keys)
    (distilled,) = done.of("distilled")
    assert sum(distilled["output_error"].values()) < sum(distilled["error_before"].values())
    assert [e["round"] for e in done.of("alignment")] == [1, 2]
    assert all(e["status"] == "ok" for e in done.of("reply"))


def test_alignment_takes_its_own_adapter_noise(text: dict[str, Any], tmp_path: Path) -> None:
    same, none, other = (
        go(text, tmp_path / name, distill__adapter_noise=0.02, federation__rounds=2, **keys)
        for name, keys in (
            ("same", {}),
            ("none", {"align__adapter_noise": 0.0}),
            ("equal", {"align__adapter_noise": 0.02}),
        )
    )
    assert same.adapter == other.adapter != none.adapter


@pytest.mark.parametrize("selection", ["apoz", "active", "random", "discrepancy"])
def test_only_the_chosen_share_travels(
    selection: str, text: dict[str, Any], tmp_path: Path
) -> None:
    keys = {"align__proportion": 0.25, "align__selection": selection, "federation__rounds": 2}
    done = go(text, tmp_path, run__gradient_rows=0, **keys)
    (alignment,) = done.of("alignment")
    assert alignment["neurons"] == 2 * 3  # a quarter of 12 kept neurons in each of 2 blocks
    (patch,) = {
        p.target: p
        for _, e in done.federation.sent
        if e.kind == "train"
        for p in open_envelope(e).patches
    }.values()
    assert {k: len(v) for k, v in patch.tensors.items() if k.endswith("/index")} == {
        "1/index": 3,
        "2/index": 3,
    }


# --- the same run again -------------------------------------------------------------------


def _comparable(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The main run's events from the first round on, without clocks, traffic and progress."""
    names = {"evaluation", "round_started", "round_finished", "adapter", "alignment", "agreement"}
    return [{k: v for k, v in e.items() if k not in _FREE} for e in events if e["event"] in names]


@pytest.mark.parametrize("stop", [1, 2])
def test_a_resumed_run_equals_an_uninterrupted_one(
    stop: int, text: dict[str, Any], through: Done, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=f"stopped after round {stop}"):
        go(text, tmp_path / "stopped", run__stop_after=stop)
    assert not (tmp_path / "stopped" / ADAPTER).exists()
    torch.manual_seed(77)
    resumed = go(text, tmp_path / "stopped", run__resume=True)
    assert resumed.adapter == through.adapter
    assert _comparable(resumed.events) == _comparable(through.events)
    starts = resumed.of("run_started")
    assert [e["resumed_from"] for e in starts] == [None, stop]
    assert not resumed.of("run_failed")
    rounds = {open_envelope(e).round for _, e in resumed.federation.sent if e.kind == "train"}
    assert rounds == set(range(stop + 1, 4))


def test_the_same_seed_gives_the_same_run(
    text: dict[str, Any], through: Done, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    again = go(text, tmp_path / "again")
    assert again.adapter == through.adapter
    assert _comparable(again.events) == _comparable(through.events)
    other = go(text, tmp_path / "other", run__seed=1, federation__rounds=1)
    assert other.of("adapter")[0]["norm"] != through.of("adapter")[0]["norm"]


# --- other settings of the same pipeline --------------------------------------------------


def test_layer_drop_run(text: dict[str, Any], tmp_path: Path) -> None:
    done = go(text, tmp_path, plan__proxy="layer-drop", plan__drop_to=2)
    assert not done.of("distilled") and not done.of("alignment")
    plan = Plan.from_json((tmp_path / "plan.json").read_text())
    assert plan.present == (0, 3)
    stored = load_file(tmp_path / ADAPTER)
    blocks = {m[1] for k in stored if (m := re.search(r"layer\.(\d+)\.", k))}
    assert blocks == {"0", "3"}
    cfg = config.from_flat(done.flat)
    untouched = models.load(cfg.model, tiny.TASK.model(), 9)
    product = PeftModel.from_pretrained(untouched.model, str(tmp_path / "adapter")).eval()
    rows = encode(load_task(cfg.data, 0).test, untouched.processor, cfg.data.max_length)
    last = [e for e in done.of("evaluation") if e["model"] == "fm" and e["split"] == "test"][-1]
    assert evaluate(product, tiny.TASK, rows, cfg.run.eval_batch_size).loss == last["loss"]


def test_clients_that_hold_the_fm(text: dict[str, Any], tmp_path: Path) -> None:
    done = go(text, tmp_path, plan__proxy="full")
    assert not done.of("distilled") and not done.of("alignment") and not done.of("agreement")
    by_round: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for e in done.of("evaluation"):
        by_round.setdefault((e["round"], e["split"]), []).append((e["value"], e["loss"]))
    assert all(proxy == fm for proxy, fm in by_round.values()), "proxy and FM are one model"


def test_distilled_layer_drop_run_resumes(text: dict[str, Any], tmp_path: Path) -> None:
    """Whole blocks were trained: package, checkpoint and resume must carry all of them."""
    keys = {"plan__proxy": "layer-drop", "plan__drop_to": 3}
    whole = go(text, tmp_path / "whole", **keys)
    (distilled,) = whole.of("distilled")
    assert list(distilled["output_error"]) == ["1"] or list(distilled["output_error"]) == ["2"]
    assert sum(distilled["output_error"].values()) < sum(distilled["error_before"].values())
    with pytest.raises(RunError, match="stopped after round 1"):
        go(text, tmp_path / "stopped", run__stop_after=1, **keys)
    resumed = go(text, tmp_path / "stopped", run__resume=True, **keys)
    assert resumed.adapter == whole.adapter
    plain = go(text, tmp_path / "plain", distill__method="none", **keys)
    assert not plain.of("distilled") and plain.adapter != whole.adapter


def test_local_only_is_the_mean_of_federations_of_one(text: dict[str, Any], tmp_path: Path) -> None:
    keys = {"align__interval": 0, "run__eval_split": "test"}
    local = go(text, tmp_path / "local", federation__aggregate="none", **keys)
    assert local.of("run_started")[0]["method"] == "local-only"
    arms = {e["arm"] for e in local.events if e["event"] == "round_started"}
    assert len(arms) == 3
    scores: dict[str, list[float]] = {"proxy": [], "fm": []}
    for index in range(4):
        if f"client-{index}" not in arms:
            continue

        class One(tiny.Federation):
            """The same four partitions, of which one client is there."""

            def transport(self, index: int = index) -> Any:
                from server_app.transport import LocalTransport

                return LocalTransport({index + 1: partial(self._answer, index)})

        alone = keys | {"federation__clients_per_round": 1, "federation__min_clients": 1}
        federation = One(text)
        events = tiny.run(text, tmp_path / f"one{index}", federation, **alone)
        for which, found in scores.items():
            last = [e for e in tiny.main_run(events, "evaluation") if e["model"] == which][-1]
            found.append(last["value"])
    ends = {e["model"]: e["value"] for e in local.of("evaluation") if e["round"] == 3}
    for which, found in scores.items():
        assert ends[which] == pytest.approx(sum(found) / 3, abs=1e-12)
    assert {e["model"] for e in local.of("validation")} == {"proxy", "fm"}
    assert not (tmp_path / "local" / ADAPTER).exists()


def test_one_shot_and_centralised_run(text: dict[str, Any], tmp_path: Path) -> None:
    shot = go(
        text, tmp_path / "shot", federation__schedule="one-shot", federation__rounds=1,
        federation__clients_per_round=4, train__local_steps=6,
    )  # fmt: skip
    assert shot.of("run_started")[0]["method"] == "one-shot fedpft"
    assert {e["steps"] for e in shot.of("reply")} == {6} and not shot.of("alignment")
    one = {"federation__clients": 1, "federation__clients_per_round": 1}
    central = go(
        text | {"federation.clients": 1}, tmp_path / "central", plan__proxy="full",
        federation__min_clients=1, **one,
    )  # fmt: skip
    assert central.of("run_started")[0]["method"] == "centralised"
    assert {e["examples"] for e in central.of("reply")} == {central.of("task")[0]["train"]}


def test_methods_are_called_what_their_settings_are() -> None:
    """Each heading of docs/methods.md names the method of the settings below it."""
    import yaml

    text = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    found = re.findall(r"^## (.+?)\n(.*?)(?=^#|\Z)", text, flags=re.M | re.S)
    named = 0
    for heading, body in found:
        block = re.search(r"```yaml\n(.*?)```", body, flags=re.S)
        if block:
            flat = config.flatten(yaml.safe_load(block[1]))
            assert config.method_name(config.from_flat(flat)) == heading
            named += 1
    assert named == 9


def test_a_long_update_is_cut_before_averaging(text: dict[str, Any], tmp_path: Path) -> None:
    keys = {"federation__rounds": 1, "align__interval": 0}
    free, cut, loose = (
        go(text, tmp_path / str(c), federation__clip_update_norm=c, **keys) for c in (0.0, 0.1, 1e3)
    )
    assert free.adapter == loose.adapter != cut.adapter
    moved = []
    for done in (free, cut):
        stored = load_file(done.folder / ADAPTER)
        factors = {k: v for k, v in stored.items() if k.endswith("lora_B.weight")}
        moved.append(adapters.norm(factors))  # B starts at 0
    assert moved[1] <= 0.1 < moved[0]


def test_undistilled_run(text: dict[str, Any], tmp_path: Path) -> None:
    done = go(text, tmp_path, distill__method="none", align__interval=0)
    assert not done.of("distilled")
    assert len(done.scores("fm")) == 4


def test_local_steps(text: dict[str, Any], tmp_path: Path) -> None:
    done = go(text, tmp_path, train__local_steps=2, federation__rounds=1)
    assert {e["steps"] for e in done.of("reply")} == {2}


def test_rates_fall_linearly_over_the_rounds(through: Done) -> None:
    sent = {
        m.round: m.settings.lr
        for _, e in through.federation.sent
        if e.kind == "train" and (m := open_envelope(e))
    }
    assert [sent[r] for r in (1, 2, 3)] == pytest.approx([0.01, 0.02 / 3, 0.01 / 3])


# --- own data -----------------------------------------------------------------------------


def _formats(flat: dict[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """The same rows as CSV, JSON lines and Parquet, under other column names."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    made: dict[str, dict[str, Any]] = {}
    for ending in ("csv", "jsonl", "parquet"):
        keys: dict[str, Any] = {"data.text-column": "sentence", "data.label-column": "kind"}
        for split in ("train", "test", "public"):
            with open(flat[f"data.{split}"], newline="", encoding="utf-8") as file:
                rows = [{"kind": r["label"], "sentence": r["text"]} for r in csv.DictReader(file)]
            path = folder / f"{split}.{ending}"
            if ending == "csv":
                with open(path, "w", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, ["kind", "sentence"])
                    writer.writeheader()
                    writer.writerows(rows)
            elif ending == "jsonl":
                path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
            else:
                pq.write_table(pa.Table.from_pylist(rows), path)
            keys[f"data.{split}"] = str(path)
        made[ending] = keys
    return made


def test_own_data_in_three_formats_gives_the_same_run(
    text: dict[str, Any], through: Done, tmp_path: Path
) -> None:
    for ending, keys in _formats(text, tmp_path).items():
        done = go(text | keys, tmp_path / ending, run__gradient_rows=0)
        assert done.adapter == through.adapter, ending


def test_own_images_in_parquet(tmp_path: Path) -> None:
    """As datasets writes them: a struct of bytes and path; labels as numbers with names given."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    flat = tiny.write_task("deit", tmp_path, rows=90) | {"federation.rounds": 3}
    for split in ("train", "test", "public"):
        table = pq.read_table(flat[f"data.{split}"]).to_pylist()
        rows = [
            {
                "picture": {"bytes": r["image"], "path": None},
                "y": tiny.LABELS.index(r["label"]),
            }
            for r in table
        ]
        pq.write_table(pa.Table.from_pylist(rows), flat[f"data.{split}"])
    keys = {
        "data.image-column": "picture",
        "data.label-column": "y",
        "data.labels": ",".join(tiny.LABELS),
    }
    done = go(flat | keys, tmp_path / "run")
    assert done.of("task")[0]["labels"] == list(tiny.LABELS)
    assert done.scores("fm")[-1] > 0.9


def test_validation_rows_can_be_scored_instead(text: dict[str, Any], tmp_path: Path) -> None:
    done = go(text, tmp_path, run__eval_split="validation", federation__rounds=1)
    assert {e["split"] for e in done.of("evaluation")} == {"validation"}
    assert {e["rows"] for e in done.of("evaluation")} == {done.of("task")[0]["validation"]}


# --- trouble ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"plan__keep_neurons": 25}, "plan.keep-neurons = 25"),
        ({"plan__retained_layers": "7"}, "plan.retained-layers: block 7 is out of range"),
        ({"plan__retained_layers": "x"}, "plan.retained-layers: expected block indices"),
        ({"data__max_length": 99}, "data.max-length = 99"),
        ({"distill__length": 99}, "distill.length = 99"),
    ],
)
def test_bad_settings_stop_the_run_with_one_sentence(
    keys: dict[str, Any], message: str, text: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        go(text, tmp_path, **keys)
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["event"] == "run_failed" and message in last["reason"]


def test_too_few_good_clients_stop_the_run_and_keep_what_is_done(
    text: dict[str, Any], through: Done, tmp_path: Path
) -> None:
    federation = tiny.Federation(text)
    answer = federation._answer

    def dies_in_round_2(index: int, envelope: Any) -> Any:
        if envelope.kind == "train" and open_envelope(envelope).round == 2 and index > 0:
            return seal(RefusalReply(f"client-{index}", "no power"))
        return answer(index, envelope)

    federation._answer = dies_in_round_2  # type: ignore[method-assign]
    with pytest.raises(RunError, match=r"round 2.*federation\.min-clients.*no power"):
        tiny.run(text, tmp_path, federation)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["round-0001"]
    resumed = go(text, tmp_path, run__resume=True)
    assert len(resumed.of("round_finished")) == 3
    assert resumed.adapter == through.adapter
