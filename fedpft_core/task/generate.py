"""Text generation: responses to prompts, what an assistant says, texts by themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf, nan, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedpft_core.data.chat import Say, encode_told, prepare
from fedpft_core.data.dialogues import groups, read_dialogues
from fedpft_core.data.encoded import UNLEARNED, Encoded
from fedpft_core.data.examples import Examples
from fedpft_core.data.packing import pack
from fedpft_core.data.rows import Columns
from fedpft_core.model.device import Batch
from fedpft_core.model.families import family_of_model
from fedpft_core.model.load import TaskModel
from fedpft_core.task import causal
from fedpft_core.task.base import MOST_TOKENS
from fedpft_core.task.figures import announced, check_loss
from fedpft_core.task.headless import HeadlessTask
from fedpft_core.task.score import Metric, Score
from fedpft_core.task.writing import Sample, exact, rouge_l, write

PERPLEXITY = Metric("perplexity", higher_is_better=False, share=False)
EXACT_MATCH = Metric("exact match", higher_is_better=True, share=True)
ROUGE_L = Metric("ROUGE-L", higher_is_better=True, share=True)
_MOST = 700.0  # nats a token; the exponential of more is no number


@dataclass(frozen=True)
class Generate(HeadlessTask):
    """The next token; see `fedpft_core.task.base.Task` for each part.

    There is no head to train: the layer that scores tokens is the FM's, and stays as it is.

    Attributes:
        name: `generate`.
        labels: none.
    """

    name: str = "generate"

    reads = "text"
    metric = PERPLEXITY
    further = (EXACT_MATCH, ROUGE_L)
    # Not the squares that the standard error needs: of few rows they would tell more than the mean.
    sent = ("rows", "tokens", "loss")
    per_position = True
    judged = Metric("tokens right", higher_is_better=True, share=True)

    # --- the model ---

    def model(self) -> TaskModel:
        """A causal language model of the model library.

        Returns:
            The library's class.
        """
        return TaskModel(reads="text", auto="AutoModelForCausalLM", settings={}, causal=True)

    # --- rows ---

    def read(self, path: str | Path, columns: Columns, key: str = "") -> Examples:
        """All rows of one file; see :func:`fedpft_core.data.dialogues.read_dialogues`.

        Args:
            path: .csv, .tsv, .json, .jsonl or .parquet file.
            columns: which of its columns hold what.
            key: configuration key to name in messages; "" for none.

        Returns:
            Texts, pairs or conversations.

        Raises:
            UserError: anything wrong in the file, naming it and, where there is one, the row.
        """
        return read_dialogues(path, columns, key)

    def strata(self, examples: Examples) -> np.ndarray:
        """Rows go by their source, or by their length where all are from one.

        Args:
            examples: rows of this task.

        Returns:
            int64 (rows,).
        """
        return groups(examples)

    def encode(
        self, examples: Examples, processor: Any, max_length: int, say: Say | None = None
    ) -> Encoded:
        """Token ids, and which of them are learned.

        Args:
            examples: rows of this task.
            processor: a Hugging Face tokenizer with a chat template.
            max_length: tokens per row at most, special tokens included.
            say: told how many rows were cut; None for nobody.

        Returns:
            The rows in their order.
        """
        return encode_told(examples, processor, max_length, say)

    def any_labels(self, rows: int) -> Tensor:
        """Nothing that a row is learned as.

        Args:
            rows: how many labels are wanted.

        Returns:
            int64 (rows, 0).
        """
        return torch.zeros(rows, 0, dtype=torch.int64)

    # --- training and scoring ---

    def loss(self, model: nn.Module, batch: Batch, reduction: str = "mean") -> Tensor:
        """Cross-entropy of the tokens that are learned; documents are packed where that saves rows.

        Args:
            model: a causal language model, with or without the adapter.
            batch: inputs and labels, on the model's device.
            reduction: `mean` over the tokens that are learned, or `sum`.

        Returns:
            A scalar in nats.
        """
        packed = pack(batch) if family_of_model(model).packs else batch
        target = causal.next_tokens(packed)
        learned = target != UNLEARNED
        h = causal.read(model, packed, learned)
        total = causal.loss_sum(model, h, target[learned])
        return total / max(int(learned.sum()), 1) if reduction == "mean" else total

    def count(self, batch: Batch) -> int:
        """Tokens of the batch that are learned.

        Args:
            batch: inputs and labels.

        Returns:
            How many there are, but at least 1.
        """
        return max(int((batch["labels"][:, 1:] != UNLEARNED).sum()), 1)

    def sums(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        """Rows, tokens, their cross-entropies, and what the standard error needs of both.

        Args:
            model: a causal language model in eval mode.
            batch: inputs and labels, on the model's device.

        Returns:
            `rows`, `tokens` and `loss`; `loss2`, `tokens2` and `losstokens` are the sums over rows
            of the squares and of the product.
        """
        target = causal.next_tokens(batch)
        learned = target != UNLEARNED
        found = causal.losses(model, causal.read(model, batch, learned), target[learned])
        tokens = learned.sum(1).double().cpu()
        row = learned.nonzero()[:, 0].cpu()
        loss = torch.zeros(len(target), dtype=torch.float64)
        loss.index_add_(0, row, found.double().cpu())
        return {
            "rows": len(target),
            "tokens": int(tokens.sum()),
            "loss": float(loss.sum()),
            "loss2": float(loss.square().sum()),
            "tokens2": float(tokens.square().sum()),
            "losstokens": float((loss * tokens).sum()),
        }

    def score(self, sums: Mapping[str, float], seconds: float = 0.0) -> Score:
        """Perplexity, the exponential of the mean cross-entropy of a token.

        Its standard error is by the delta method, with rows as what chance has drawn: tokens of a
        row are not independent. Where the squares are missing, as in what clients send, it is not
        known.

        Args:
            sums: as `sums` gives them, added up, or those of `sent` alone.
            seconds: time that scoring took.

        Returns:
            The score, its loss a mean over tokens; no rows give 0, no tokens infinity.
        """
        rows, tokens = int(sums.get("rows", 0)), sums.get("tokens", 0)
        if not tokens:
            value = inf if rows else 0.0
            return Score(PERPLEXITY, value, nan, nan, rows, seconds, {}, dict(sums))
        mean = sums["loss"] / tokens
        value, error = exp(min(mean, _MOST)), nan
        if "loss2" in sums:
            # Of the ratio of two sums over rows: loss minus mean times tokens is what varies.
            spread = sums["loss2"] - 2 * mean * sums["losstokens"] + mean**2 * sums["tokens2"]
            error = value * sqrt(max(spread, 0.0)) / tokens
        return Score(PERPLEXITY, value, error, mean, rows, seconds, {}, dict(sums))

    def check_sums(
        self, sums: Mapping[str, float], rows: int, tokens_per_row: int = MOST_TOKENS
    ) -> None:
        """Tokens are whole and no more than the rows can have; the loss is never below 0.

        Args:
            sums: figures that a client has sent.
            rows: rows that the client announced it keeps from training.
            tokens_per_row: the most tokens that a row has.

        Raises:
            ValueError: the figures are others than these, or those that so many rows cannot have.
        """
        if not announced(sums, self.sent, rows):
            return
        tokens = sums["tokens"]
        if type(tokens) is not int or not 0 <= tokens <= rows * tokens_per_row:
            raise ValueError(f"{rows} validation rows cannot have {tokens} tokens to learn")
        check_loss(sums["loss"], tokens)

    # --- outputs, which are too many to be kept ---

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Scores of the next token from every position, all at once: for few tokens only.

        Args:
            model: a causal language model, with or without the adapter.
            batch: inputs, on the model's device; labels are not looked at.

        Returns:
            [B, L, V].
        """
        every = torch.ones_like(batch["input_ids"], dtype=torch.bool)
        found = causal.scores(model, causal.read(model, batch, every))
        return found.reshape(*every.shape, -1)

    def divergence(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Mean Kullback-Leibler divergence of the next token's shares from the target's.

        Args:
            outputs: scores [..., V].
            target: scores of the same positions and shape.

        Returns:
            A scalar of at least 0.
        """
        return torch.nn.functional.kl_div(
            outputs.flatten(0, -2).log_softmax(-1), target.flatten(0, -2).log_softmax(-1),
            reduction="batchmean", log_target=True,
        )  # fmt: skip

    def apart(self, model: nn.Module, other: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """How far a model's next tokens are from another's, in chunks over the positions.

        Args:
            model: gets gradients, where they are on.
            other: what it should come to; run without gradients.
            batch: where it has labels, the tokens that are learned count, otherwise all.

        Returns:
            The sum of the divergences, a scalar in nats, and how many positions it is over.
        """
        learned = causal.next_tokens(batch) != UNLEARNED
        with torch.no_grad():
            wanted = causal.read(other, batch, learned)
        h = causal.read(model, batch, learned)
        return causal.divergence_sum(model, other, h, wanted), int(learned.sum())

    def each(self, values: Tensor, batch: Batch) -> Tensor:
        """The values at the positions from which a token is learned.

        Args:
            values: [B, L, ...].
            batch: the batch they are of; where it has no labels, every real token is learned.

        Returns:
            [N, ...] in row order.
        """
        return values[(causal.next_tokens(batch) != UNLEARNED).to(values.device)]

    def answers(self, batch: Batch) -> Tensor:
        """The tokens that are learned.

        Args:
            batch: with labels.

        Returns:
            int64 [N], in row order.
        """
        target = causal.next_tokens(batch)
        return target[target != UNLEARNED]

    def merit(self, outputs: Tensor, answers: Tensor) -> float:
        """Tokens that the highest score tells.

        Args:
            outputs: scores [N, V].
            answers: int64 [N], on any device.

        Returns:
            How many are right.
        """
        return int((outputs.argmax(-1) == answers.to(outputs.device)).sum())

    # --- writing ---

    def prepare(self, processor: Any, template: str, vocabulary: int, name: str, say: Say) -> None:
        """Make the FM's tokenizer fit, before rows are encoded and packages made.

        Args:
            processor: the FM's tokenizer, changed in place.
            template: data.prompt-template.
            vocabulary: token ids the FM knows.
            name: of the FM, for messages.
            say: told what was set.
        """
        prepare(processor, template, vocabulary, name, say)

    def write(
        self,
        model: nn.Module,
        examples: Examples,
        processor: Any,
        max_length: int,
        new_tokens: int,
        batch_size: int,
    ) -> list[Sample]:
        """Let a model respond; see :func:`fedpft_core.task.writing.write`.

        Args:
            model: FM or proxy with the adapter.
            examples: rows of this task.
            processor: the FM's tokenizer.
            max_length: tokens of a prompt at most.
            new_tokens: tokens of a response at most.
            batch_size: rows at once.

        Returns:
            One sample for each row.
        """
        return write(model, examples, processor, max_length, new_tokens, batch_size)

    def judge(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Exact match and ROUGE-L of what was written.

        Args:
            samples: responses with their references.

        Returns:
            Means by the metric's name; nothing without samples.
        """
        n = len(samples)
        if not n:
            return {}
        return {
            EXACT_MATCH.name: sum(map(exact, samples)) / n,
            ROUGE_L.name: sum(rouge_l(s.response, s.reference) for s in samples) / n,
        }
