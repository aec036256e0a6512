"""Model, rows, training and test."""

import csv
import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

LAYERS = ["query", "key", "value", "attention.output.dense"]


def labels(data):
    return json.loads((Path(data) / "labels.json").read_text())


def load_model(config):
    torch.manual_seed(config["seed"])
    model = AutoModelForSequenceClassification.from_pretrained(
        config["model"], num_labels=len(labels(config["data"]))
    )
    lora = LoraConfig(
        task_type="SEQ_CLS", r=config["rank"], lora_alpha=config["alpha"],
        lora_dropout=config["dropout"], target_modules=LAYERS,
    )  # fmt: skip
    return get_peft_model(model, lora)


def load_rows(config, name):
    names = labels(config["data"])
    with open(Path(config["data"]) / f"{name}.csv", newline="") as file:
        return [(row["text"], names.index(row["label"])) for row in csv.DictReader(file)]


def batches(config, rows, shuffle):
    tokenizer = AutoTokenizer.from_pretrained(config["model"])

    def collate(some):
        texts, targets = zip(*some, strict=True)
        batch = tokenizer(
            list(texts), truncation=True, max_length=config["max-length"], padding=True,
            return_tensors="pt",
        )  # fmt: skip
        return batch | {"labels": torch.tensor(targets)}

    return DataLoader(rows, config["batch-size"], shuffle=shuffle, collate_fn=collate)


def train(model, config, rows):
    model.train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=config["rate"], weight_decay=0.0
    )
    done, total = 0, 0.0
    while done < config["steps"]:
        for batch in batches(config, rows, shuffle=True):
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            done, total = done + 1, total + float(loss)
            if done == config["steps"]:
                break
    return total / done


@torch.no_grad()
def test(model, config, rows):
    model.eval()
    right = 0
    for batch in batches(config, rows, shuffle=False):
        right += int((model(**batch).logits.argmax(1) == batch["labels"]).sum())
    return right / len(rows)
