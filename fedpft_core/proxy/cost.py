"""What a plan costs and saves: parameters, bytes, FLOPs per token, theoretical step time.

FLOPs count a multiply and an add as two. Forward: 2 per weight of every linear, plus the two
attention products, 4·L·D per token at length L. A training step with frozen weights needs the
forward pass, the backward pass through activations (as much again), and three times LoRA's
forward; weight gradients exist for the adapter only. Blocks of a UNet read fewer
positions the deeper they lie, and count by their share; what else a UNet has (convolutions) and
attention to the prompt's few tokens is left out. Products with relative positions (DeBERTa),
which a row has besides whatever its length, are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fedpft_core.config import Config
from fedpft_core.data.splits import columns_of
from fedpft_core.model import load as models
from fedpft_core.model.families import Family, base_model
from fedpft_core.model.plan import Plan
from fedpft_core.proxy.build import build
from fedpft_core.proxy.nested import make_plans, trunk
from fedpft_core.proxy.size import PlanSize, of_proxy
from fedpft_core.task import sample


@dataclass(frozen=True)
class BlockCost:
    """What one block costs.

    Attributes:
        parameters: its own, without LoRA's.
        forward: FLOPs per token of a forward pass with LoRA.
        step: FLOPs per token of a training step of LoRA.
    """

    parameters: int
    forward: float
    step: float


def block_cost(family: Family, block: nn.Module, length: float, rank: int, width: int) -> BlockCost:
    """What a block costs per token.

    Args:
        family: where the block keeps its parts.
        block: one block, of the FM or of a proxy.
        length: tokens of a row.
        rank: LoRA's rank.
        width: width of what attention multiplies, all heads together.

    Returns:
        Parameters, and FLOPs per token.
    """
    linears = [m for m in block.modules() if isinstance(m, nn.Linear)]
    # A low-rank projection has two thin matrices in the place of its weight.
    dense = 2.0 * sum(p.numel() for m in linears for p in m.parameters(False) if p.dim() > 1)
    attention = 4.0 * length * width
    targets: list[Any] = [block.get_submodule(path) for path in family.attention]
    lora = 2.0 * rank * sum(t.in_features + t.out_features for t in targets)
    forward = dense + attention + lora
    # Attention's backward recomputes two products for each of its two: twice the forward.
    return BlockCost(
        sum(p.numel() for p in block.parameters()),
        forward,
        2 * dense + 3 * attention + 3 * lora,
    )


def step_ratio(fm: nn.Module, proxy: nn.Module, family: Family, length: int, rank: int) -> float:
    """Theoretical speed-up of a client's training step on the proxy over one on the FM.

    Args:
        fm: the FM without adapter.
        proxy: the proxy without adapter.
        family: the family of both.
        length: tokens of a row.
        rank: LoRA's rank.

    Returns:
        FLOPs of all blocks of the FM over those of the proxy; above 1 where the proxy is cheaper.
    """
    width = _attention_width(family, fm)
    total = [
        sum(
            w * block_cost(family, b, w * length, rank, width).step
            for b, w in zip(family.block_list(m), _weights(family, m), strict=True)
        )
        for m in (fm, proxy)
    ]
    return total[0] / total[1]


def step_flops(family: Family, model: nn.Module, rank: int) -> tuple[float, float]:
    """FLOPs per token of a training step on all blocks, as a function of length.

    Embeddings, pooler and head are left out.

    Args:
        family: the model's family.
        model: FM or proxy without adapter.
        rank: LoRA's rank.

    Returns:
        a and b of a + b·L at L tokens a row; b is attention's part.
    """
    blocks = list(family.block_list(model))
    width = _attention_width(family, model)
    weights = _weights(family, model)
    at = [
        sum(
            w * block_cost(family, b, w * n, rank, width).step
            for b, w in zip(blocks, weights, strict=True)
        )
        for n in (0, 1)
    ]
    return at[0], at[1] - at[0]


def _of_widths(
    loaded: models.Loaded, plans: Mapping[str, Plan], length: int, rank: int
) -> list[str]:
    """A line for each of several widths."""
    if len(plans) == 1:
        return []
    lines = []
    for name, plan in plans.items():
        proxy = loaded.model if plan.is_full else build(loaded.model, plan)
        ratio = step_ratio(loaded.model, proxy, loaded.family, length, rank)
        count, size = models.size(proxy)
        lines.append(
            f"Width {name}: {count:,} parameters, {size / 1e6:.1f} MB, a step {ratio:.2f}x as fast."
        )
    return [*lines, f"The table is of width {trunk(plans)}; the widest says what clients may know."]


def _first_contact(config: Config, size: PlanSize) -> str:
    wire = config.wire
    table = "" if wire.embeddings == "same" else f", wire.embeddings = {wire.embeddings}"
    return (
        f"A client that has nothing of the sub-FM gets {size.package_bytes / 1e6:.1f} MB of it "
        f"(wire.package = {wire.package}{table}), and an adapter of "
        f"{size.adapter_bytes / 1e6:.2f} MB before it is coded."
    )


def _weights(family: Family, model: nn.Module) -> list[float]:
    """Positions of each block as a share of the longest's: 1 where all read as many."""
    config: Any = base_model(model).config
    tokens = family.shape(config).block_tokens
    return [n / max(tokens) for n in tokens] or [1.0] * len(family.block_list(model))


def _attention_width(family: Family, model: nn.Module) -> int:
    config: Any = base_model(model).config
    return family.shape(config).attention


def inspect(config: Config) -> dict[str, Any]:
    """The table of `fedpft inspect`: FM against proxy, block by block.

    Loads the FM, but neither rows nor public data.

    Args:
        config: of the run; the weight norm stands in for its saliency.

    Returns:
        `title`, `columns`, `rows` (one per FM block, then all blocks, then the whole model),
        `notes`, and `step_ratio`, the number that :func:`step_ratio` gives.

    Raises:
        UserError: the FM cannot be loaded, or the plan's settings do not fit it.
    """
    # No data are needed: the model says what it reads, and two classes stand for its head.
    task = sample(models.kind_of(config.model), columns_of(config.data))
    loaded = models.load(config.model, task.model(), config.run.seed)
    # Costs depend on how many neurons are kept, not on which: no public rows are read for it.
    settings = replace(config.plan, saliency="weight-norm")
    plans = make_plans(loaded.model, settings, config.run.seed)
    plan = plans[trunk(plans)]
    proxy = build(loaded.model, plan)
    family, rank = loaded.family, config.lora.rank
    width, length = loaded.shape.attention, loaded.shape.length(config.data.max_length)
    rows: list[list[Any]] = []
    totals = [0.0] * 4
    proxy_blocks = dict(zip(plan.present, family.block_list(proxy), strict=True))
    for i, (entry, block) in enumerate(
        zip(plan.blocks, family.block_list(loaded.model), strict=True)
    ):
        fm = block_cost(family, block, length, rank, width)
        if entry.state == "dropped":
            own = BlockCost(0, 0.0, 0.0)
        else:
            own = block_cost(family, proxy_blocks[i], length, rank, width)
        kept = {"whole": plan.neurons(i), "dropped": 0}.get(entry.state, len(entry.kept))
        rows.append(
            [
                i, entry.state, f"{kept:,} / {plan.neurons(i):,}", f"{fm.parameters:,}",
                f"{own.parameters:,}", f"{4 * own.parameters:,}", f"{fm.forward / 1e6:.2f}",
                f"{own.forward / 1e6:.2f}",
            ]
        )  # fmt: skip
        totals = [
            a + b
            for a, b in zip(
                totals, (fm.parameters, own.parameters, fm.forward, own.forward), strict=True
            )
        ]
    rows.append(
        [
            "blocks", "", "", f"{int(totals[0]):,}", f"{int(totals[1]):,}",
            f"{4 * int(totals[1]):,}", f"{totals[2] / 1e6:.2f}", f"{totals[3] / 1e6:.2f}",
        ]
    )  # fmt: skip
    sizes = [models.size(m) for m in (loaded.model, proxy)]
    rows.append(
        ["model", "", "", f"{sizes[0][0]:,}", f"{sizes[1][0]:,}", f"{sizes[1][1]:,}", "", ""]
    )
    ratio = step_ratio(loaded.model, proxy, family, length, rank)
    return {
        "title": f"{config.model.name} as {config.plan.proxy}",
        "columns": [
            "block", "kept", "neurons", "FM parameters", "proxy parameters", "proxy bytes",
            "FM MFLOP/token", "proxy MFLOP/token",
        ],
        "rows": rows,
        "notes": [
            f"FLOPs are per token of a forward pass at {length} tokens with LoRA of rank {rank}.",
            f"A client step on the proxy is at best {ratio:.2f}x as fast as on the FM.",
            f"{100 * (1 - totals[1] / totals[0]):.1f}% of the block parameters stay with the "
            "owner.",
            *_of_widths(loaded, plans, length, rank),
            _first_contact(config, of_proxy(config, loaded, plan, proxy, task)),
        ],
        "step_ratio": ratio,
    }  # fmt: skip
