"""The method as a library: what `import fedpft_core` offers in a notebook.

Models are ordinary Hugging Face task models, batches are dictionaries of tensors as a tokenizer and
a `DataLoader` make them. Nothing here needs Flower, a configuration file or the command line.

The examples of this page continue one another, and begin with a model and some batches. These are
small and random, so that the examples take no time; any model of a supported family will do.

>>> import torch, transformers
>>> import fedpft_core as fp
>>> _ = torch.manual_seed(0)
>>> config = transformers.BertConfig(
...     vocab_size=50, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
...     intermediate_size=24, num_labels=3)
>>> fm = transformers.BertForSequenceClassification(config).eval()
>>> def batch():
...     ids = torch.randint(0, 50, (8, 12))
...     return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 1] % 3}
>>> batches = [batch() for _ in range(4)]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from fedpft_core.adapter import lora
from fedpft_core.align import method as alignment
from fedpft_core.align.distill import Progress
from fedpft_core.api._models import (
    expect,
    known_family,
    shaped_as_proxy,
    task_of,
    with_adapter,
    without_adapter,
)
from fedpft_core.api._rows import Rows
from fedpft_core.config import Config, from_flat
from fedpft_core.errors import UserError
from fedpft_core.head import refit as plug
from fedpft_core.model.plan import Plan
from fedpft_core.proxy import build, choose
from fedpft_core.task import Writer
from fedpft_core.train import agreement
from fedpft_core.train.tune import LocalSettings, TrainResult, train_on

Batches = Iterable[Mapping[str, Tensor]]
"""Batches as a `DataLoader` gives them: `input_ids` [B, L] and `attention_mask` [B, L], or
`pixel_values` [B, C, H, W]; where a function says that it needs them, `labels` as the model's
head has them: [B] class numbers or numbers, [B, K] zeros and ones for several labels a row, [B, L]
class numbers, or for a language model tokens, and -100 at tokens that are not learned."""


def make_plan(
    fm: nn.Module,
    *,
    keep_share: float = 0.25,
    keep_neurons: int = 0,
    retained_layers: str | Sequence[int] = "first,last",
    saliency: str = "weight-norm",
    qk_rank: int = 0,
    proxy: str = "ffn-pruned",
    drop_to: int = 0,
    batches: Batches | None = None,
    seed: int = 0,
) -> Plan:
    """Choose what a proxy keeps of a foundation model (paper section 4.1).

    Args:
        fm: the foundation model, a task model of a supported family without an adapter. Layers that
            hold several projections (GPT-2, ModernBERT) are taken apart in place, here and in every
            function that takes a model; what it computes stays the same.
        keep_share: share of the FFN neurons that each pruned block keeps, above 0 and at most 1.
        keep_neurons: the same as a number of neurons; 0 means that `keep_share` decides.
        retained_layers: blocks that stay whole, as indices or as a text such as `"first,last,3"`.
        saliency: how neurons are ranked; `docs/config.md` lists the choices of `plan.saliency`.
        qk_rank: rank of the query and key projections in pruned blocks; 0 leaves them as they are.
        proxy: `"ffn-pruned"` (the paper's sub-FM), `"layer-drop"` (whole blocks are left out, as in
            offsite tuning) or `"full"` (everything is kept).
        drop_to: blocks that a layer-drop proxy keeps; 0 means as many as have the parameters of the
            pruned proxy with the same `keep_share`.
        batches: public batches without labels, for saliencies that look at data (`"activation"`
            and `"gradient"`).
        seed: seed of the saliencies that draw random numbers.

    Returns:
        The plan, a value that can be compared, stored (`plan.to_json()`) and read back
        (`Plan.from_json(text)`). It holds no weights.

    Raises:
        UserError: the family is not supported, or a value is out of range for this model.

    Example:
        >>> plan = fp.make_plan(fm, keep_share=0.25, retained_layers="first,last")
        >>> plan.pruned
        (1, 2)
        >>> len(plan.blocks[1].kept)
        6
        >>> fp.Plan.from_json(plan.to_json()) == plan
        True
    """
    without_adapter(fm, "The FM")
    if not isinstance(retained_layers, str):
        retained_layers = ",".join(map(str, retained_layers))
    settings = _settings(
        "plan", keep_share=keep_share, keep_neurons=keep_neurons, retained_layers=retained_layers,
        saliency=saliency, qk_rank=qk_rank, proxy=proxy, drop_to=drop_to,
    ).plan  # fmt: skip
    public = None if batches is None else Rows(batches).once
    return choose.make_plan(fm, settings, seed, public, task_of(fm).position(known_family(fm)))


def build_proxy(fm: nn.Module, plan: Plan) -> nn.Module:
    """Build the proxy that a plan describes (paper section 4.1).

    Args:
        fm: the foundation model the plan was made for, without an adapter. It is left untouched.
        plan: what to keep of it.

    Returns:
        A new model of the same class in which pruned FFNs have fewer neurons and dropped blocks
        are missing. It is called like the FM and takes the same batches. `from_pretrained` cannot
        load it, because its blocks differ in width: build it again and load its `state_dict`.

    Raises:
        UserError: the plan was made for another model, or the model carries an adapter.

    Example:
        >>> proxy = fp.build_proxy(fm, plan)
        >>> [layer.output.dense.in_features for layer in proxy.bert.encoder.layer]
        [24, 6, 6, 24]
    """
    without_adapter(fm, "The FM")
    expect(fm, plan, "fm", "build_proxy")
    return build.build(fm, plan)


@dataclass(frozen=True)
class Distilled:
    """What a distillation came to.

    Attributes:
        first_loss: the first method's loss at its first step.
        last_loss: the last method's loss at its last step.
        seconds: time it took.
    """

    first_loss: float
    last_loss: float
    seconds: float


def distil(
    fm: nn.Module,
    proxy: nn.Module,
    plan: Plan,
    batches: Batches,
    *,
    method: str = "sgd",
    steps: int = 50,
    lr: float = 6e-4,
    alpha: float = 0.01,
    seed: int = 0,
    on_step: Progress | None = None,
) -> Distilled:
    """Align the proxy's compressed blocks with the FM's on public data (paper eqs. 3 to 5).

    The proxy changes in place, the FM does not. Both may carry an adapter, which stays as it is:
    aligning again during training is the same call.

    Args:
        fm: the foundation model, the teacher.
        proxy: its proxy by this plan, the student.
        plan: the plan the proxy was built from.
        batches: public batches; labels are not needed and not looked at. They are served again
            from the start where `steps` asks for more.
        method: how to align; `docs/config.md` lists the choices of `distill.method`, and
            `"a+b"` runs a, then b.
        steps: optimiser steps of the methods that take any, one batch each.
        lr: peak learning rate of AdamW, which rises shortly, then falls linearly.
        alpha: weight of the weight-product term (paper eq. 4).
        seed: seed of the methods that draw random numbers.
        on_step: called as `on_step(step, steps, loss)` after every step.

    Returns:
        Losses at the start and at the end, and the time it took. With nothing to align (a full
        plan, or no steps) all three are 0.

    Raises:
        UserError: model and plan do not belong together, the method does not exist or does not
            serve this kind of proxy, or there is no batch.

    Example:
        >>> done = fp.distil(fm, proxy, plan, batches, steps=20, lr=5e-3)
        >>> done.last_loss < done.first_loss
        True
    """
    expect(fm, plan, "fm", "distil")
    expect(proxy, plan, "proxy", "distil")
    settings = _settings("distill", method=method, steps=steps, lr=lr, alpha=alpha).distill
    if not alignment.needed(settings.method, plan, settings.steps):
        return Distilled(0.0, 0.0, 0.0)
    rows = Rows(batches, longest=max(settings.steps, settings.fit_batches))
    job = alignment.Job(
        fm, proxy, plan, rows.take, settings, steps=settings.steps, lr=settings.lr,
        alpha=settings.alpha, seed=seed, on_step=on_step,
        head_reads=task_of(fm).position(known_family(fm)),
    )  # fmt: skip
    return Distilled(*alignment.run(settings.method, job))


def attach(
    model: nn.Module,
    plan: Plan,
    *,
    rank: int = 8,
    alpha: float = 48.0,
    dropout: float = 0.1,
    modules_to_save: Sequence[str] = (),
    seed: int = 0,
) -> PeftModel:
    """Put the adapter on the FM or on its proxy: LoRA on attention, and the task head.

    The adapters of FM and proxy have the same tensors under the same names. At the same seed they
    start equal: LoRA's A random, B zero, the head as the model has it.

    Args:
        model: the FM or a proxy by this plan; which of the two it is shows in its shape. PEFT
            wraps it in place.
        plan: the plan that relates the two.
        rank: LoRA's rank r.
        alpha: LoRA's scale; updates are scaled by alpha / rank.
        dropout: dropout on LoRA's inputs while tuning.
        modules_to_save: further modules that are trained whole, by their name in the FM, for
            instance a pooler without trained weights (`"bert.pooler"`). A classifier's head always
            is; a language model has none that is trained.
        seed: seed of LoRA's A.

    Returns:
        The PEFT model. Only the adapter's parameters require gradients.

    Raises:
        UserError: model and plan do not belong together, or the model has an adapter already.

    Example:
        >>> fm, proxy = fp.attach(fm, plan, rank=4), fp.attach(proxy, plan, rank=4)
        >>> sum(p.numel() for p in proxy.parameters() if p.requires_grad)
        2099
    """
    family = without_adapter(model, "The model")
    is_proxy = shaped_as_proxy(model, plan)
    settings = _settings("lora", rank=rank, alpha=alpha, dropout=dropout).lora
    own = {name for name, _ in model.named_modules()}
    for name in modules_to_save:
        if name not in own:
            raise UserError(f"modules_to_save: the model has no module {name!r}.")
    head = task_of(model).head(family)
    spec = lora.make_spec(family, plan, tuple(modules_to_save), settings, head)
    names = plan if is_proxy else None
    wrapped = lora.attach(model, spec, names)
    lora.load(wrapped, lora.initial(wrapped, seed, names), names)
    return wrapped


def tune(
    model: nn.Module,
    batches: Batches,
    *,
    epochs: int = 1,
    steps: int = 0,
    lr: float = 3.2e-3,
    head_lr_scale: float = 10.0,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    seed: int = 0,
) -> TrainResult:
    """Train the adapter with AdamW at a constant rate (paper section 4.2).

    This is what one client does in one round, on the proxy. The FM can be tuned by the same call,
    for comparison. The model changes in place; everything but the adapter stays as it is.

    Args:
        model: a model that `attach` returned.
        batches: batches with `labels` [B]. A `DataLoader` that shuffles does so in every epoch.
        epochs: passes over the batches where `steps` is 0.
        steps: optimiser steps, one batch each; 0 means that `epochs` decides.
        lr: learning rate of LoRA's factors. The default was chosen for MiniLM, whose pooler is
            untrained; for other models begin with the paper's 8e-4 and `head_lr_scale=1`.
        head_lr_scale: the head's learning rate as a multiple of `lr`.
        weight_decay: AdamW's weight decay.
        clip: largest norm of the gradient; 0 means no clipping.
        seed: seed of the dropout.

    Returns:
        Mean loss per row, optimiser steps, rows seen, and seconds.

    Raises:
        UserError: the model has no adapter, or a batch has no labels.

    Example:
        >>> result = fp.tune(proxy, batches, epochs=3, lr=1e-2)
        >>> result.steps, result.rows
        (12, 96)
    """
    with_adapter(model, "tune")
    train = _settings(
        "train", lr=lr, head_lr_scale=head_lr_scale, local_epochs=epochs, local_steps=steps,
        weight_decay=weight_decay, clip=clip,
    ).train  # fmt: skip
    settings = LocalSettings(
        train.lr, train.batch_size, epochs, steps, train.weight_decay, train.clip, train.threads,
        train.head_lr_scale,
    )  # fmt: skip
    rows = Rows(batches, labelled="tune", longest=steps)
    served = rows.take(steps) if steps else rows.epochs(epochs)
    return train_on(model, task_of(model), served, settings, seed)


def plug_in(
    proxy: PeftModel,
    fm: PeftModel,
    plan: Plan,
    *,
    batches: Batches | None = None,
    ridge: float = 1.0,
) -> PeftModel:
    """Copy the adapter that was tuned on the proxy into the FM.

    With `batches` the head is then refitted to the features that the FM has in the place of the
    proxy's: least squares, without labels (not in the paper). If all batches have labels, the
    refitted head is taken only if it labels more of their rows right than the head as tuned;
    no row is judged by a fit to itself.

    Args:
        proxy: the proxy with the tuned adapter, as `attach` returned it. It stays as it is.
        fm: the FM as `attach` returned it; its adapter is filled in place.
        plan: the plan that relates the two.
        batches: rows to refit the head on, some hundred of them; None plugs the head in as tuned,
            as in the paper.
        ridge: pull of the refitted head towards the tuned one, as a share of the features' mean
            square.

    Returns:
        The FM. :func:`export` writes its adapter as an ordinary PEFT folder, which
        `PeftModel.from_pretrained` puts on an untouched copy of the FM.

    Raises:
        UserError: a model has no adapter, the two adapters differ in shape, or models and plan do
            not belong together.

    Example:
        >>> product = fp.plug_in(proxy, fm, plan, batches=batches)
        >>> product is fm
        True
    """
    with_adapter(proxy, "plug_in")
    with_adapter(fm, "plug_in")
    expect(proxy, plan, "proxy", "plug_in")
    expect(fm, plan, "fm", "plug_in")
    try:
        lora.load(fm, lora.read(proxy, plan))
    except ValueError as error:
        raise UserError(
            f"plug_in: the adapters of proxy and FM differ ({error}); attach both with the same "
            "plan, rank and modules."
        ) from error
    if batches is not None:
        ridge = _settings("plug", ridge=ridge).plug.ridge
        rows = Rows(batches)
        if not task_of(fm).refits:
            raise UserError("plug_in: the models have no head to refit; leave out `batches`.")
        judge = (lambda: iter(())) if rows.all_labelled() else None
        plug.refit_head(fm, proxy, task_of(fm), rows.once, ridge, judge)
    return fm


def export(fm: PeftModel, folder: str | Path, *, base_name: str = "") -> list[Path]:
    """Write the adapter of an FM as a PEFT folder for the model as the library has it.

    It is what `fm.save_pretrained` writes, but for models that keep several projections in one
    layer (GPT-2, ModernBERT): here these are layers of their own, and their adapters are put
    together again.

    Args:
        fm: the FM as `attach` returned it, with the adapter plugged in.
        folder: where to; made if it is not there.
        base_name: what the adapter's configuration calls the FM, a folder or a name on the hub;
            PEFT asks for it where the FM is to be loaded by the adapter's name.

    Returns:
        The files written.

    Raises:
        UserError: the model has no adapter.

    Example:
        >>> import tempfile
        >>> [file.name for file in fp.export(fm, tempfile.mkdtemp())]
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    with_adapter(fm, "export")
    kind = "CAUSAL_LM" if isinstance(task_of(fm), Writer) else None
    return lora.export(fm, Path(folder), base_name, kind)


def gradient_agreement(
    fm: PeftModel, proxy: PeftModel, plan: Plan, batches: Batches
) -> dict[str, Any]:
    """Measure how alike the adapter gradients of FM and proxy are on the same rows.

    A client sends what gradients of the proxy made of the adapter; the method rests on their being
    near those of the FM. The two models should carry the same adapter, as they do after `attach`
    with one seed, and after `plug_in`. Dropout is off.

    Args:
        fm: the FM as `attach` returned it.
        proxy: the proxy as `attach` returned it.
        plan: the plan that relates the two.
        batches: batches with `labels` [B]. Some dozen rows will do.

    Returns:
        `cosine` of the two gradients over LoRA's factors, and `relative_l2`, the norm of their
        difference over the norm of the FM's; `head_cosine` and `head_relative_l2` for the head;
        and `blocks`, a list with `block`, `cosine` and `relative_l2` of each block.

    Raises:
        UserError: a model has no adapter, a batch has no labels, or models and plan do not belong
            together.

    Example:
        >>> found = fp.gradient_agreement(fm, proxy, plan, batches)
        >>> -1 <= found["cosine"] <= 1
        True
        >>> [row["block"] for row in found["blocks"]]
        [0, 1, 2, 3]
    """
    with_adapter(fm, "gradient_agreement")
    with_adapter(proxy, "gradient_agreement")
    expect(fm, plan, "fm", "gradient_agreement")
    expect(proxy, plan, "proxy", "gradient_agreement")
    rows = list(Rows(batches, labelled="gradient_agreement").once())
    return agreement.compare_gradients(fm, proxy, plan, task_of(fm), rows, b_only=False)


def _settings(section: str, **values: Any) -> Config:
    """A configuration with these keys of one section; UserError for a wrong type or value."""
    return from_flat({f"{section}.{k.replace('_', '-')}": v for k, v in values.items()})
