"""Patches: what an alignment changed in the proxy, made on the server and applied by clients."""

from __future__ import annotations

from torch import Tensor, nn

from fedpft_core.errors import ReplyError
from fedpft_core.model.families import FFN
from fedpft_core.model.names import PatchedWeights
from fedpft_core.model.plan import Plan, pruned_ffns
from fedpft_core.proxy.recut import apply_recut, is_recut
from fedpft_core.wire.identity import combine_digest, tensor_digest
from fedpft_core.wire.package import Package, Patch


def apply_patch(package: Package, patch: Patch, digests: dict[str, str]) -> Package:
    """Bring a package from one version to the next.

    Args:
        package: the version that the patch starts from; stays as it was.
        patch: what the alignment changed.
        digests: sha256 of each weight of the package, by name; updated in place on success.

    Returns:
        A new package, which shares unchanged weights with the old one.

    Raises:
        ReplyError: the patch does not fit or does not lead to the digest it promises.
    """
    if is_recut(patch):
        return apply_recut(package, patch, digests)
    names = PatchedWeights(package.meta.plan)
    weights = dict(package.weights)
    fresh: dict[str, str] = {}
    try:
        for block, (index, parts) in patch.decoded().items():
            for part, value in parts.items():
                name = names.name(block, part)
                axis = FFN.neuron_axis(part)
                if axis is None:
                    if value.shape != weights[name].shape:
                        raise ReplyError(f"patch of {name} has shape {list(value.shape)}")
                    new = value.to(weights[name].dtype)
                else:
                    new = weights[name].index_copy(axis, index, value.to(weights[name].dtype))
                weights[name] = new.contiguous()
                fresh[name] = tensor_digest(weights[name])
    except (KeyError, IndexError, RuntimeError, ValueError) as error:
        raise ReplyError(f"the patch does not fit ({error})") from error
    if combine_digest(package.meta.to_json(), package.files, digests | fresh) != patch.target:
        raise ReplyError("the patched sub-FM does not have the digest that was promised")
    digests |= fresh
    return Package(package.meta, package.files, weights)


def make_patch(
    proxy: nn.Module,
    plan: Plan,
    chosen: dict[int, Tensor],
    package: Package,
    digests: dict[str, str],
    fmt: str,
) -> tuple[Patch, Package]:
    """Turn what an alignment left in `proxy` into a patch and the next package.

    In a lossy wire format the proxy takes the decoded values, so that server and clients hold
    the same bits.

    Args:
        proxy: aligned, bare or with the adapter; changed in place as said above.
        plan: what the proxy was built from.
        chosen: for every pruned block of the FM the neurons that moved, int64 [m] positions among
            the kept ones.
        package: the version before the alignment.
        digests: sha256 of each weight of that version, by name; updated in place.
        fmt: wire format of the patch, one of `codec.FORMATS`.

    Returns:
        The patch, and the package that it leads to.
    """
    ffns = pruned_ffns(proxy, plan)
    flat: dict[str, Tensor] = {}
    for block, ffn in ffns.items():
        index = chosen[block]
        flat[f"{block}/index"] = index.cpu()
        values = ffn.read(index.to(ffn.out.weight.device))
        flat |= {f"{block}/{part}": t.cpu() for part, t in values.items()}
    tensors = Patch.encoded(flat, fmt)
    draft = Patch(_digest(package, digests), "", fmt, tensors)
    names, weights, fresh = PatchedWeights(plan), dict(package.weights), {}
    for block, (index, parts) in draft.decoded().items():
        ffns[block].write(index, parts)
        for part in parts:
            name = names.name(block, part)
            weights[name] = ffns[block].parts()[part].detach().cpu().clone().contiguous()
            fresh[name] = tensor_digest(weights[name])
    digests |= fresh
    after = Package(package.meta, package.files, weights)
    return Patch(draft.source, _digest(after, digests), fmt, tensors), after


def _digest(package: Package, digests: dict[str, str]) -> str:
    return combine_digest(package.meta.to_json(), package.files, digests)
