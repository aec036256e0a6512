"""Many rounds on real Flower processes while nodes die and return at random.

    python tests/soak.py --rounds 40 FOLDER

A SuperLink and four SuperNodes on loopback, a tiny random model, and at about every other try of a
round a fault: a client process killed, a SuperNode killed and started again one or two tries
later, a node that leaves in order, half of the time without its disk when it returns. The same
seed picks the same faults, nodes and moments. At the end every round must be there once, in order,
with what its replies said; the last line printed is JSON with the counts, and the growth of the
processes' memory by round.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flower
import numpy as np
import psutil
import tiny
from flower import job

NAMES = ("node-a", "node-b", "node-c", "node-d")
WARM_UP = 5  # rounds before memory is looked at
FAULTS = (
    "client killed",
    "node killed",
    "node left",
    "node killed, disk lost",
    "node left, disk lost",
)


@dataclass
class Chaos:
    """Injects faults as the tries of rounds begin; a node that is down returns later."""

    d: flower.Deployment
    rng: random.Random
    share: float
    counts: Counter[str] = field(default_factory=Counter)
    returns: dict[str, int] = field(default_factory=dict)  # the try at which a node is back
    tries: int = 0

    def join(self, name: str) -> None:
        cache = str(self.d.folder / f"cache-{name}")
        self.d.start_node(name, self.d.folder / f"{name}.csv", **{"cache-dir": cache})

    def step(self, tries: int) -> None:
        """To be called often, with the number of tries begun so far."""
        if tries == self.tries:
            return
        self.tries = tries
        for name, when in list(self.returns.items()):
            if tries >= when:
                del self.returns[name]
                self.join(name)
        # Drawn always, so that what happened before changes nothing in what is drawn.
        hit, wait, away = (
            self.rng.random() < self.share,
            12 * self.rng.random(),
            self.rng.choice((1, 2)),
        )
        fault, name = self.rng.choice(FAULTS), self.rng.choice(NAMES)
        if not hit:
            return
        time.sleep(wait)
        if name in self.returns or (fault == "client killed" and not self._kill_client(name)):
            fault = "nobody there to hit"
        elif fault != "client killed":
            if "killed" in fault:
                flower.kill(self.d.nodes.pop(name))
            else:
                self.d.stop_node(name)
            if "disk lost" in fault:
                shutil.rmtree(self.d.folder / f"cache-{name}", ignore_errors=True)
            self.returns[name] = tries + away
        self.counts[fault] += 1
        print(f"{time.strftime('%H:%M:%S')} {name}: {fault}", flush=True)

    def _kill_client(self, name: str) -> bool:
        """Between messages there is none; wait for one for a while."""
        with contextlib.suppress(AssertionError, psutil.Error):
            self.d.client_process(name, 0.0, seconds=10).kill()
            return True
        return False


def growth(samples: list[tuple[int, int]]) -> dict[str, float]:
    """Resident memory by round: least-squares slope after the warm-up, MB a round."""
    late = np.array([(r, b / 1e6) for r, b in samples if r > WARM_UP])
    if len(late) < 3:
        return {}
    slope = float(np.polyfit(late[:, 0], late[:, 1], 1)[0])
    return {
        "first_MB": round(float(late[0, 1]), 1), "last_MB": round(float(late[-1, 1]), 1),
        "peak_MB": round(float(late[:, 1].max()), 1), "MB_per_round": round(slope, 3),
    }  # fmt: skip


def problems(run: Path, rounds: int) -> list[str]:
    """What got lost or came twice, if anything."""
    log: list[dict[str, Any]] = flower.events(run)
    out = []
    done = [e for e in log if e["event"] == "round_finished"]
    if [e["round"] for e in done] != list(range(1, rounds + 1)):
        out.append(f"rounds finished: {[e['round'] for e in done]}")
    tries = Counter(e["round"] for e in log if e["event"] == "round_started")
    started: list[str] = []
    replies: list[dict[str, Any]] = []
    for e in log:
        if e["event"] == "round_started":
            started, replies = list(e["clients"]), []
        elif e["event"] == "reply" and e["status"] != "need":
            replies.append(e)
        elif e["event"] == "round_finished":
            good = [r for r in replies if r["status"] == "ok"]
            if sorted(r["client"] for r in replies) != started:
                out.append(f"round {e['round']}: asked {started}, settled {replies}")
            if (e["good"], e["examples"]) != (len(good), sum(r["examples"] for r in good)):
                out.append(f"round {e['round']}: {e} is not the sum of {good}")
            if any(r["round"] != e["round"] for r in replies):
                out.append(f"round {e['round']}: a reply of another round")
    out += [f"refused: {e}" for e in log if e["event"] == "reply" and e["status"] == "refused"]
    out += [f"round {r} took {n} tries" for r, n in tries.items() if n > 5]
    if not log or log[-1]["event"] != "run_finished":
        out.append("the run did not finish")
    elif not (run / "adapter" / "adapter_model.safetensors").exists():
        out.append("no adapter")
    return out


def main() -> int:
    """Run the soak; the exit status is 0 when nothing was lost and memory stayed flat."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--share", type=float, default=0.5, help="of tries that meet a fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most-growth", type=float, default=0.5, help="of the server, MB a round")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # nothing is to outlive this
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    tree = job(
        folder, **{"rounds": args.rounds, "clients": len(NAMES), "clients-per-round": 3,
                   "min-clients": 2, "attempts": 5, "round-timeout": 150.0},
    )  # fmt: skip
    tree["data"]["train"] = ""
    config, run = flower.write_config(folder / "run.yaml", tree), folder / "run"
    memory: dict[str, list[tuple[int, int]]] = {"server": [], "superlink": []}
    began = time.monotonic()
    with flower.deployment(folder / "flower") as d:
        chaos = Chaos(d, random.Random(args.seed), args.share)
        for i, name in enumerate(NAMES):
            tiny.write_csv(d.folder / f"{name}.csv", tiny.sentences(30 + i, 50 + i))
            chaos.join(name)
        cli = d.run(run, config)
        flower.wait_for(run, "round_finished", 300, cli, round=1)
        server = d.server_process()
        assert d.superlink is not None
        watched = {"server": server, "superlink": psutil.Process(d.superlink.pid)}
        seen = 1
        while cli.poll() is None:
            log = flower.events(run)
            chaos.step(sum(e["event"] == "round_started" for e in log))
            done = max(int(str(e["round"])) for e in log if e["event"] == "round_finished")
            if done > seen:
                seen = done
                for name, process in watched.items():
                    with contextlib.suppress(psutil.Error):
                        memory[name].append((done, process.memory_info().rss))
                print(f"{time.strftime('%H:%M:%S')} round {done} done", flush=True)
            time.sleep(1)
        flower_says = d.last_run()
        logs = d.logs()
    found = problems(run, args.rounds)
    if flower_says["status"] != "finished:completed" or cli.returncode:
        found.append(f"{flower_says['status']}, exit status {cli.returncode}\n{logs}")
    grown = {name: growth(samples) for name, samples in memory.items()}
    if grown["server"].get("MB_per_round", 0.0) > args.most_growth:
        found.append(f"the server grew: {grown['server']}")
    print(*found, sep="\n")
    log = flower.events(run)
    print(json.dumps({
        "rounds": seen,
        "repeated": sum(e["event"] == "round_started" and e["attempt"] > 1 for e in log),
        "faults": dict(chaos.counts),
        "replies": Counter(e["status"] for e in log if e["event"] == "reply"),
        "problems": len(found),
        "memory": grown,
        "database_MB": round((folder / "flower" / "state.db").stat().st_size / 1e6, 1),
        "seconds": round(time.monotonic() - began),
    }))  # fmt: skip
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
