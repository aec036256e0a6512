"""`fedpft node check` given a hundred broken things: it always ends in a table or one sentence."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fabricate
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from corrupt import ODD, RAW

from client_app.check.findings import FAIL, PASS, SKIPPED, UNFORESEEN, Finding
from client_app.check.node import Options, check
from client_app.store import Store
from fedpft_console import cli
from fedpft_core import config
from fedpft_core.errors import ReplyError, UserError
from fedpft_core.proxy import size as plansize
from fedpft_core.wire.identity import combine_digest, tensor_digest
from fedpft_core.wire.meta import PackageMeta

JUNK = np.random.default_rng(0).integers(0, 256, 4000, np.uint8).tobytes()
DEEP = b"[" * 100_000 + b"]" * 100_000
SIZES = [
    "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size",
    "max_position_embeddings", "type_vocab_size", "num_labels",
]  # fmt: skip
NUMBERS = [0, -1, 1, 7, 10**5, 2**31, 2**53, 2**63, 10**40, 1.5, float("nan"), "a", None, [], {}]


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """A check that waits for ever on what it was given fails, and does not hang."""

    def late(*_: Any) -> None:
        raise KeyboardInterrupt("the check did not end")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A description of a plan as `fedpft inspect --json` prints it."""
    folder = tmp_path_factory.mktemp("fm")
    flat = {
        "model.name": str(tiny.folder("bert", folder / "fm")), "plan.keep-share": 0.5,
        "data.labels": ",".join(tiny.LABELS), "data.max-length": 16,
    }  # fmt: skip
    return plansize.describe(config.from_flat(flat)).to_json()


def node_config(folder: Path, **more: Any) -> str:
    keys = {
        "name": "a", "data-path": str(folder / "rows.csv"), "cache-dir": str(folder / "cache"),
    } | {k.replace("_", "-"): v for k, v in more.items()}  # fmt: skip
    return " ".join(f"{k}={json.dumps(v)}" for k, v in keys.items())


def look(text: str, **options: Any) -> dict[str, Finding]:
    """The findings, each of which must be one printable line that was foreseen."""
    try:
        found = check(Options(text, **options))
    except UserError as error:
        found = [Finding("options", FAIL, str(error))]
    for f in found:
        assert f.status in (PASS, FAIL, SKIPPED), f
        assert f.text and f.text.isprintable() and len(f.text) < 1000, f
        assert not f.text.startswith(UNFORESEEN), f
    return {f.name: f for f in found}


# --- node configs -------------------------------------------------------------------------

CONFIGS = [
    "", " ", "=", "a", "a=", "=a", "name", "name=", "name=''", '"', "name='a", "name=\"\\ud800\"",
    "name=a", "name=[1]", "name={a=1}", "name=1979-05-27", "name=" + "9" * 5000,
    "name='a' data-path='\x00'", "name='a' data-path=\"\\u0000\"", "name='a' data-path='.'",
    "name='a' data-path='" + "x" * 5000 + ".csv'", "name='a' data-path='x.csv\udc80'",
    "name='a' data-path='\ud800.csv'", "name='a' name='b'", "a.b.c=1 a.b=2", "validation-share=nan",
    "validation-share=" + "9" * 4000, "validation-share=-1", "max-threads=-5", "max-threads=1.5",
    "max-threads=" + "9" * 30, "device='x'", "device='meta'", "device='cuda:99'", "device=''",
    "cache-dir='~nobody-has-this-name/x'", "cache-dir='/proc/none'", "cache-dir='\\x00'",
    "label-column='none'", "text-column=''", "text-pair-column='text'", "image-column='text'",
    "name=" + "[" * 5000 + "]" * 5000, "/none.toml", "~nobody-has-this-name/x.toml", "\x00.toml",
    "/.toml", "x" * 5000 + ".toml", "text-column='label' label-column='text'",
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(CONFIGS)))
def test_odd_node_configs(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a cache folder may be named relative to where the node is
    tiny.write_csv(tmp_path / "rows.csv", tiny.sentences(12))
    text = CONFIGS[number]
    look(text)
    with contextlib.suppress(ValueError):
        key = text.partition("=")[0]
        rest = node_config(tmp_path).split(" ")
        look(" ".join([*(r for r in rest if not r.startswith(f"{key}=")), text]))


@pytest.mark.parametrize("seed", range(3))
def test_node_configs_with_characters_changed(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    tiny.write_csv(tmp_path / "rows.csv", tiny.sentences(12))
    for _ in range(20):
        text = list(node_config(tmp_path, validation_share=0.5, max_threads=2, device="cpu"))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(text))
            text[at] = rng.choice(
                ["", "=", '"', "'", "\\", " ", "\n", "é", "\ud800", "0", "~", "{"]
            )
        changed = "".join(text)
        # The cache folder may be any the text now names, so it has to be one below the test's.
        if f'cache-dir="{tmp_path}/' in changed:
            look(changed)


@pytest.mark.parametrize("data", [JUNK, DEEP, b"a = " + DEEP, b"\xff", b"", b"[a]\nb=1", b"a=1\0"])
def test_odd_files_of_a_node_config(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "node.toml").write_bytes(data)
    assert look(str(tmp_path / "node.toml"))["node config"].status == FAIL


# --- plans --------------------------------------------------------------------------------


def with_meta(good: str, change: Callable[[dict[str, Any]], None]) -> bytes:
    plan = json.loads(good)
    change(plan["meta"])
    return json.dumps(plan).encode()


def broken_plan(good: str, rng: random.Random) -> bytes:
    """A plan file with one thing wrong, at any depth."""
    plan = json.loads(good)
    kind = rng.choice(["cut", "flip", "key", "gone", "raw", "meta", "size", "model", "plan"])
    odd = rng.choice([*ODD, *NUMBERS])

    def put(tree: dict[str, Any]) -> None:
        tree[rng.choice(sorted(tree))] = odd

    if kind == "cut":
        return good.encode()[: rng.randrange(len(good))]
    if kind == "flip":
        data = bytearray(good.encode())
        for _ in range(rng.randint(1, 5)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(data)
    if kind == "key":
        put(plan)
    elif kind == "gone":
        del plan[rng.choice(sorted(plan))]
    elif kind == "raw":
        key = rng.choice(sorted(plan))
        return json.dumps(plan | {key: "@"}).replace('"@"', rng.choice(RAW)).encode()
    elif kind == "meta":
        return with_meta(good, put)
    elif kind in ("size", "model"):
        name = rng.choice(SIZES)
        if kind == "model":
            return with_meta(good, lambda meta: put(meta["model_config"]))
        return with_meta(good, lambda meta: meta["model_config"].update({name: odd}))
    else:

        def inner(meta: dict[str, Any]) -> None:
            name = rng.choice(["plan", "adapter"])
            tree = meta[name]
            put(tree["blocks"][1] if name == "plan" and rng.random() < 0.5 else tree)

        return with_meta(good, inner)
    return json.dumps(plan).encode()


@pytest.mark.parametrize("seed", range(40))
def test_broken_plans(seed: int, good: str, tmp_path: Path) -> None:
    rng = random.Random(seed)
    path = tmp_path / "plan.json"
    path.write_bytes(broken_plan(good, rng))
    tiny.write_csv(tmp_path / "rows.csv", tiny.sentences(12))
    look(node_config(tmp_path), plan=path)


@pytest.mark.parametrize(
    "sizes",
    [
        {"vocab_size": 10**8}, {"hidden_size": 2**20, "num_attention_heads": 1},
        {"num_hidden_layers": 10**9}, {"num_labels": 10**9}, {"max_position_embeddings": 10**12},
        {"intermediate_size": 2**40}, {"type_vocab_size": 10**11},
    ],
)  # fmt: skip
def test_a_plan_of_a_giant_takes_neither_memory_nor_time(
    sizes: dict[str, int], good: str, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(with_meta(good, lambda meta: meta["model_config"].update(sizes)))
    tiny.write_csv(tmp_path / "rows.csv", tiny.sentences(12))
    found = look(node_config(tmp_path), plan=path)
    step = found["training step"]
    assert FAIL in (step.status, found["memory"].status, found["plan"].status), found
    assert step.status != PASS


@pytest.mark.parametrize(
    "data", [b"", JUNK, DEEP, b"\xff\xfe{}", b"null", b"{}", b"[]", b"\0", b"1e999"]
)
def test_odd_plan_files(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(data)
    assert look(node_config(tmp_path), plan=path)["plan"].status == FAIL


# --- data ---------------------------------------------------------------------------------

DATA: dict[str, list[bytes]] = {
    "csv": [
        b"", b" \n", JUNK, b"text,label", b"text,label\n", b"text,label\n,x\n", b"text,label\na\n",
        b'text,label\n"a,b\n', b"text,label\na,b,c\n", b"text,text,label\na,b,c\n", b"\xff,label\n",
        b"text,label\na\0b,x\n", b"label,text\n ,a\n", b"text,label\na," + b"9" * 5000 + b"\n",
        b"text,label\n" + b"a" * 300_000 + b",x\n", b"text,label\na,\x1b[31mred\x07\n",
        "text,label\na,é\u2028b\u202e\n".encode(), b"\xef\xbb\xbf", b"text;label\na;b\n",
    ],
    "jsonl": [
        JUNK, DEEP, b"{", b"[]", b"1", b"null", b'{"text": "a"}', b'{"text": 1, "label": "x"}',
        b'{"text": "\\ud800", "label": "x"}', b'{"text": "a", "label": "\\ud800"}',
        b'{"text": "a", "label": ' + b"9" * 5000 + b"}", b'{"text": "a", "label": 1e999}',
        b'{"text": "a", "label": NaN}', b'{"text": "a", "label": [[1], {"b": 2}]}',
        b'{"text": "a", "label": null}', b'{"text": ["a"], "label": "x"}', b'{"": 1}',
        b'{"text": "a", "label": true}', b'{"text": "a", "label": "' + b"x" * 9000 + b'"}',
        b'{"text": "a", "label": ' + b"[" * 400 + b"]" * 400 + b"}",
    ],
    "json": [
        JUNK, DEEP, b"", b"{}", b"[]", b"[1]", b"[[]]", b"9" * 5000, b'"text"', b"[{}]", b"\x80",
        b'{"text": "a", "label": "x"} trailing', b'[{"text": "a", "label": "x"},',
    ],
    "tsv": [b"text\tlabel\na\tb\tc\n", JUNK], "ndjson": [b"\n\n\n"],
    "parquet": [b"", JUNK, b"PAR1PAR1"], "txt": [b"text"],
    "": [b"text,label\na,b\n"], "CSV": [b"\xff"],
}  # fmt: skip


@pytest.mark.parametrize("suffix", DATA)
def test_broken_data(suffix: str, tmp_path: Path) -> None:
    for i, data in enumerate(DATA[suffix]):
        path = tmp_path / (f"{i}.{suffix}" if suffix else f"{i}")
        path.write_bytes(data)
        for labels in ("", "x,y"):
            found = look(node_config(tmp_path, data_path=str(path)), labels=labels)
        # As images, every cell is another thing that is wrong.
        found = look(node_config(tmp_path, data_path=str(path), image_column="text"))
        assert found["data"].status == FAIL, (suffix, data[:80])


def parquets() -> dict[str, pa.Table]:
    text = pa.array(["a", "b"])
    huge = pa.array([2**62, -(2**62)], pa.timestamp("ms"))
    return {
        "dates": pa.table({"text": text, "label": huge}),
        "binary": pa.table({"text": pa.array([b"\xff", b"\0"]), "label": text}),
        "nested": pa.table(
            {"text": pa.array([[["a"]], None]), "label": pa.array([{"a": 1}, None])}
        ),
        "twice": pa.Table.from_arrays([text, text, text], names=["text", "text", "label"]),
        "none": pa.table({}),
        "empty": pa.table({"text": pa.array([], pa.string()), "label": pa.array([], pa.string())}),
        "null": pa.table({"text": pa.nulls(2), "label": text}),
        "bytes": pa.table({"text": pa.array([b"\xff\xd8\xff", b"GIF89a"]), "label": text}),
    }


@pytest.mark.parametrize("name", parquets())
def test_odd_parquet_files(name: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(parquets()[name], path)
    look(node_config(tmp_path, data_path=str(path)))
    look(node_config(tmp_path, data_path=str(path), image_column="text"))
    good = path.read_bytes()
    rng = random.Random(name)
    for _ in range(5):
        at = rng.randrange(len(good))
        path.write_bytes(rng.choice([good[:at], good[:at] + b"\xff" + good[at + 1 :]]))
        look(node_config(tmp_path, data_path=str(path)))


# --- what is no file ----------------------------------------------------------------------


def pipe(path: Path) -> None:
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [pipe, loop, device, Path.mkdir, lambda path: None])
def test_what_is_no_file(make: Callable[[Path], Any], good: str, tmp_path: Path) -> None:
    tiny.write_csv(tmp_path / "rows.csv", tiny.sentences(12))
    odd = {name: tmp_path / f"odd.{name}" for name in ("csv", "json", "toml", "parquet", "pem")}
    for path in odd.values():
        make(path)
    assert look(str(odd["toml"]))["node config"].status == FAIL
    assert look(node_config(tmp_path), plan=odd["json"])["plan"].status == FAIL
    assert look(node_config(tmp_path), key=odd["pem"])["node key"].status == FAIL
    for name in ("csv", "json", "parquet"):
        found = look(node_config(tmp_path, data_path=str(odd[name])))
        assert found["data"].status == FAIL
    (tmp_path / "images.csv").write_text(f"image,label\n{odd['pem']},x\n")
    found = look(
        node_config(tmp_path, data_path=str(tmp_path / "images.csv"), image_column="image")
    )
    assert found["data"].status == FAIL
    look(node_config(tmp_path, cache_dir=str(odd["pem"])))
    look(node_config(tmp_path, cache_dir=str(tmp_path / "cache" / "store" / "x")))


def test_what_may_not_be_read(tmp_path: Path, good: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.write_csv(tmp_path / "rows.csv", tiny.sentences(12))
    (tmp_path / "plan.json").write_text(good)
    real = os.open

    def refuse(path: Any, *rest: Any, **more: Any) -> int:
        if str(path).startswith(str(tmp_path)):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)  # a test may run as root, who may read everything
    found = look(node_config(tmp_path), plan=tmp_path / "plan.json", key=tmp_path / "plan.json")
    for name in ("plan", "data", "node key"):
        assert found[name].status == FAIL and "Permission denied" in found[name].text, found


# --- the store and the rest ---------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_odd_sub_fms_in_the_store(seed: int, good: str, tmp_path: Path) -> None:
    """Packages of any content, with the digest of that content."""
    tiny.write_csv(tmp_path / "rows.csv", tiny.sentences(12))
    try:
        meta = json.dumps(json.loads(broken_plan(good, random.Random(seed)))["meta"])
    except (ValueError, LookupError, TypeError, RecursionError):
        meta = "null"
    package = fabricate.package(seed)
    with contextlib.suppress(ReplyError):
        meta = PackageMeta.from_json(meta).to_json()
    digests = {k: tensor_digest(tensor) for k, tensor in package.weights.items()}
    digest = combine_digest(meta, package.files, digests)
    store = Store(tmp_path / "cache" / "store")
    store.put(package.digest(), package)
    manifest = json.loads(store.path(package.digest()).read_bytes()) | {"meta": json.loads(meta)}
    store.path(digest).write_text(json.dumps(manifest))
    found = look(node_config(tmp_path))
    assert found["data"].status == PASS


@pytest.mark.parametrize(
    "options",
    [
        {"superlink": "host:" + "9" * 5000}, {"superlink": "\x00:80"}, {"superlink": "\ud800:80"},
        {"superlink": "a" * 300 + ":80"}, {"superlink": "a..b:80"}, {"superlink": "[::g]:80"},
        {"timeout": 0.0}, {"timeout": -1.0}, {"timeout": float("nan")}, {"timeout": 1e300},
        {"sub_fm_mb": float("nan")}, {"sub_fm_mb": float("inf")}, {"sub_fm_mb": -1.0},
        {"labels": ","}, {"labels": "a,a"}, {"labels": "\ud800"}, {"labels": "x" * 10_000},
        {"key": Path("\x00")}, {"plan": Path("\x00")}, {"key": Path("/dev/zero")},
    ],
)  # fmt: skip
def test_odd_options(options: dict[str, Any], tmp_path: Path) -> None:
    tiny.write_csv(tmp_path / "rows.csv", tiny.sentences(12))
    found = look(node_config(tmp_path), **({"timeout": 1.0} | options))
    assert FAIL in {f.status for f in found.values()}


@pytest.mark.parametrize("data", [b"", JUNK, DEEP, b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n"])
def test_odd_keys(data: bytes, tmp_path: Path) -> None:
    tiny.write_csv(tmp_path / "rows.csv", tiny.sentences(12))
    (tmp_path / "key").write_bytes(data)
    assert look(node_config(tmp_path), key=tmp_path / "key")["node key"].status == FAIL


def test_the_command_shows_what_no_terminal_can(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = '{"text": "a", "label": "\\u202e\\u001b[2J"}'
    (tmp_path / "rows.jsonl").write_text(f"{line}\n{line}")
    text = node_config(tmp_path, data_path=str(tmp_path / "rows.jsonl"))
    for more in ([], ["--json"]):
        assert cli.main(["node", "check", "--node-config", text, *more]) == 0
        out = capsys.readouterr().out
        out.encode()
        assert "\x1b[2J" not in out


def test_a_fault_that_nobody_foresaw_is_a_finding_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("first line\nsecond")

    tiny.write_csv(tmp_path / "rows.csv", tiny.sentences(12))
    monkeypatch.setattr("client_app.check.node.nodes.own_rows", fail)
    (found,) = (f for f in check(Options(node_config(tmp_path))) if f.name == "data")
    assert found == Finding("data", FAIL, f"{UNFORESEEN}: ZeroDivisionError: first line.")
