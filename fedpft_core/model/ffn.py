"""The feed-forward network of one block, neuron by neuron, whatever its family calls the parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fedpft_core.model.family import Family


class FFN:
    """The feed-forward network of one block, neuron by neuron.

    F neurons, model width D. Neuron j is row j of every in-projection [F, D] with its bias and
    column j of the out-projection [D, F] (paper section 4.1).
    """

    def __init__(self, family: Family, block: nn.Module) -> None:
        self.family = family
        self.block = block

    def _linear(self, path: str) -> nn.Linear:
        module = self.block.get_submodule(path)
        assert isinstance(module, nn.Linear), f"{path} is {type(module).__name__}"
        return module

    @property
    def ins(self) -> list[nn.Linear]:
        """The projections into the FFN, each with weight [F, D]: one, or gate then up."""
        return [self._linear(path) for path in self.family.ffn_in]

    @property
    def out(self) -> nn.Linear:
        """The projection out of the FFN, with weight [D, F]."""
        return self._linear(self.family.ffn_out)

    @property
    def activation(self) -> nn.Module:
        """The module whose output is the neurons' activations [..., F]."""
        return self.block.get_submodule(self.family.activation)

    def inner(self, x: Tensor) -> Tensor:
        """What enters the out-projection.

        Args:
            x: the FFN's input [..., D].

        Returns:
            [..., F]: the activations, in gated FFNs times the up-projection.
        """
        ins = self.ins
        a: Tensor = self.activation(ins[0](x))
        return a * ins[1](x) if len(ins) > 1 else a

    def __call__(self, x: Tensor) -> Tensor:
        """The FFN alone, [..., D] → [..., D]: no residual, no norm, no dropout."""
        y: Tensor = self.out(self.inner(x))
        return y

    @property
    def norm(self) -> nn.Module | None:
        """The LayerNorm after the FFN output (post-norm families), else None."""
        path = self.family.output_norm
        return self.block.get_submodule(path) if path else None

    def after(self, y: Tensor) -> Tensor:
        """What is added to the residual stream.

        Args:
            y: the FFN's output [..., D].

        Returns:
            [..., D]: the same, but where the family scales it or norms it first.
        """
        path = self.family.after_ffn
        scaled: Tensor = self.block.get_submodule(path)(y) if path else y
        return scaled

    @property
    def neurons(self) -> int:
        """Neurons of this FFN: F of the FM, or as many as the plan has kept."""
        return self.out.in_features

    def parts(self) -> dict[str, Tensor]:
        """Every parameter alignment may move, by a family-independent name.

        Returns:
            The parameters themselves: `in0.weight`, `in0.bias` (for gated FFNs `in1` as well),
            `out.weight`, `out.bias`, and `norm.*` of post-norm families.
        """
        named: dict[str, Tensor] = {}
        for i, linear in enumerate(self.ins):
            named[f"in{i}.weight"] = linear.weight
            if linear.bias is not None:
                named[f"in{i}.bias"] = linear.bias
        named["out.weight"] = self.out.weight
        if self.out.bias is not None:
            named["out.bias"] = self.out.bias
        norm = self.norm
        if norm is not None:
            named |= {f"norm.{k}": p for k, p in norm.named_parameters()}
        return named

    @staticmethod
    def neuron_axis(part: str) -> int | None:
        """Which axis of a part counts neurons.

        Args:
            part: a name that `parts` gives.

        Returns:
            0 for in-projections, 1 for `out.weight`, None where all neurons share the part.
        """
        if part.startswith("in"):
            return 0
        return 1 if part == "out.weight" else None

    def read(self, index: Tensor) -> dict[str, Tensor]:
        """Copies of the chosen neurons' rows and columns and of the shared parts.

        Args:
            index: int64 [m], positions of the neurons in this FFN, on its device.

        Returns:
            By the names of `parts`: rows [m, D], biases [m], columns as they lie [D, m].
        """
        out = {}
        for part, p in self.parts().items():
            axis = self.neuron_axis(part)
            value = p.detach() if axis is None else p.detach().index_select(axis, index)
            out[part] = value.clone()
        return out

    @torch.no_grad()
    def write(self, index: Tensor, values: dict[str, Tensor]) -> None:
        """Set chosen neurons and the shared parts, in place: the inverse of `read`.

        Args:
            index: int64 [m], positions of the neurons in this FFN.
            values: what `read` gave for as many neurons, of any device and float type.

        Raises:
            ValueError: parts are missing or too much, or a shape does not fit.
        """
        parts = self.parts()
        if set(values) != set(parts):
            raise ValueError(f"expected parts {sorted(parts)}, got {sorted(values)}")
        for part, p in parts.items():
            axis, value = self.neuron_axis(part), values[part].to(p.dtype).to(p.device)
            want = list(p.shape)
            if axis is not None:
                want[axis] = len(index)
            if list(value.shape) != want:
                raise ValueError(f"{part}: expected shape {want}, got {list(value.shape)}")
            if axis is None:
                p.copy_(value)
            else:
                p.index_copy_(axis, index.to(p.device), value)

    def resized(self, neurons: int) -> dict[str, nn.Linear]:
        """Uninitialised linears of this FFN for another number of neurons.

        Args:
            neurons: how many they are for.

        Returns:
            By path relative to the block, with bias, device and float type as in this FFN.
        """
        out: dict[str, nn.Linear] = {}
        for path in self.family.ffn_in:
            old = self._linear(path)
            out[path] = _empty_linear(old.in_features, neurons, old)
        old = self.out
        out[self.family.ffn_out] = _empty_linear(neurons, old.out_features, old)
        return out


def _empty_linear(d_in: int, d_out: int, like: nn.Linear) -> nn.Linear:
    return nn.utils.skip_init(
        nn.Linear,
        d_in,
        d_out,
        bias=like.bias is not None,
        device=like.weight.device,
        dtype=like.weight.dtype,
    )
