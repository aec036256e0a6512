"""`fedpft publish`: put the exported adapter of a run on the Hugging Face Hub, or into a folder."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpft_core.errors import UserError, first_line

if TYPE_CHECKING:
    from rich.console import Console

_CARD, _CONFIG, _WEIGHTS = "README.md", "adapter_config.json", "adapter_model.safetensors"
# What a tokenizer with a chat template is saved as, for adapters that generate text.
_OTHERS = re.compile(
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|vocab\.txt|merges\.txt|tokenizer\.model|spiece\.model|chat_template\.jinja"
)


@dataclass(frozen=True)
class Parcel:
    """What is published.

    Attributes:
        files: content by name.
        warnings: what whoever publishes should know, a sentence each.
    """

    files: dict[str, bytes]
    warnings: tuple[str, ...]


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser.

    Args:
        commands: the subparsers of `fedpft`, to which `publish` is added.
    """
    publish = commands.add_parser(
        "publish", help="show, and with --push send, a run's adapter to the Hugging Face Hub"
    )
    publish.add_argument("run", metavar="RUN", help="run folder of a run that has ended")
    where = publish.add_mutually_exclusive_group(required=True)
    where.add_argument("--repo", metavar="OWNER/NAME", help="model repository on the Hub")
    where.add_argument("--folder", metavar="DIR", help="new folder, in the place of the Hub")
    publish.add_argument("--push", action="store_true", help="do it; otherwise it is only shown")
    publish.add_argument("--public", action="store_true", help="a new repository is for everybody")
    publish.add_argument("--base", metavar="NAME", help="the base model's name on the Hub")
    publish.add_argument("--license", metavar="ID", help="of the adapter, such as apache-2.0")
    publish.add_argument("--revision", metavar="BRANCH", default="main", help="default: main")
    publish.set_defaults(function=command)


def command(args: argparse.Namespace, console: Console) -> int:
    """Show what would be published, and publish it with --push.

    Args:
        args: as `add` declares them.
        console: where it is shown.

    Returns:
        The exit status, 0.

    Raises:
        UserError: the run has no adapter, a name is no name, or the Hub or the folder cannot be
            written.
    """
    folder = Path(args.run).expanduser().absolute() / "adapter"
    if args.repo and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.repo):
        raise UserError(f"--repo {args.repo}: expected OWNER/NAME.")
    parcel = gather(folder, args.base, args.license)
    where = args.repo or Path(args.folder).expanduser().absolute()
    kind = "public" if args.public else "private"
    what = f"Hub repository {where} ({kind} if it is new)" if args.repo else f"folder {where}"
    for name, data in parcel.files.items():
        console.print(f"  {name:30} {len(data):>12,} bytes", markup=False, highlight=False)
    for text in parcel.warnings:
        console.print(f"warning: {text}", markup=False, highlight=False, soft_wrap=True)
    if not args.push:
        console.print(f"This would go to the {what}; --push does it.", markup=False, soft_wrap=True)
        return 0
    if args.folder:
        _copy(parcel, Path(where))
        said = str(where)
    else:
        said = push(parcel, args.repo, args.revision, private=not args.public)
    console.print(f"published: {said}", markup=False, highlight=False, soft_wrap=True)
    return 0


def gather(folder: Path, base: str | None = None, licence: str | None = None) -> Parcel:
    """Read what is published, and put base model and licence into it.

    Args:
        folder: an exported adapter. What is no part of one is left out.
        base: the base model's name on the Hub; None leaves what there is.
        licence: of the adapter; None leaves what there is.

    Returns:
        The files. A path of this machine is never in them.

    Raises:
        UserError: a file is missing or damaged.
    """
    try:
        files = {name: (folder / name).read_bytes() for name in (_CARD, _CONFIG, _WEIGHTS)}
        settings: dict[str, Any] = json.loads(files[_CONFIG])
        head, body = _taken_apart(files[_CARD].decode("utf-8"))
        known = settings.get("base_model_name_or_path") or ""
        others = sorted(p for p in folder.iterdir() if _OTHERS.fullmatch(p.name))
        files |= {p.name: p.read_bytes() for p in others}
    except FileNotFoundError as error:
        raise UserError(
            f"{folder}: no {Path(str(error.filename)).name} there; only a run that has ended has "
            "an adapter to publish."
        ) from error
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder}: the adapter cannot be read ({first_line(error)}).") from error
    warnings = []
    name = base or (known if _named(known) else "")
    if name:
        head["base_model"] = name
    else:
        warnings.append(
            "the base model has no name on the Hub, so the adapter says nothing of it; --base NAME "
            "names it."
        )
    settings["base_model_name_or_path"] = name or None
    if licence:
        head["license"] = licence
    elif head.get("license") in (None, "", "unknown"):
        warnings.append("the card names no licence; --license ID does.")
    warnings.append(
        "whoever has the adapter can ask it about the data that it was trained on; see "
        "docs/privacy.md."
    )
    files[_CONFIG] = (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode()
    files[_CARD] = _put_together(head, body).encode()
    return Parcel(files, tuple(warnings))


def _named(name: str) -> bool:
    plain = name.count("/") == 1 and not name.startswith((".", "/", "~")) and ":" not in name
    return plain and not Path(name).exists()


def _taken_apart(card: str) -> tuple[dict[str, Any], str]:
    import yaml

    _, head, body = card.split("---\n", 2)
    found = yaml.safe_load(head)
    if not isinstance(found, dict):
        raise ValueError("the card has no head")
    return found, body


def _put_together(head: dict[str, Any], body: str) -> str:
    import yaml

    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n{body}"


def _copy(parcel: Parcel, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"--folder {folder}: it is not empty.")
        for name, data in parcel.files.items():
            (folder / name).write_bytes(data)
    except OSError as error:
        raise UserError(f"--folder {folder}: it cannot be written ({error.strerror}).") from error


def push(parcel: Parcel, repo: str, revision: str, *, private: bool) -> str:
    """Send files to the Hub in one commit.

    The token is that of HF_TOKEN, or of the Hub's own login; HF_ENDPOINT names another Hub.

    Args:
        parcel: the files.
        repo: the repository, which is made where it is not there.
        revision: the branch, which must be there unless it is `main`.
        private: whether a repository that is made is for its owner alone.

    Returns:
        Where it can be seen.

    Raises:
        UserError: the Hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as name:
        staged = Path(name) / "adapter"
        staged.mkdir()
        _copy(parcel, staged)
        api = HfApi()
        try:
            api.create_repo(repo, private=private, exist_ok=True, repo_type="model")
            done = api.upload_folder(
                repo_id=repo, folder_path=staged, revision=revision,
                commit_message="Adapter tuned by federated proxy fine-tuning",
            )  # fmt: skip
        except Exception as error:  # of the library, of HTTP or of the network, all its own kinds
            raise UserError(
                f"--repo {repo}: the Hub could not be written ({first_line(error)})."
            ) from error
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    return str(getattr(done, "commit_url", "") or repo)
