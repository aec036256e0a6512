"""Text-to-image on scikit-learn's digits: a small diffusion UNet, trained from scratch.

The server trains the UNet on digits 0 to 4 of the built-in 8 x 8 images; clients have digits 5 to
9. Then the adapter is tuned in several ways, all with the same steps a client. Prints a Markdown
table of the denoising loss on held-out images of the clients' digits, and of the share of images
made for their prompts that a classifier trained apart takes for the right digit.

    python benchmarks/digits.py --out FOLDER [--steps 1200] [--only one-shot,multi-round]

FOLDER then has the pipeline (`fm`), the rows, and a run folder for each way, with its pictures.
Takes about ten minutes of one core.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from client_app.node import client_for
from client_app.process import ProcessCache
from fedpft_core import config
from fedpft_core.config import ModelConfig
from fedpft_core.data.batches import batches
from fedpft_core.data.examples import Captioned
from fedpft_core.data.pixels import encode_captioned
from fedpft_core.model.load import load
from fedpft_core.task import make
from fedpft_core.task.painting import paint
from server_app.app import run as run_server
from server_app.run.events import EventLog, read_events
from server_app.transport import LocalTransport

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SERVER, CLIENTS = range(5), range(5, 10)
TASK = make("text-to-image")
KEYS: dict[str, Any] = {
    "data.task": "text-to-image", "data.image-column": "image", "data.public-column": "image",
    "lora.rank": 8, "lora.alpha": 16.0, "lora.dropout": 0.0, "train.lr": 3e-3,
    "train.batch-size": 16, "federation.clients": 5, "federation.clients-per-round": 5,
    "federation.partition": "dirichlet", "federation.dirichlet-alpha": 1.0, "run.threads": 1,
    "run.samples": 10, "run.undistilled": False, "plan.keep-share": 0.5,
    "distill.steps": 100, "distill.batch-size": 16, "align.interval": 0, "plug.method": "best",
}  # fmt: skip
STEPS = 100  # of each client, in all
WAYS: dict[str, dict[str, Any]] = {
    "one-shot": {"federation.schedule": "one-shot", "federation.rounds": 1,
                 "train.local-steps": STEPS},
    "multi-round": {"federation.rounds": 5, "train.local-steps": STEPS // 5},
    "FM-LoRA, multi-round": {"plan.proxy": "full", "federation.rounds": 5,
                             "train.local-steps": STEPS // 5},
}  # fmt: skip


def png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray((pixels * 255 / 16).round().astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def pipeline(folder: Path) -> None:
    """An untrained pipeline on pixels; its text encoder stays as it is drawn."""
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[END]", "the", "digit", *WORDS]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]", eos_token="[END]",
        model_max_length=4,
    )  # fmt: skip
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=4, pad_token_id=0, bos_token_id=2,
        eos_token_id=2, initializer_range=1.0, initializer_factor=20.0,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32), attention_head_dim=4, norm_num_groups=8,
    )  # fmt: skip
    tokenizer.save_pretrained(folder / "tokenizer")
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    unet.save_pretrained(folder / "unet")
    DDPMScheduler(num_train_timesteps=200, beta_schedule="squaredcos_cap_v2").save_pretrained(
        folder / "scheduler"
    )
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "vae": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))


def pretrain(folder: Path, rows: Sequence[Captioned], steps: int) -> None:
    """Train the whole UNet on the server's digits, by the same loss as the run's."""
    loaded = load(ModelConfig(name=str(folder)), TASK.model(), 0)
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    loaded.model.unet = unet  # diffusers' own, so that it can be saved as such
    data = encode_captioned(rows, loaded.processor)
    optimiser = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    rates = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda i: 1 - i / steps)
    done, epoch, start, recent = 0, 0, time.perf_counter(), [0.0]
    unet.train()
    while done < steps:
        for batch in batches(data, 32, epoch):
            loss = TASK.loss(loaded.model, batch)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimiser.step()
            rates.step()
            recent, done = [*recent[-99:], float(loss.detach())], done + 1
            if done % 200 == 0:
                mean = sum(recent) / len(recent)
                print(f"step {done}: {mean:.4f}, {time.perf_counter() - start:.0f} s", flush=True)
            if done == steps:
                break
        epoch += 1
    unet.save_pretrained(folder / "unet")


def prepare(out: Path, steps: int) -> dict[str, Any]:
    """The pipeline and the rows below `out`, and the keys of a run."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    images, target = found.images[order], found.target[order]
    rows = [Captioned(png(x), f"the digit {WORDS[y]}") for x, y in zip(images, target, strict=True)]

    def of(digits: Sequence[int], part: slice) -> list[Captioned]:
        return [rows[i] for i in np.flatnonzero(np.isin(target, list(digits)))[part]]

    files = {"public": of(SERVER, slice(None)), "train": of(CLIENTS, slice(200, None)),
             "test": of(CLIENTS, slice(200))}  # fmt: skip
    flat = KEYS | {"model.name": str(out / "fm")}
    for split, some in files.items():
        folder = out / split
        folder.mkdir(parents=True, exist_ok=True)
        with open(out / f"{split}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "text"])
            for i, row in enumerate(some):
                (folder / f"{i}.png").write_bytes(row.image)
                writer.writerow([f"{split}/{i}.png", row.prompt])
        flat[f"data.{split}"] = str(out / f"{split}.csv")
    if not (out / "fm" / "done").exists():
        torch.manual_seed(0)
        pipeline(out / "fm")
        pretrain(out / "fm", files["public"], steps)
        (out / "fm" / "done").touch()
    return flat


def tune(flat: Mapping[str, Any], run_dir: Path) -> list[dict[str, Any]]:
    """A run with its clients in this process; its events."""
    flat = dict(flat) | {"run.dir": str(run_dir)}
    count = flat["federation.clients"]
    caches = [ProcessCache() for _ in range(count)]

    def answer(index: int, envelope: Any) -> Any:
        client = client_for({"partition-id": index, "num-partitions": count}, flat)
        client.cache = caches[index]
        return client.handle(envelope)

    log = EventLog(run_dir / "events.jsonl")
    try:
        nodes = {i + 1: partial(answer, i) for i in range(count)}
        run_server(config.from_flat(flat), LocalTransport(nodes), log)
    finally:
        log.close()
    return [event for _, event in read_events(run_dir / "events.jsonl")]


def accuracy(fm: Path, adapter: Path | None, each: int = 40) -> float:
    """Share of images for the clients' prompts that a classifier takes for the right digit."""
    from sklearn.datasets import load_digits
    from sklearn.svm import SVC

    digits = load_digits()
    judge = SVC(gamma=0.001, C=10.0).fit(digits.data, digits.target)
    loaded = load(ModelConfig(name=str(fm)), TASK.model(), 0)
    if adapter:
        PeftModel.from_pretrained(loaded.model.unet, str(adapter))
    wanted = np.repeat(list(CLIENTS), each)
    prompts = [f"the digit {WORDS[y]}" for y in wanted]
    made = paint(loaded.model, prompts, loaded.processor, 20, 100)
    found = judge.predict(made.numpy().reshape(len(made), -1).astype(np.float64) * 16 / 255)
    return float((found == wanted).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--only", default=",".join(WAYS).replace(", ", ";"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    flat = prepare(options.out, options.steps)
    print("| way | sub-FM, loss | FM, loss | FM, right digits |\n|---|---:|---:|---:|")
    first = ""
    for way in (name.replace(";", ", ") for name in options.only.split(",")):
        folder = options.out / way.replace(", ", "-").lower()
        # Before the first round and after the last, so that the report has the pictures of both.
        when = {"run.evaluate-every": WAYS[way]["federation.rounds"]}
        events = tune(flat | WAYS[way] | when, folder)
        scored = {(e["round"], e["model"]): e for e in events if e["event"] == "evaluation"}
        named = {e["name"]: e for e in events if e["event"] == "baseline" and "arm" not in e}
        if not first:
            before = accuracy(options.out / "fm", None)
            first = f"| before | | {_shown(named['zero-shot'])} | {before:.2f} |"
            print(first)
        last = max(r for r, _ in scored)
        right = accuracy(options.out / "fm", folder / "adapter")
        sub = "" if "full" in WAYS[way].values() else _shown(scored[last, "proxy"])
        print(f"| {way} | {sub} | {_shown(scored[last, 'fm'])} | {right:.2f} |", flush=True)


def _shown(score: Mapping[str, Any]) -> str:
    return f"{score['value']:.4f} ± {score['error']:.4f}"


if __name__ == "__main__":
    main()
