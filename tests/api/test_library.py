"""The library's face: what `import fedpft_core` offers, on models and batches as people have."""

from __future__ import annotations

import copy
import doctest
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from peft import PeftModel

import fedpft_core as fp
from fedpft_core import api, config
from fedpft_core.adapter import lora
from fedpft_core.align import method as alignment
from fedpft_core.data.batches import batches
from fedpft_core.errors import UserError
from fedpft_core.model.families import FAMILIES, supported
from fedpft_core.proxy import build, choose
from fedpft_core.train import agreement
from fedpft_core.train.tune import LocalSettings, fine_tune

ROOT = Path(__file__).parents[2]
NAMES = (
    "Plan", "attach", "build_proxy", "distil", "export", "gradient_agreement", "make_plan",
    "plug_in", "tune",
)  # fmt: skip
families = pytest.mark.parametrize("family", tiny.BUILDS)


def labelled(family: str, rows: int = 24, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    return list(batches(tiny.encoded(family, rows, seed), 8, None))


def attached(family: str = "bert", **more: Any) -> tuple[PeftModel, PeftModel, fp.Plan]:
    fm = tiny.vanilla(family)
    plan = fp.make_plan(fm, **more)
    proxy = fp.build_proxy(fm, plan)
    return fp.attach(fm, plan, rank=2), fp.attach(proxy, plan, rank=2), plan


def test_importing_it_imports_nothing_heavy() -> None:
    program = (
        "import sys, json; import fedpft_core; print(json.dumps([dir(fedpft_core), "
        "[m for m in ('torch', 'transformers', 'peft', 'numpy', 'flwr') if m in sys.modules], "
        "fedpft_core.Plan.__name__, 'torch' in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    names, heavy, plan, after = json.loads(done.stdout)
    assert heavy == []
    assert set(NAMES) <= set(names)
    assert plan == "Plan" and after  # so the look at sys.modules does see torch once it is used


def test_the_names_it_offers() -> None:
    assert tuple(fp.__all__) == NAMES
    for name in NAMES:
        assert getattr(fp, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'distill'"):
        fp.distill  # noqa: B018


def test_the_examples_of_the_docstrings_run() -> None:
    """The module's own example comes first and makes the model; the others continue it."""
    found = {t.name: t for t in doctest.DocTestFinder().find(api) if t.examples}
    module = api.__name__
    order = [module, *(f"{module}.{n}" for n in (
        "make_plan", "build_proxy", "distil", "attach", "tune", "plug_in", "export",
        "gradient_agreement",
    ))]  # fmt: skip
    assert set(found) == set(order), "an example is not run"
    runner, names = doctest.DocTestRunner(), {}
    for name in order:
        test = found[name]
        test.globs = names
        runner.run(test, clear_globs=False)
    assert runner.summarize(verbose=False).failed == 0


def test_the_page_runs_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/library.md, on the real MiniLM."""
    page = ROOT / "docs" / "library.md"
    code = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    assert len(code) >= 7
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for part in code:
        exec(compile(part, str(page), "exec"), names)
    assert names["done"].last_loss < names["done"].first_loss
    assert names["accuracy"](names["product"]) > 0.6  # three classes, alike in number
    said = capsys.readouterr().out
    plugged, again = (re.search(rf"{w} (\d\.\d+)", said) for w in ("of the FM", "loaded again:"))
    assert plugged and again and plugged[1] == again[1]


def test_defaults_are_those_of_the_keys() -> None:
    keys = config.keys()
    other = {"batches", "seed", "on_step", "modules_to_save"}
    sections = {"make_plan": "plan", "distil": "distill", "attach": "lora", "plug_in": "plug"}
    checked = 0
    for name, section in sections.items():
        for p in inspect.signature(getattr(fp, name)).parameters.values():
            if p.kind is p.KEYWORD_ONLY and p.name not in other:
                assert p.default == keys[f"{section}.{p.name.replace('_', '-')}"].default, p
                checked += 1
    tune = inspect.signature(fp.tune).parameters
    for key in ("lr", "weight_decay", "clip"):
        assert tune[key].default == keys[f"train.{key.replace('_', '-')}"].default
    # A run's head begins in closed form; here it begins as the model was loaded, and is heard late.
    assert tune["head_lr_scale"].default == 10 * keys["train.head-lr-scale"].default
    assert checked == 15


@families
def test_plan_and_proxy_are_those_of_a_run(family: str) -> None:
    fm = tiny.model(family)
    before = tiny.weights(fm)
    plan = fp.make_plan(fm, keep_share=0.5, retained_layers=[0, -1])
    keys = config.PlanConfig(keep_share=0.5, retained_layers="first,last")
    assert plan == choose.make_plan(fm, keys, seed=0)
    proxy = fp.build_proxy(fm, plan)
    assert tiny.same_bits(tiny.weights(proxy), tiny.weights(build.build(fm, plan)))
    assert tiny.same_bits(before, tiny.weights(fm))


def test_a_saliency_that_reads_data_takes_the_batches() -> None:
    fm = tiny.model("bert")
    public = tiny.public("bert", 3)
    plan = fp.make_plan(fm, saliency="activation", batches=public)
    keys = config.PlanConfig(saliency="activation")
    assert plan == choose.make_plan(fm, keys, 0, lambda: public)
    with pytest.raises(UserError, match="needs public rows"):
        fp.make_plan(fm, saliency="activation")


@families
@pytest.mark.parametrize("method", ["sgd", "closed-form+sgd"])
def test_distilling_is_a_runs_distilling(family: str, method: str) -> None:
    fm = tiny.model(family)
    plan = fp.make_plan(fm)
    ours, theirs = fp.build_proxy(fm, plan), fp.build_proxy(fm, plan)
    public = tiny.public(family, 80)
    fp.distil(fm, ours, plan, iter(public), method=method, steps=5, seed=3)
    settings = config.DistillConfig(method=method, steps=5)
    alignment.run(method, alignment.Job(
        fm, theirs, plan, lambda n: iter(public[:n]), settings, 5, settings.lr, settings.alpha,
        seed=3,
    ))  # fmt: skip
    assert tiny.same_bits(tiny.weights(ours), tiny.weights(theirs))
    assert not tiny.same_bits(tiny.weights(ours), tiny.weights(fp.build_proxy(fm, plan)))


def test_distilling_serves_few_batches_again_and_reports_steps() -> None:
    fm = tiny.model("bert")
    plan = fp.make_plan(fm)
    proxy, other = fp.build_proxy(fm, plan), fp.build_proxy(fm, plan)
    public = tiny.public("bert", 2)
    seen = []
    fp.distil(fm, proxy, plan, public, steps=5, on_step=lambda i, n, loss: seen.append((i, n)))
    assert seen == [(i, 5) for i in range(1, 6)]
    fp.distil(fm, other, plan, [*public, *public, public[0]], steps=5)
    assert tiny.same_bits(tiny.weights(proxy), tiny.weights(other))


def test_nothing_to_distil() -> None:
    fm = tiny.model("bert")
    plan = fp.make_plan(fm, proxy="full")
    assert fp.distil(fm, fp.build_proxy(fm, plan), plan, []) == api.Distilled(0.0, 0.0, 0.0)


@families
@pytest.mark.parametrize("kind", ["ffn-pruned", "layer-drop", "full"])
def test_adapters_of_both_start_equal_and_leave_the_logits_alone(family: str, kind: str) -> None:
    fm = tiny.model(family)
    batch = {k: v for k, v in tiny.batch_of(family).items() if k not in ("labels", "index")}
    with torch.no_grad():
        before = fm(**batch).logits
    plan = fp.make_plan(fm, proxy=kind)
    proxy = fp.build_proxy(fm, plan)
    fm, proxy = fp.attach(fm, plan, rank=2, seed=5), fp.attach(proxy, plan, rank=2, seed=5)
    assert tiny.same_bits(lora.read(fm), lora.read(proxy, plan))
    with torch.no_grad():
        assert torch.equal(before, fm(**batch).logits)


def test_further_modules_are_trained_whole() -> None:
    fm = tiny.model("bert")
    plan = fp.make_plan(fm)
    proxy = fp.attach(fp.build_proxy(fm, plan), plan, modules_to_save=["bert.pooler"])
    assert "bert.pooler.dense.weight" in lora.read(proxy, plan)
    with pytest.raises(UserError, match="no module 'pooler'"):
        fp.attach(fm, plan, modules_to_save=["pooler"])


@families
@pytest.mark.parametrize(("epochs", "steps"), [(2, 0), (1, 4)])
def test_tuning_is_a_clients_tuning(family: str, epochs: int, steps: int) -> None:
    """A shuffling loader is imitated by the very batches a client would draw."""
    from fedpft_core.train.tune import local_batches

    _, proxy, plan = attached(family)
    twin = copy.deepcopy(proxy)
    data = tiny.encoded(family, 24)
    settings = LocalSettings(1e-2, 8, epochs, steps, 0.01, 1.0, 1, 10.0)
    want = fine_tune(twin, tiny.TASK, data, settings, seed=4)
    drawn = list(local_batches(data, settings, 4))
    got = fp.tune(proxy, drawn, epochs=1, steps=steps, lr=1e-2, weight_decay=0.01, clip=1.0, seed=4)
    assert tiny.same_bits(lora.read(proxy, plan), lora.read(twin, plan))
    assert (got.loss, got.steps, got.rows) == (want.loss, want.steps, want.rows)


def test_a_loader_is_gone_through_once_an_epoch() -> None:
    _, proxy, _ = attached()
    rows = labelled("bert")

    class Loader:
        times = 0

        def __iter__(self) -> Any:
            self.times += 1
            return iter(rows)

    loader = Loader()
    assert fp.tune(proxy, loader, epochs=3).steps == 9
    assert loader.times == 3
    assert fp.tune(proxy, iter(rows), epochs=2).steps == 6
    assert fp.tune(proxy, rows, steps=7).steps == 7


def test_a_tokenizers_own_batches_will_do() -> None:
    fm, proxy, plan = attached()
    batch = tiny.tokenizer("bert")(["the cat", "two"], padding=True, return_tensors="pt")
    assert type(batch) is not dict
    fp.distil(fm, proxy, plan, [batch], steps=2)
    batch["labels"] = torch.tensor([0, 1])
    assert fp.tune(proxy, [batch]).rows == 2


@families
@pytest.mark.parametrize("kind", ["ffn-pruned", "layer-drop"])
def test_plugging_in_gives_a_peft_adapter_of_the_fm(family: str, kind: str, tmp_path: Path) -> None:
    bare = tiny.vanilla(family)
    fm, proxy, plan = attached(family, proxy=kind)
    rows = labelled(family)
    fp.tune(proxy, rows, epochs=2)
    before = lora.read(proxy, plan)
    assert fp.plug_in(proxy, fm, plan) is fm
    assert tiny.same_bits(lora.read(fm), before)
    fp.export(fm, tmp_path / "new", base_name="somewhere")
    loaded = PeftModel.from_pretrained(bare, str(tmp_path / "new"))
    batch = {k: v for k, v in rows[0].items() if k not in ("labels", "index")}
    with torch.no_grad():
        found, want = loaded(**batch).logits, fm(**batch).logits
        if FAMILIES[family].fused:  # a product in parts may round otherwise
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(found, want)
    assert tiny.same_bits(lora.read(proxy, plan), before)


def test_the_head_is_refitted_where_batches_are_given() -> None:
    fm, proxy, plan = attached()
    fp.tune(proxy, labelled("bert"), epochs=2)
    unlabelled = tiny.public("bert", 4)
    assert all("labels" not in b for b in unlabelled)
    fp.plug_in(proxy, fm, plan, batches=unlabelled)
    same = {k for k, t in lora.read(fm).items() if torch.equal(t, lora.read(proxy, plan)[k])}
    changed = set(lora.read(fm)) - same
    assert changed == {"classifier.weight", "classifier.bias"}

    def right() -> int:
        return sum(
            int((fm(**{k: v for k, v in b.items() if k not in ("labels", "index")}).logits
                 .argmax(-1) == b["labels"]).sum())
            for b in labelled("bert")
        )  # fmt: skip

    fp.plug_in(proxy, fm, plan)
    as_tuned, tensors = right(), lora.read(fm)
    fp.plug_in(proxy, fm, plan, batches=labelled("bert"))
    if tiny.same_bits(lora.read(fm), tensors):
        assert right() == as_tuned
    else:
        assert right() > as_tuned


@families
def test_agreement_is_a_runs_agreement(family: str) -> None:
    fm, proxy, plan = attached(family)
    data = tiny.encoded(family, 12)
    rows = list(batches(data, 5, None))
    fp.tune(proxy, rows)
    fp.plug_in(proxy, fm, plan)
    want = agreement.gradient_agreement(fm, proxy, plan, tiny.TASK, data, 5, b_only=False)
    assert fp.gradient_agreement(fm, proxy, plan, iter(rows)) == want
    assert abs(want["cosine"]) < 1


# What a person can mend is one sentence.


def test_an_unsupported_family_is_named_with_those_supported() -> None:
    model = transformers.GPTNeoForSequenceClassification(
        transformers.GPTNeoConfig(
            hidden_size=16, num_layers=2, num_heads=2, vocab_size=50, num_labels=2,
            attention_types=[[["global"], 2]],
        )
    )  # fmt: skip
    with pytest.raises(UserError, match=f"'gpt_neo' is not supported; .*{supported()}"):
        fp.make_plan(model)
    with pytest.raises(UserError, match="A Linear is not supported"):
        fp.make_plan(torch.nn.Linear(2, 2))


def test_a_model_without_its_head_is_refused() -> None:
    body = tiny.model("bert").bert
    with pytest.raises(UserError, match=r"A BertModel has no bert\.encoder\.layer: take the model"):
        fp.make_plan(body)


def test_a_plan_of_another_model_is_refused() -> None:
    fm = tiny.model("bert")
    plan = fp.make_plan(fm)
    for other, why in (
        (tiny.model("vit"), "The plan is for a bert model, but this one is a vit"),
        (tiny.model("bert", num_hidden_layers=3), "it has 4 blocks of 24 FFN neurons"),
        (tiny.model("bert", intermediate_size=20), "have 20, 20, 20, 20 neurons"),
        (fp.build_proxy(fm, fp.make_plan(fm, keep_share=0.5)), "have 24, 12, 12, 24 neurons"),
    ):
        with pytest.raises(UserError, match=why):
            fp.build_proxy(other, plan)
        with pytest.raises(UserError, match=why):
            fp.attach(other, plan)


def test_models_that_are_exchanged_are_found_out() -> None:
    fm, proxy, plan = attached()
    rows = labelled("bert")
    for call in (
        lambda: fp.distil(proxy, fm, plan, rows),
        lambda: fp.plug_in(fm, proxy, plan),
        lambda: fp.gradient_agreement(proxy, fm, plan, rows),
    ):
        with pytest.raises(UserError, match="the two may be exchanged"):
            call()


def test_the_adapter_is_asked_for_and_not_put_on_twice() -> None:
    fm = tiny.model("bert")
    plan = fp.make_plan(fm)
    with pytest.raises(UserError, match="tune: the model has no adapter; `attach`"):
        fp.tune(fm, labelled("bert"))
    with_adapter, proxy, _ = attached()
    with pytest.raises(UserError, match="carries an adapter already"):
        fp.attach(with_adapter, plan)
    with pytest.raises(UserError, match="carries an adapter already"):
        fp.build_proxy(with_adapter, plan)
    other = fp.attach(tiny.model("bert"), plan, rank=3)
    with pytest.raises(UserError, match="attach both with the same plan, rank and modules"):
        fp.plug_in(proxy, other, plan)


def test_batches_that_are_none() -> None:
    fm, proxy, plan = attached()
    unlabelled = tiny.public("bert", 2)
    with pytest.raises(UserError, match="tune: batch 1 has no `labels`"):
        fp.tune(proxy, unlabelled)
    with pytest.raises(UserError, match="gradient_agreement: batch 1 has no `labels`"):
        fp.gradient_agreement(fm, proxy, plan, unlabelled)
    with pytest.raises(UserError, match="there is none"):
        fp.distil(fm, proxy, plan, [])
    with pytest.raises(UserError, match="there is none"):
        fp.tune(proxy, [])
    with pytest.raises(UserError, match="got one batch"):
        fp.tune(proxy, labelled("bert")[0])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="batch 1 is tuple, expected a dictionary"):
        fp.tune(proxy, [(1, 2)])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"keep_share": 0.0}, "plan.keep-share: expected above 0"),
        ({"keep_neurons": 25}, "more than the FM's 24 neurons"),
        ({"retained_layers": "first,9"}, "block 9 is out of range"),
        ({"saliency": "taste"}, "plan.saliency: expected one of"),
    ],
)
def test_values_out_of_range_are_named(values: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=key):
        fp.make_plan(tiny.model("bert"), **values)


def test_a_method_nobody_knows_is_named() -> None:
    fm, proxy, plan = attached()
    with pytest.raises(UserError, match=r"distill.method: expected one of"):
        fp.distil(fm, proxy, plan, tiny.public("bert", 1), method="magic")


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification", "tokens"])
def test_other_heads_are_tuned_and_plugged_in(kind: str) -> None:
    """The model's config and class say what is learned; DistilBERT's token head is no other's."""
    family = "distilbert"
    made = tiny.hf_config(family, labels=1 if kind == "regression" else 3)
    auto = transformers.AutoModelForSequenceClassification
    if kind == "tokens":
        auto = transformers.AutoModelForTokenClassification
    else:
        made.problem_type = kind
    torch.manual_seed(0)
    fm = auto.from_config(made).eval()
    plan = fp.make_plan(fm)
    proxy = fp.build_proxy(fm, plan)
    fm, proxy = fp.attach(fm, plan, rank=2), fp.attach(proxy, plan, rank=2)
    served = labelled(family)
    for batch in served:
        classes = batch["labels"]
        if kind == "regression":
            batch["labels"] = 4.0 * classes
        elif kind == "tokens":
            batch["labels"] = classes[:, None].expand(batch["input_ids"].shape)
        else:
            batch["labels"] = torch.nn.functional.one_hot(classes, 3)
    before = fp.tune(proxy, served, epochs=1, lr=1e-2).loss
    after = fp.tune(proxy, served, epochs=8, lr=1e-2).loss
    assert after < before
    product = fp.plug_in(proxy, fm, plan, batches=served)
    assert product is fm
    found = fp.gradient_agreement(fm, proxy, plan, served)
    assert -1 <= found["cosine"] <= 1
