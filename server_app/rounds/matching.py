"""Which width a client is given: the widest that fits, and a narrower one where it fails."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fedpft_core import registry
from fedpft_core.adapter.layers import readable
from fedpft_core.config import Config
from fedpft_core.errors import ReplyError
from fedpft_core.proxy.int8 import BASES
from fedpft_core.proxy.memory import package_bytes, training_bytes
from fedpft_core.wire.package import Package
from server_app.run import schema as ev
from server_app.state import Events, Given, State

_MOST_MISSED = 2  # deadlines missed one after the other at which a client is moved down


class Matching:
    """Gives clients widths, and moves down those that fail.

    Args:
        config: the run's configuration.
        events: who has been given what is noted there.
    """

    def __init__(self, config: Config, events: Events) -> None:
        self.config = config
        self.events = events
        self._sizes: dict[tuple[str, str, str], tuple[int, int]] = {}

    def meet(self, client: str, means: Mapping[str, int | str], state: State, round: int) -> None:
        """Give a client the widest sub-FM that fits, which is noted in the state.

        Args:
            client: its name.
            means: what it says that it has and will take (`HelloReply.means`).
            state: has the sub-FMs of all widths, and what the client was given before.
            round: the round it is met in.

        Raises:
            ReplyError: nothing fits, or what it says cannot be met.
        """
        if not means and not state.others:
            return
        before = state.given.get(client, Given())
        blocks, base = self._blocks(means), _base(means)
        names = list(state.widths)
        asked = str(means.get("width", ""))
        if asked and asked not in names:
            there = ", ".join(names) if state.others else "this run has one sub-FM"
            raise ReplyError(f"its width {asked} is none of plan.widths ({there})")
        most = min(names.index(w) if w in names else len(names) - 1 for w in (asked, before.most))
        chosen = self._widest(names[: most + 1], means, state, blocks)
        if chosen is None and not blocks and self._by_tensor():
            # Fewer blocks, from the last on, keep less for the backward pass.
            count = len(state.package.meta.plan.present)
            for n in range(count - 1, 0, -1):
                blocks = f"last:{n}"
                chosen = self._widest(names[:1], means, state, blocks)
                if chosen is not None:
                    break
        if chosen is None:
            package, memory = self._needs(state, names[0], "", base)
            raise ReplyError(
                f"its budget ({_said(means)}) is below the smallest width"
                f"{f', {names[0]}' if names[0] else ''}: a package of {package / 1e6:.1f} MB, and "
                f"{memory / 1e6:.0f} MB of memory"
            )
        given = replace(before, width=chosen, blocks=blocks)
        if client not in state.given or given != before:
            self._say(round, client, given, before.width, _why(means, before))
        state.given[client] = given

    def down(self, client: str, why: str, state: State, round: int) -> bool:
        """Give a client the next narrower width.

        Args:
            client: its name.
            why: what it has failed with, in a few words.
            state: has what it was given.
            round: the round it has failed in.

        Returns:
            Whether there is a narrower one.
        """
        before = state.given.get(client, Given())
        names = list(state.widths)
        at = names.index(before.width or state.width)
        if at == 0:
            return False
        given = replace(before, width=names[at - 1], most=names[at - 1], missed=0)
        state.given[client] = given
        self._say(round, client, given, names[at], why)
        return True

    def missed(self, client: str, state: State, round: int) -> None:
        """Note that a client has missed a round's deadline; the second time it is moved down.

        Args:
            client: its name.
            state: has what it was given.
            round: the round.
        """
        if not state.others:
            return
        before = state.given.get(client, Given(state.width))
        given = replace(before, missed=before.missed + 1)
        state.given[client] = given
        if given.missed >= _MOST_MISSED:
            self.down(client, f"it missed {_MOST_MISSED} deadlines", state, round)

    def kept(self, client: str, state: State) -> None:
        """Note that a client has answered in time.

        Args:
            client: its name.
            state: has what it was given.
        """
        before = state.given.get(client)
        if before and before.missed:
            state.given[client] = replace(before, missed=0)

    def _blocks(self, means: Mapping[str, int | str]) -> str:
        blocks = str(means.get("blocks", ""))
        if not readable(blocks):
            raise ReplyError(f"its blocks {blocks!r} are not first:n or last:n")
        if blocks and not self._by_tensor():
            f = self.config.federation
            raise ReplyError(
                f"it trains LoRA in some blocks ({blocks}), and federation.aggregate = "
                f"{f.aggregate} takes whole adapters"
            )
        return blocks

    def _by_tensor(self) -> bool:
        """Whether replies may lack tensors."""
        f, p = self.config.federation, self.config.privacy
        module = registry.load("aggregation", f.aggregate) if f.aggregate != "none" else None
        plain = getattr(module, "BY_TENSOR", False)
        return bool(plain) and not p.secure and not p.client_noise

    def _widest(
        self, names: list[str], means: Mapping[str, int | str], state: State, blocks: str
    ) -> str | None:
        """The last of some widths that a client has room for."""
        for name in reversed(names):
            needs = self._needs(state, name, blocks, _base(means))
            limits = (int(means.get("package", 0)), int(means.get("memory", 0)))
            if all(not most or need <= most for need, most in zip(needs, limits, strict=True)):
                return name
        return None

    def _needs(self, state: State, name: str, blocks: str, base: str) -> tuple[int, int]:
        """Bytes of a width's package, and of memory to train on it."""
        if (name, blocks, base) not in self._sizes:
            package = state.widths[name].package
            batch = self.config.train.batch_size
            self._sizes[name, blocks, base] = needs(package, batch, blocks, base)
        return self._sizes[name, blocks, base]

    def _say(self, round: int, client: str, given: Given, before: str, why: str) -> None:
        self.events.emit(ev.WidthGiven(
            round=round, client=client, width=given.width, before=before, blocks=given.blocks,
            reason=why,
        ))  # fmt: skip


def needs(
    package: Package, batch_size: int, blocks: str = "", base: str = "float"
) -> tuple[int, int]:
    """What a client needs for a sub-FM.

    Args:
        package: the sub-FM's.
        batch_size: rows of a step.
        blocks: whose LoRA is trained; empty = all.
        base: what the client holds frozen linear layers in, one of `BASES`.

    Returns:
        Bytes of the package, and bytes of memory.
    """
    return package_bytes(package), training_bytes(package, batch_size, blocks, base)


def _base(means: Mapping[str, int | str]) -> str:
    base = str(means.get("base", BASES[0]))
    if base not in BASES:
        raise ReplyError(f"its base {base!r} is none of {', '.join(BASES)}")
    return base


def _said(means: Mapping[str, int | str]) -> str:
    """A client's means in words."""
    words = []
    for key, what in (("package", "a package"), ("memory", "memory")):
        if means.get(key):
            words.append(f"{what} of {int(means[key]) / 1e6:.1f} MB")
    if means.get("blocks"):
        words.append(f"blocks {means['blocks']}")
    return ", ".join(words) or "nothing said"


def _why(means: Mapping[str, int | str], before: Given) -> str:
    if before.most:
        return f"no wider than {before.most}, after it has failed"
    if means.get("width"):
        return "as the node says"
    if means.get("package") or means.get("memory"):
        return f"the widest that fits {_said(means)}"
    return "the widest: the node sets no limit"


__all__ = ["Matching", "needs"]
