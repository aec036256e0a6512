"""Keys of the model, the data, and what is built of them."""

from __future__ import annotations

from dataclasses import dataclass

from fedpft_core import registry
from fedpft_core.config.key import key as _key

OWN_TASKS = ("classify", "regress", "multi-label", "tokens", "generate", "text-to-image")
TASKS = (*OWN_TASKS, *(n for n in registry.names("task") if n not in OWN_TASKS))
"""What is done with rows: a class, a number or several labels a row, a class a word, text, or
images."""


@dataclass(frozen=True)
class ModelConfig:
    """Which foundation model the server owns."""

    name: str = _key(
        "builtin:minilm",
        "foundation model: `builtin:minilm`, a local folder, or a Hugging Face name",
    )
    revision: str = _key("", "revision of a Hugging Face name; empty = its default branch")
    dtype: str = _key(
        "fp32",
        "float type of the FM's and the sub-FM's frozen weights: `fp32`, `bf16` or `fp16` (half "
        "the memory, and half the bytes of a package); the adapter and what alignment steps on are "
        "float32 in any case. `fp16` is for GPUs, and may lose small gradients; `closed-form`, "
        "`sequential` and `gradient` need fp32",
        choices=("fp32", "bf16", "fp16"),
    )
    family: str = _key(
        "",
        "family of models that it must be of (docs/families.md); empty = any supported one. "
        "`fedpft run --dry-run` builds one of this family where the model itself is not at hand",
    )


@dataclass(frozen=True)
class DataConfig:
    """Task data, public corpus, and how rows become model inputs."""

    train: str = _key(
        "builtin:docstrings",
        "training rows: `builtin:docstrings`, a .csv, .jsonl, .json or .parquet file, a folder of "
        "such files, a folder with a folder of images for each class, or "
        "`hub:NAME[#CONFIG][@REVISION][:SPLIT]` on the Hugging Face Hub; empty when only the "
        "clients have any (deployment)",
    )
    validation: str = _key(
        "", "validation rows held by the server; empty = carved from the training file"
    )
    test: str = _key("", "test rows; must be given when `data.train` is a file")
    public: str = _key(
        "builtin:public",
        "public corpus for distillation: `builtin:public`, a file, or `hub:` as data.train",
    )
    public_column: str = _key(
        "",
        "column of a public file with texts or images; empty = data.image-column or "
        "data.text-column",
    )
    text_column: str = _key(
        "text", "column with the text, with the list of words, or with the prompt"
    )
    text_pair_column: str = _key(
        "",
        "column with the second text of a pair; empty = single text. With data.task = generate: "
        "what is put behind the prompt, which may be empty in a row",
    )
    response_column: str = _key(
        "", "column with the response to the text; non-empty makes this generation"
    )
    messages_column: str = _key(
        "",
        "column with conversations, each a list of messages with role and content; non-empty makes "
        "this generation",
    )
    source_column: str = _key(
        "",
        "column that says where a row is from (a person, a place, a kind of request), for "
        "federation.partition = natural and federation.partition-by = source. In generation rows "
        "are shared out among clients by it as by a label; empty = by their length",
    )
    prompt_template: str = _key(
        "",
        "generation: how a prompt stands before its response, a text with {prompt}; empty = the "
        "tokenizer's own chat template, or where it has none the prompt and a new line",
    )
    image_column: str = _key("", "column with encoded images; non-empty makes this an image task")
    task: str = _key(
        "",
        "what is learned of a row: `classify` (one label of a set), `regress` (a number), "
        "`multi-label` (any number of labels of a set), `tokens` (a label for each word; "
        "text-column and label-column then hold lists), `generate` (text) or `text-to-image` "
        "(images of image-column for the prompts of text-column); empty = `generate` "
        "where response-column or messages-column is set, else `classify`",
        choices=("", *TASKS),
    )
    label_column: str = _key(
        "label",
        "column with the label: a name or index, a number, or a list of labels, by data.task",
    )
    label_separator: str = _key(
        ",", "what stands between a row's labels where a multi-label cell is a text"
    )
    labels: str = _key(
        "", "label names: JSON file or comma-separated list; empty = those of the training rows"
    )
    validation_share: float = _key(
        0.1, "share of training rows carved off for validation", low=0.0, high=0.49
    )
    max_train_rows: int = _key(0, "training rows used, 0 = all", low=0)
    max_test_rows: int = _key(0, "test rows used, 0 = all", low=0)
    max_public_rows: int = _key(20000, "rows of the public corpus used, 0 = all", low=0)
    max_bad_rows: float = _key(
        0.01,
        "rows of a file that may be left out because they cannot be used (no text or label, an "
        "image that cannot be decoded, an empty response, a line that is no JSON): below 1 a share "
        "of the file's rows, from 1 on a number, 0 = none; with more the run stops. The same limit "
        "is for scored rows of whose responses data.max-length leaves nothing",
        low=0.0,
    )
    max_length: int = _key(64, "longest input, tokens (text only)", low=4)


@dataclass(frozen=True)
class PlanConfig:
    """What the proxy keeps of the foundation model (paper section 4.1)."""

    proxy: str = _key(
        "ffn-pruned",
        "proxy clients get: `ffn-pruned` (sub-FM), `layer-drop` (offsite tuning), `full` (the FM)",
        choices=("ffn-pruned", "layer-drop", "full"),
    )
    keep_neurons: int = _key(0, "FFN neurons K kept per pruned block, 0 = use keep-share", low=0)
    keep_share: float = _key(
        0.25, "share of FFN neurons kept per pruned block", above=0.0, high=1.0
    )
    widths: str = _key(
        "",
        "several sub-FMs of one FM, for clients of different means: shares of the FFN neurons, the "
        "narrowest first, as `0.125,0.25,0.5`; each keeps the first neurons of one ranking, so "
        "that a smaller one is a part of every larger one. For blocks of different shares one of "
        "each block with `/` between them (`1/0.25/0.25/1`); `1` is the FM itself. Empty = one "
        "sub-FM, by plan.keep-share",
    )
    width_budget: str = _key(
        "even",
        "how the neurons of a width are shared out among its pruned blocks: `even` (the same share "
        "of each) or `saliency` (as many in all, where they stand out most)",
        choices=("even", "saliency"),
    )
    retained_layers: str = _key(
        "first,last",
        "blocks kept whole: comma-separated indices, `first`, `last`; empty = none",
    )
    saliency: str = _key(
        "weight-norm",
        f"how neurons are ranked: {registry.describe('saliency')}",
        choices=registry.names("saliency"),
    )
    saliency_batches: int = _key(
        8, "public batches a saliency that reads them looks at, of distill.batch-size rows", low=1
    )
    qk_rank: int = _key(
        0,
        "rank of the attention's query and key projections in pruned blocks (truncated SVD; LoRA "
        "stays on them under the FM's names), 0 = as in the FM",
        low=0,
    )
    drop_to: int = _key(
        0,
        "blocks a layer-drop proxy keeps, 0 = as many as fit the sub-FM's block parameters",
        low=0,
    )
    disclosure_budget: float = _key(
        1.0,
        "share of the FM's FFN neurons that may ever leave, over all runs in plan.ledger; a run "
        "that would pass it is refused before anything is sent; 1 = no limit",
        above=0.0, high=1.0,
    )  # fmt: skip
    ledger: str = _key(
        "",
        "folder of the ledger of neurons that have left, by FM; empty = `disclosed` in "
        "$FEDPFT_HOME (~/.fedpft). Runs in simulation read it and add nothing",
    )
    prefer_disclosed: bool = _key(
        False,
        "keep neurons that the ledger knows to have left before any others, by their saliency, so "
        "that another saliency or keep-share discloses as few new ones as can be",
    )
    disguise: str = _key(
        "none",
        "`permute-scale`: the sub-FM's neurons go out in a secret order and, where that is exact "
        "(ReLU, gated FFNs), each on a secret scale, without saying which of the FM's they are; "
        "`none`: in the FM's order",
        choices=("none", "permute-scale"),
    )
    embeddings: str = _key(
        "all",
        "rows of the embedding table in the sub-FM: `all`, or `seen` (of tokens in the public "
        "corpus, and special ones; all others share the unknown token's row)",
        choices=("all", "seen"),
    )


@dataclass(frozen=True)
class LoraConfig:
    """The adapter: LoRA on attention q, k, v, o of every block, and the task head."""

    rank: int = _key(8, "rank r", low=1)
    alpha: float = _key(48.0, "scale numerator; updates are scaled by alpha / rank", above=0.0)
    dropout: float = _key(0.1, "dropout on LoRA inputs", low=0.0, high=0.9)
    start: str = _key(
        "random",
        "A before round 1: `random` (LoRA's own), `orthonormal` (orthonormal rows, at random) or "
        "`inputs` (the directions in which the layer's inputs vary most in the FM on public rows: "
        "EVA); B is zero",
        choices=("random", "orthonormal", "inputs"),
    )
