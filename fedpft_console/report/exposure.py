"""What of the FM has left in a run, in words and figures."""

from __future__ import annotations

from dataclasses import dataclass

from fedpft_console.sheet import Sheet
from fedpft_console.text import Measure, human_bytes, human_count, percent
from server_app.run.record import Record
from server_app.run.schema import Exposed

TITLE = "What left of the FM"


@dataclass(frozen=True)
class Part:
    """Parameters of one part of the FM, over all versions of the sub-FM that a run has sent.

    Attributes:
        name: embeddings, attention, FFN, norms or other; `all` for their sum.
        fm: how many the FM has.
        sent: how many left, changed or not.
        copied: how many left with the FM's bits, as far as one version tells.
    """

    name: str
    fm: int
    sent: int
    copied: int


def versions(record: Record, arm: str = "") -> list[Exposed]:
    """What the versions of the sub-FM hold, in the order in which they were made.

    Args:
        record: a run in any state.
        arm: a side run's name; empty for the run itself.

    Returns:
        One for each version; empty for a run of before this was noted.
    """
    return list(record.exposed.get(arm, {}).values())


def parts(found: list[Exposed]) -> list[Part]:
    """Each part of the FM by the version that holds most copies of it, and all together.

    Args:
        found: of the versions of one run, at least one.

    Returns:
        Parts in reading order, with their sum as `all`.
    """
    out = []
    for i, part in enumerate(found[0].parts):
        same = [e.parts[i] for e in found]
        sent, copied = max(p["sent"] for p in same), max(p["copied"] for p in same)
        out.append(Part(part["part"], part["fm"], sent, copied))
    sums = [sum(getattr(p, f) for p in out) for f in ("fm", "sent", "copied")]
    return [*out, Part("all", *sums)]


def share(part: int, whole: int) -> str:
    """A share as text.

    Args:
        part: how many.
        whole: of how many.

    Returns:
        Percent with one decimal; a dash of nothing.
    """
    return percent(part / whole) if whole else "-"


def alone(record: Record) -> tuple[str, str]:
    """The last scores of the tuned sub-FM by itself and of the product.

    Args:
        record: a run in any state.

    Returns:
        Both as text; a dash where there is none.
    """
    measure = Measure.of(record.task)
    last = next((r for r in reversed(record.rounds) if r.proxy and r.fm), None)
    if last is None or last.proxy is None or last.fm is None:
        return "-", "-"
    return measure.shown(last.proxy.value), measure.shown(last.fm.value)


def sheet(record: Record) -> Sheet:
    """The report's table of what left.

    Args:
        record: a run in any state.

    Returns:
        A table with a row for each part; without rows for a run that has noted nothing.
    """
    found = versions(record)
    columns = ["", "FM", "left", "share", "bit-equal", "share"]
    if not found:
        return Sheet(TITLE, columns, [])
    rows = [
        [
            p.name, human_count(p.fm), human_count(p.sent), share(p.sent, p.fm),
            human_count(p.copied), share(p.copied, p.fm),
        ]
        for p in parts(found)
    ]  # fmt: skip
    last, left = found[-1], max(e.disclosed for e in found)
    most = max(found, key=lambda e: e.copied)
    rows.append([
        "FFN neurons", f"{last.neurons:,}", f"{left:,}", share(left, last.neurons),
        f"{most.copied:,}", share(most.copied, last.neurons),
    ])  # fmt: skip
    return Sheet(TITLE, columns, rows, _notes(record, found))


def _notes(record: Record, found: list[Exposed]) -> list[str]:
    last = found[-1]
    notes = ["Parameters, without the head. Bit-equal: exact copies; the rest was changed."]
    if last.simulated:
        notes.append(
            "A simulation: this would leave in a deployment, and the ledger has nothing of it."
        )
    over = "With the runs in the ledger" if last.simulated else "Over all runs in the ledger"
    notes.append(
        f"{over}: {last.ever:,} of {last.neurons:,} neurons ({share(last.ever, last.neurons)})."
    )
    if last.disguised:
        notes.append("Order, and scale where it is exact, of the neurons are secret.")
    if last.withheld:
        notes.append(f"{last.withheld:,} rows of the embedding table stayed home.")
    for arm in record.exposed:
        if arm:
            aside = versions(record, arm)[0]
            total = parts([aside])[-1]
            notes.append(
                f"Side run {arm}: {share(total.copied, total.fm)} of the parameters and "
                f"{aside.copied:,} of {aside.disclosed:,} neurons sent left bit-equal."
            )
    proxy, fm = alone(record)
    if proxy != "-":
        notes.append(
            f"Whoever has the sub-FM and the adapter has a model of {proxy}; the product has {fm}."
        )
    return notes


def sent_bytes(record: Record) -> str:
    """What packages and patches of a run came to, to all clients and with side runs.

    Args:
        record: a run in any state.

    Returns:
        Bytes as text.
    """
    both = sum(record.bytes("down", kind) for kind in ("package", "patch"))
    return human_bytes(both)
