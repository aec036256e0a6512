"""README.md beside the exported adapter: the model card, as the Hugging Face Hub reads them.

PEFT writes an empty form there, with the FM's path on this machine in it. This card says what the
adapter is for, which output is which label, how to load it, and what it was trained on and scored.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml

from fedpft_core.config import Config
from fedpft_core.disk import whole
from fedpft_core.task import Task
from server_app.run import schema as ev
from server_app.run.record import Record

_PIPELINES = {
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForCausalLM": "text-generation",
}
# Names the Hub has for ours.
_HUB_METRICS = {"macro-F1": "f1", "Matthews correlation": "matthews_correlation"}


def write(folder: Path, record: Record, config: Config, task: Task) -> None:
    """Put the card in the place of PEFT's.

    Args:
        folder: where the adapter has been exported.
        record: the run, with the product's scores.
        config: the run's configuration.
        task: the run's task, with its labels.

    Raises:
        OSError: the file cannot be written.
    """
    whole.write(folder / "README.md", text(record, config, task).encode())


def text(record: Record, config: Config, task: Task) -> str:
    """The card.

    Args:
        record: the run, with the product's scores.
        config: the run's configuration.
        task: the run's task, with its labels.

    Returns:
        Markdown behind a head of YAML; no path of this machine is in it.
    """
    head = yaml.safe_dump(_head(record, config, task), sort_keys=False, allow_unicode=True)
    method = record.run.method if record.run else "fedpft"
    parts = [
        f"---\n{head}---\n",
        f"# Adapter of {base_name(config)}, tuned by {method}\n",
        "A LoRA adapter with a task head, tuned by federated proxy fine-tuning "
        "([FedPFT](https://arxiv.org/abs/2404.11536)): clients trained it on a compressed copy of "
        "the model, each on its own rows, and it plugs into the model itself.\n",
        _labels(task),
        _usage(config, task),
        _training(record, config),
        _scores(record),
        "## Licences\n\nThe adapter's licence is for whoever publishes it to say (`license` above);"
        " those of the base model and of the data hold for what is made of them.\n\n"
        "- Base model: \n- Training data: \n- Public corpus: \n",
    ]
    return "\n".join(part for part in parts if part)


def base_name(config: Config) -> str:
    """The FM's name: its name on the Hub, else the last part of its path.

    Args:
        config: the run's configuration.

    Returns:
        A name without a path of this machine.
    """
    name = config.model.name
    return name if _on_hub(name) else name.rstrip("/").rsplit("/", 1)[-1]


def _on_hub(name: str) -> bool:
    """Whether it is `owner/name` and no file here."""
    plain = name.count("/") == 1 and not name.startswith((".", "/", "~")) and ":" not in name
    return plain and not Path(name).exists()


def _head(record: Record, config: Config, task: Task) -> dict[str, Any]:
    pipeline = _PIPELINES.get(task.model().auto, "")
    product = _product(record)
    out: dict[str, Any] = {"library_name": "peft", "license": "unknown"}
    if _on_hub(config.model.name):
        out["base_model"] = config.model.name
    if pipeline:
        out["pipeline_tag"] = pipeline
    out["tags"] = ["fedpft", "federated-learning", "lora", "peft"]
    if product:
        values = {product.metric: product.value, **product.more}
        out["metrics"] = [_HUB_METRICS.get(name, name) for name in values]
        out["model-index"] = [{
            "name": f"{base_name(config)} with adapter",
            "results": [{
                "task": {"type": pipeline or "other"},
                "dataset": {"name": _data_name(config), "type": "private", "split": product.split},
                "metrics": [
                    {"type": _HUB_METRICS.get(name, name), "value": round(value, 5), "name": name}
                    for name, value in values.items()
                    if math.isfinite(value)
                ],
            }],
        }]  # fmt: skip
    return out


def _product(record: Record) -> ev.Evaluation | None:
    return next((r.fm for r in reversed(record.rounds) if r.fm), None)


def _data_name(config: Config) -> str:
    source = config.data.train or config.data.test
    return source if source.startswith("builtin:") else Path(source).stem


def _labels(task: Task) -> str:
    if not task.labels:
        return ""
    rows = "".join(f"| {i} | {_cell(name)} |\n" for i, name in enumerate(task.labels))
    return f"## Labels, in the order of the outputs\n\n| output | label |\n|--:|---|\n{rows}"


def _cell(name: str) -> str:
    return " ".join(name.split()).replace("|", "\\|").replace("<", "&lt;")


def _usage(config: Config, task: Task) -> str:
    auto, image = task.model().auto, task.reads == "image"
    processor = "AutoImageProcessor" if image else "AutoTokenizer"
    builtin = config.model.name.startswith("builtin:")
    lines = [
        "from peft import PeftModel",
        f"from transformers import {', '.join(sorted((auto, processor)))}",
        *(["from fedpft_core.model.load import minilm_folder"] if builtin else []),
        "",
        "base = minilm_folder()" if builtin else f"base = {base_name(config)!r}  # or its folder",
    ]
    if task.labels:
        lines += [
            f"labels = {list(task.labels)!r}",
            f"fm = {auto}.from_pretrained(",
            "    base, num_labels=len(labels), id2label=dict(enumerate(labels)),",
            "    ignore_mismatched_sizes=True,",
            ")",
        ]
    else:
        lines.append(f"fm = {auto}.from_pretrained(base)")
    lines += [
        'model = PeftModel.from_pretrained(fm, "FOLDER_OF_THIS_CARD").eval()',
        f"processor = {processor}.from_pretrained(base)",
    ]
    if image:
        lines += [
            "",
            "from PIL import Image",
            "",
            'image = Image.open("image.png").convert("RGB")',
            'batch = processor(image, return_tensors="pt")',
        ]
    else:
        rows = '["a text"], ["its second text"]' if task.name.startswith("pair") else '["a text"]'
        lines += [
            "batch = processor(",
            f"    {rows}, truncation=True, max_length={config.data.max_length}, padding=True,",
            '    return_tensors="pt",',
            ")",
        ]
    if task.labels and "Token" not in auto:
        lines.append("print(labels[int(model(**batch).logits[0].argmax())])")
    else:
        lines.append("print(model(**batch).logits)")
    code = "\n".join(lines)
    said = "" if image else f" Texts were cut at {config.data.max_length} tokens."
    base = f"The base model is {base_name(config)}.{said}"
    return f"## How to load it\n\n```python\n{code}\n```\n\n{base}\n"


def _training(record: Record, config: Config) -> str:
    f, t, run = config.federation, config.train, record.run
    facts = {
        "base model": base_name(config),
        "data": _data_name(config),
        "clients": record.nodes.count if record.nodes else f.clients,
        "clients a round, rounds": f"{f.clients_per_round}, {f.rounds}",
        "local steps of a round": t.local_steps or f"{t.local_epochs} epochs",
        "rows a step": t.batch_size,
        "learning rate": f"{t.lr:g}",
        "LoRA rank, alpha": f"{config.lora.rank}, {config.lora.alpha:g}",
        "what clients held": f"{config.plan.proxy}, {config.plan.keep_share:g} of the neurons kept",
        "seed": config.run.seed,
        "fedpft": run.version if run else "",
    }
    if record.task:
        facts["rows (train / validation / test)"] = (
            f"{record.task.train} / {record.task.validation} / {record.task.test}"
        )
    rows = "".join(f"| {name} | {value} |\n" for name, value in facts.items())
    return f"## Training\n\n| | |\n|---|---|\n{rows}"


def _scores(record: Record) -> str:
    product = _product(record)
    if product is None:
        return ""
    found = {"this adapter on the base model": product} | {
        name: baseline for name, baseline in record.baselines.items()
    }
    names = [product.metric, *product.more]
    rows = ""
    for name, score in found.items():
        values = {score.metric: score.value, **score.more}
        cells = [f"{values[n]:.4f}" if n in values else "" for n in names]
        rows += f"| {name} | {' | '.join(cells)} |\n"
    head = f"| | {' | '.join(names)} |\n|---|{'--:|' * len(names)}\n"
    return f"## Scores on {product.rows} {product.split} rows\n\n{head}{rows}"
