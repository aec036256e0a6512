"""Tiny random models of every family, tokenizers and tasks on disk, made in well under a second.

Everything here is the real format a user would have on disk: `config.json`,
`model.safetensors`, tokenizer or image-processor files, CSV and Parquet data.
"""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from client_app.client import Client
from client_app.node import client_for
from client_app.process import ProcessCache
from fedpft_core import config
from fedpft_core.adapter import lora as adapters
from fedpft_core.data.batches import batches
from fedpft_core.data.encoded import Encoded
from fedpft_core.data.encoding import encode
from fedpft_core.data.examples import Examples
from fedpft_core.model import families
from fedpft_core.model.families import Family, family_of
from fedpft_core.model.normalise import normalise
from fedpft_core.model.plan import Plan
from fedpft_core.proxy.build import build
from fedpft_core.proxy.choose import make_plan
from fedpft_core.task import Task, make
from fedpft_core.wire.envelope import Envelope, open_envelope
from server_app.run.events import EventLog, read_events

# Diffusion pipelines are made of several parts, and have tests of their own (tests/pictures.py).
FAMILIES = tuple(n for n, row in families.FAMILIES.items() if row.kind != "captioned image")
TEXT_FAMILIES = tuple(name for name, row in families.FAMILIES.items() if row.kind == "text")
CAUSAL_FAMILIES = tuple(name for name, row in families.FAMILIES.items() if row.causal)
# One of each build, for checks that take long and see of a family only how it is built: the others
# are RoBERTa, BERT with relative positions, ModernBERT, DINOv2 or Llama again, in other sizes.
_ALIKE = (
    "xlm-roberta", "deberta-v2", "modernbert", "dinov2", "opt", "mistral", "qwen2", "qwen3",
)  # fmt: skip
BUILDS = tuple(name for name in FAMILIES if name not in _ALIKE)
_TOKEN_TYPES = ("bert", "electra")  # those whose tokenizers tell the two texts of a pair apart
LABELS = ("animal", "number", "place")
TASK = make("text", LABELS)
WORDS = {
    "animal": ["cat", "dog", "horse", "cow", "sheep", "goat", "bird", "fish", "wolf", "bear"],
    "number": ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"],
    "place": [
        "paris",
        "london",
        "tokyo",
        "cairo",
        "delhi",
        "lima",
        "oslo",
        "rome",
        "quito",
        "kyoto",
    ],
}
_FILLER = [
    "the",
    "a",
    "is",
    "of",
    "in",
    "and",
    "to",
    "very",
    "big",
    "small",
    "old",
    "new",
    "seen",
    "near",
    "some",
]
_SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}


# Sizes a test may set, by BERT's name for them, whatever the family's own is.
_OF_BERT = {
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "blocks": "num_hidden_layers",
    "heads": "num_attention_heads",
}


# Fields of a config that a tiny model needs, and those whose defaults would hide a part of it.
_OWN: dict[str, dict[str, Any]] = {
    "modernbert": {"local_attention": 6, "cls_token_id": 2, "sep_token_id": 3},
    "deberta-v2": {  # as in the published models of its third version
        "relative_attention": True, "position_buckets": 8, "max_relative_positions": -1,
        "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
    },
    "opt": {"word_embed_proj_dim": 16},
    "mistral": {"sliding_window": 5},
    "gemma2": {"sliding_window": 5, "query_pre_attn_scalar": 10, "attn_logit_softcapping": 4.0},
}  # fmt: skip


def neurons(family: str) -> int:
    """Neurons of each FFN of the tiny models of a family."""
    return family_of(family).shape(hf_config(family)).ffn


def vocabulary() -> list[str]:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return [*special, *_FILLER, *(w for ws in WORDS.values() for w in ws)]


def tokenizer(family: str) -> Any:
    """A word-level fast tokenizer with the special tokens the family needs."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = vocabulary()
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    if family == "qwen2":
        return _qwen2_tokenizer(core.post_processor)
    names = ["input_ids", "attention_mask"]
    if family in _TOKEN_TYPES:
        names.insert(1, "token_type_ids")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=names,
        model_max_length=32,
    )


def _qwen2_tokenizer(post_processor: Any) -> Any:
    """The same words in the class that the library takes for Qwen2 whatever its folder says."""
    from tokenizers import AddedToken

    words = vocabulary()
    made = transformers.Qwen2Tokenizer(
        vocab={w: i for i, w in enumerate(words)}, merges=[], unk_token="[UNK]",
        pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
        bos_token=None, eos_token=None, model_max_length=32,
    )  # fmt: skip
    made.add_tokens(
        [AddedToken(w, single_word=True, lstrip=True, normalized=False) for w in words[5:]]
    )
    made.backend_tokenizer.post_processor = post_processor
    return made


def hf_config(family: str, labels: int = len(LABELS), **shape: Any) -> Any:
    """A tiny config of the family; keyword arguments change its shape."""
    row = family_of(family)
    if family in TEXT_FAMILIES:
        own = {"vocab_size": len(vocabulary()), row.names.positions: 40}
        own |= {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    else:
        own = {"image_size": 16, "patch_size": 4, "num_channels": 3}
    if family == "electra":
        own["embedding_size"] = 12  # another width than the blocks', as in the published ones
    if row.names.kv_heads:
        own[row.names.kv_heads] = 1  # grouped-query attention
    own |= _OWN.get(row.model_type, {})
    names = row.names
    sizes = {getattr(names, ours): (_SHAPE | shape)[theirs] for ours, theirs in _OF_BERT.items()}
    if names.head_dim:
        own[names.head_dim] = sizes[names.hidden] // sizes[names.heads]
    if names.ffn_ratio:
        # Twice the width is its number of neurons; two thirds of it, rounded up, where it is gated.
        sizes[names.ffn_ratio] = -(-sizes.pop(names.ffn) // sizes[names.hidden])
    rest = {k: v for k, v in shape.items() if k not in _SHAPE}
    made = transformers.AutoConfig.for_model(
        row.model_type, num_labels=labels, **sizes, **(own | dict(row.when) | rest)
    )
    found = _auto(family)._model_mapping[type(made)]
    # Where the library has several, the first is the plain one (DeiT has one with a teacher too).
    made.architectures = [(found[0] if isinstance(found, tuple) else found).__name__]
    return made


def _auto(family: str) -> Any:
    """The library's class that makes a task model of the family."""
    if family in TEXT_FAMILIES:
        return transformers.AutoModelForSequenceClassification
    return transformers.AutoModelForImageClassification


def model(family: str, seed: int = 0, **shape: Any) -> nn.Module:
    """A bare task model as loading gives it, with weights large enough that every part matters."""
    made: nn.Module = normalise(vanilla(family, seed, **shape))
    return made


def vanilla(family: str, seed: int = 0, **shape: Any) -> nn.Module:
    """The same as the model library has it, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = _auto(family).from_config(hf_config(family, **shape))
        for p in made.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.25)
            else:
                nn.init.normal_(p, std=0.1)
        for m in made.modules():
            if isinstance(m, nn.LayerNorm) or type(m).__name__.endswith("RMSNorm"):
                nn.init.normal_(m.weight, mean=1.0, std=0.1)
            if hasattr(m, "lambda1"):  # DINOv2's scale of what a block adds
                nn.init.normal_(m.lambda1, mean=1.0, std=0.1)
    return exact(made.eval())


def writer(family: str, seed: int = 0, **shape: Any) -> Any:
    """A bare causal language model of a decoder's family, as loading gives it."""
    return exact(normalise(vanilla_writer(family, seed, **shape)))


def vanilla_writer(family: str, seed: int = 0, **shape: Any) -> Any:
    """The same as the model library has it, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = hf_config(family, **shape)
        config.update({"bos_token_id": 2, "eos_token_id": 3, "use_cache": False})
        made = transformers.AutoModelForCausalLM.from_config(config)
        config.architectures = [type(made).__name__]
        for p in made.parameters():
            nn.init.normal_(p, mean=float(p.dim() == 1), std=0.25 if p.dim() > 1 else 0.1)
    return made.eval()


def writer_tokenizer() -> Any:
    """The tokenizer of decoders that write: a start token, an end token and no chat template."""
    made = tokenizer("llama")
    made.backend_tokenizer.post_processor = None
    made.add_special_tokens({"bos_token": "[CLS]", "eos_token": "[SEP]"})
    return made


def writer_folder(family: str, path: Path, **shape: Any) -> Path:
    """Save a tiny causal language model with its tokenizer as a Hugging Face folder."""
    vanilla_writer(family, **shape).save_pretrained(path)
    writer_tokenizer().save_pretrained(path)
    return path


def dialogues(rows: int, seed: int = 0) -> list[tuple[str, str]]:
    """(prompt, response) rows of uneven length; what a word is decides the response."""
    says = {"animal": "seen near the", "number": "very small and old", "place": "in"}
    found = []
    for text, label in sentences(rows, seed):
        word = next(w for w in text.split() if w in WORDS[label])
        found.append((text, f"{says[label]} {word}"))
    return found


def write_dialogues(family: str, path: Path, rows: int = 160) -> dict[str, Any]:
    """A decoder's folder and data files below `path`, and a run's keys for them."""
    path.mkdir(parents=True, exist_ok=True)
    flat = write_task("bert", path / "other")
    flat |= {
        "model.name": str(writer_folder(family, path / "fm")),
        "data.text-column": "prompt",
        "data.response-column": "response",
        "data.public": str(path / "public.txt"),
        "data.max-length": 24,
        "head.start": "statistics",
        "head.end": "better",
        "plug.method": "best",
        "federation.partition": "dirichlet",
        "run.samples": 4,
        "run.sample-tokens": 6,
        "run.evaluate-every": 2,
        "train.lr": 2e-2,
    }
    for split, (count, seed) in {"train": (rows, 0), "test": (40, 1)}.items():
        file = path / f"{split}.csv"
        flat[f"data.{split}"] = str(file)
        with open(file, "w", newline="", encoding="utf-8") as out:
            writer = csv.writer(out)
            writer.writerow(["prompt", "response"])
            writer.writerows(dialogues(count, seed))
    lines = (" ".join(row) for row in dialogues(200, 2))
    (path / "public.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return flat


def exact(made: Any) -> Any:
    """Let all of a model compute in float64 where the model is in float64.

    The library takes some norms, rotations and softmaxes in float32 whatever they are given, which
    hides all that checks in float64 are to show. In float32 they stay the library's, to the bit.
    """
    for m in made.modules():
        if type(m).__name__.endswith("RMSNorm"):
            m.__class__ = _exact_norm(type(m))
    if made.config.model_type == "gemma2":
        _exact_softmax()
        made.set_attn_implementation("exact")  # type: ignore[operator]
    if made.config.model_type == "modernbert":
        _exact_rotation()
    return made


@cache
def _exact_softmax() -> None:
    from transformers.masking_utils import eager_mask
    from transformers.models.gemma2 import modeling_gemma2 as library

    def attend(module: Any, q: Any, k: Any, v: Any, mask: Any, **more: Any) -> Any:
        if q.dtype != torch.float64:
            return library.eager_attention_forward(module, q, k, v, mask, **more)
        groups, cap = module.num_key_value_groups, more["softcap"]
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        scores = torch.tanh(q @ k.transpose(2, 3) * more["scaling"] / cap) * cap
        shares = (scores if mask is None else scores + mask).softmax(-1)
        return (shares @ v).transpose(1, 2).contiguous(), shares

    transformers.AttentionInterface.register("exact", attend)
    transformers.AttentionMaskInterface.register("exact", eager_mask)


@cache
def _exact_rotation() -> None:
    from transformers.models.modernbert import modeling_modernbert as library

    theirs = library.apply_rotary_pos_emb

    def rotate(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        if q.dtype != torch.float64:
            return theirs(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return tuple(x * cos + library.rotate_half(x) * sin for x in (q, k))

    library.apply_rotary_pos_emb = rotate


@cache
def _exact_norm(cls: type) -> type:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float64:
            return cls.forward(self, x)  # type: ignore[attr-defined, no-any-return]
        eps = getattr(self, "variance_epsilon", None) or self.eps
        y: torch.Tensor = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return y * (1.0 + self.weight if "Gemma" in cls.__name__ else self.weight)

    return type(cls.__name__, (cls,), {"forward": forward})


def give_meaning(body: nn.Module) -> None:
    """Put into the word embeddings what pretraining would: words of a kind lie together.

    Without it the random body mixes a row's one telling word with its fillers beyond recovery,
    and no adapter can learn the task.
    """
    table: Any = getattr(body, "embeddings", None)
    generator = torch.Generator().manual_seed(5)
    vocab = vocabulary()
    with torch.no_grad():
        words = body.get_input_embeddings().weight  # type: ignore[operator]
        words.normal_(std=0.1, generator=generator)
        words += 0.5 * torch.randn(words.shape[1], generator=generator)
        for kind in WORDS.values():
            shared = 2.0 * torch.randn(words.shape[1], generator=generator)
            for word in kind:
                words[vocab.index(word)] += shared
        for name in ("position_embeddings", "token_type_embeddings"):
            if getattr(table, name, None) is not None:
                getattr(table, name).weight.mul_(0.2)


def folder(family: str, path: Path, **shape: Any) -> Path:
    """Save a tiny pretrained body (no head) with its processor as a Hugging Face folder."""
    body: Any = vanilla(family, **shape).base_model
    if family in TEXT_FAMILIES:
        give_meaning(body)
    body.config.architectures = [type(body).__name__]
    body.save_pretrained(path)
    processor(family).save_pretrained(path)
    return path


def task_of(family: str, labels: tuple[str, ...] = LABELS) -> Task:
    """The classification task of what the family reads."""
    return make("text" if family in TEXT_FAMILIES else "image", labels)


def processor(family: str) -> Any:
    if family in TEXT_FAMILIES:
        return tokenizer(family)
    cls = transformers.ViTImageProcessorPil
    return cls(size={"height": 16, "width": 16}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def sentences(rows: int, seed: int = 0) -> list[tuple[str, str]]:
    """(text, label name) rows of uneven length that a word decides."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(rows):
        label = LABELS[i % len(LABELS)]
        words = [str(w) for w in rng.choice(_FILLER, size=int(rng.integers(1, 9)))]
        words.insert(int(rng.integers(0, len(words) + 1)), str(rng.choice(WORDS[label])))
        out.append((" ".join(words), label))
    return out


def image(label: int, rng: np.random.Generator) -> bytes:
    """A small PNG whose colour tells its label."""
    from PIL import Image

    pixels = rng.integers(0, 90, size=(16, 16, 3), dtype=np.uint8)
    pixels[..., label] += 140
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def examples(family: str, rows: int, seed: int = 0) -> Examples:
    if family in TEXT_FAMILIES:
        pairs = sentences(rows, seed)
        labels = np.array([LABELS.index(label) for _, label in pairs])
        return Examples(tuple(t for t, _ in pairs), labels)
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % len(LABELS)
    return Examples(tuple(image(int(y), rng) for y in labels), labels)


def encoded(family: str, rows: int, seed: int = 0) -> Encoded:
    return encode(examples(family, rows, seed), processor(family), 32)


def write_csv(path: Path, rows: list[tuple[str, str]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(rows)
    return path


def plan_for(fm: nn.Module, **keys: Any) -> Plan:
    return make_plan(fm, config.PlanConfig(**keys), seed=0)


def pair(
    family: str, plan: Plan | None = None, seed: int = 0, dropout: float = 0.0
) -> tuple[nn.Module, nn.Module, Plan, adapters.AdapterSpec]:
    """FM and proxy with adapters attached at the same non-zero adapter."""
    fm = model(family, seed)
    plan = plan or plan_for(fm)
    proxy = build(fm, plan)
    spec = adapters.make_spec(
        family_of(family), plan, (), config.LoraConfig(rank=2, alpha=4.0, dropout=dropout)
    )
    fm, proxy = adapters.attach(fm, spec), adapters.attach(proxy, spec, plan)
    tensors = random_adapter(proxy, plan, seed)
    adapters.load(proxy, tensors, plan)
    live = adapters.read(fm)
    adapters.load(fm, live | tensors)
    return fm, proxy, plan, spec


def random_adapter(proxy: nn.Module, plan: Plan, seed: int = 0) -> dict[str, torch.Tensor]:
    """An adapter whose A and B are both non-zero."""
    generator = torch.Generator().manual_seed(seed + 1)
    tensors = adapters.initial(proxy, seed, plan)
    return {k: t + 0.05 * torch.randn(t.shape, generator=generator) for k, t in tensors.items()}


def family(name: str) -> Family:
    return family_of(name)


def write_task(family: str, path: Path, rows: int = 240) -> dict[str, Any]:
    """A model folder and data files below `path`, and a run's keys that learn the task fast."""
    flat: dict[str, Any] = {
        "model.name": str(folder(family, path / "fm")),
        "data.max-length": 16,
        "plan.keep-share": 0.5,
        "distill.steps": 30,
        "distill.length": 16,
        "align.interval": 2,
        "align.proportion": 0.5,
        "align.steps": 10,
        "lora.rank": 4,
        "lora.alpha": 16.0,
        # The paper's way in and out: what most tests are about. test_heads.py and the runs of every
        # family have statistics and the best plug-in.
        "head.start": "zero",
        "head.end": "trained",
        "plug.method": "refit",
        "train.lr": 1e-2,
        "train.head-lr-scale": 10.0,
        "train.batch-size": 12,
        "train.local-steps": 14,
        "train.local-epochs": 3,
        "federation.rounds": 4,
        "federation.clients": 4,
        "federation.clients-per-round": 3,
        "run.threads": 1,
        "run.evaluate-every": 1,
        "run.baselines": False,
        "run.undistilled": False,
    }
    splits = {"train": (rows, 0), "test": (90, 1), "public": (200, 2)}
    for split, (count, seed) in splits.items():
        file = path / f"{split}.{'csv' if family in TEXT_FAMILIES else 'parquet'}"
        flat[f"data.{split}"] = str(file)
        if family in TEXT_FAMILIES:
            write_csv(file, sentences(count, seed))
        else:
            write_images(file, family, count, seed)
    if family not in TEXT_FAMILIES:
        flat["data.image-column"] = "image"
    return flat


def write_images(path: Path, family: str, rows: int, seed: int) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    made = examples(family, rows, seed)
    labels = [LABELS[int(i)] for i in made.labels]
    pq.write_table(pa.table({"image": list(made.inputs), "label": labels}), path)
    return path


class Federation:
    """Clients in this process, each with a cache of its own, and a record of the traffic.

    `sent` and `received` are (node, envelope) in order; `watch(client, request, envelope)` is
    called after a client has answered a training request.
    """

    def __init__(self, flat: dict[str, Any], watch: Any = None) -> None:
        self.flat = flat
        self.count = flat["federation.clients"]
        self.caches = {i: ProcessCache() for i in range(self.count)}
        self.sent: list[tuple[int, Envelope]] = []
        self.received: list[tuple[int, Envelope]] = []
        self.watch = watch

    def client(self, index: int) -> Client:
        made = client_for({"partition-id": index, "num-partitions": self.count}, self.flat)
        made.cache = self.caches[index]
        return made

    def transport(self) -> Any:
        # Here, because models and data must be had where Flower is missing.
        from server_app.transport import LocalTransport

        return LocalTransport({i + 1: partial(self._answer, i) for i in range(self.count)})

    def _answer(self, index: int, envelope: Envelope) -> Envelope:
        client = self.client(index)
        self.sent.append((index, envelope))
        reply = client.handle(envelope)
        self.received.append((index, reply))
        if self.watch and envelope.kind == "train":
            self.watch(client, open_envelope(envelope), reply)
        return reply


def run(
    flat: dict[str, Any], run_dir: Path, federation: Federation | None = None, **keys: Any
) -> list[dict[str, Any]]:
    """A whole run in this process; returns its events. `align__interval=1` sets align.interval."""
    from server_app.app import run as server_run

    flat = flat | {k.replace("__", ".").replace("_", "-"): v for k, v in keys.items()}
    flat["run.dir"] = str(run_dir)
    federation = federation or Federation(flat)
    federation.flat = flat
    events = EventLog(run_dir / "events.jsonl")
    try:
        server_run(config.from_flat(flat), federation.transport(), events)
    finally:
        events.close()
    return [event for _, event in read_events(run_dir / "events.jsonl")]


def main_run(events: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The events of one name that belong to no side run."""
    return [e for e in events if e["event"] == name and "arm" not in e]


def batch_of(family: str, rows: int = 7, seed: int = 3) -> dict[str, torch.Tensor]:
    """One padded batch of rows of uneven length."""
    return next(batches(encoded(family, rows, seed), rows, None))


def padded_left(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A text batch with its padding moved to the left, and each token's position in its own row."""
    mask = batch["attention_mask"]
    shifts = (mask.shape[1] - mask.sum(1)).tolist()

    def moved(value: torch.Tensor) -> torch.Tensor:
        return torch.stack([row.roll(n) for row, n in zip(value, shifts, strict=True)])

    out = {k: moved(v) if v.shape == mask.shape else v for k, v in batch.items()}
    positions = (out["attention_mask"].cumsum(1) - 1).clamp_min(0)
    return out | {"position_ids": positions}


def public(family: str, steps: int, rows: int = 8, seed: int = 4) -> list[dict[str, torch.Tensor]]:
    """Unlabelled batches; texts are not packed, so that there is padding."""
    made = replace(encoded(family, 5 * rows, seed), labels=None)
    epochs = (batches(made, rows, seed + i) for i in range(steps))
    return list(islice(chain.from_iterable(epochs), steps))


def double(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch for a float64 model."""
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every tensor of a module's state."""
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors have the same names and the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
