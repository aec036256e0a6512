"""Tokenizers and image processors: loaded from a source, packed into files, made from files."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedpft_core.errors import UserError, first_line
from fedpft_core.model.captioned import load_captioned

# Keys of a Hugging Face config that say where the FM came from: no client's business.
PRIVATE = ("_name_or_path", "name_or_path", "_commit_hash")


def load_processor(source: str, kind: str, options: Mapping[str, Any] | None = None) -> Any:
    """Load what turns a family's inputs into tensors.

    Args:
        source: a folder or a name on the hub.
        kind: what the model reads, `text`, `image` or `captioned image`.
        options: further arguments of `from_pretrained`; None for `trust_remote_code` off.

    Returns:
        A tokenizer for texts, an image processor for images, both for images with prompts.

    Raises:
        UserError: there is none, or one that knows no word.
    """  # noqa: DOC501  # the ValueError below does not leave this function
    from transformers import AutoImageProcessor, AutoTokenizer

    if kind == "captioned image":
        return load_captioned(source)
    given = dict(options or {"trust_remote_code": False})
    try:
        if kind == "image":
            # The PIL backend needs no torchvision and gives the same pixels on every machine.
            return AutoImageProcessor.from_pretrained(source, backend="pil", **given)
        tokenizer = AutoTokenizer.from_pretrained(source, **given)
        # For a folder without tokenizer files transformers makes one that knows no word.
        if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_ids):
            raise ValueError("it has no vocabulary")
        return tokenizer
    except Exception as error:
        part = "image processor" if kind == "image" else "tokenizer"
        raise UserError(f"{source}: no usable {part} ({first_line(error)}).") from error


def files_of(processor: Any) -> dict[str, bytes]:
    """The files a processor is saved as, without what says where it came from.

    Args:
        processor: a tokenizer, whose truncation and padding are switched off, or an image
            processor.

    Returns:
        Content by file name; the same bytes whether the processor was used or not.
    """
    # A tokenizer remembers how it last truncated and padded, and would save that as well: the same
    # tokenizer, used or not, must give the same bytes. Every use says anew how it is to be done.
    backend = getattr(getattr(processor, "tokenizer", processor), "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        files = {}
        for path in sorted(Path(folder).iterdir()):
            data = path.read_bytes()
            if path.suffix == ".json" and path.name != "tokenizer.json":
                raw = {k: v for k, v in json.loads(data).items() if k not in PRIVATE}
                data = json.dumps(raw, sort_keys=True).encode()
            files[path.name] = data
        return files


def from_files(files: Mapping[str, bytes], kind: str) -> Any:
    """The inverse of `files_of`, from bytes that were verified: files on a disk may have changed.

    Args:
        files: content by file name.
        kind: what the model reads, `text`, `image` or `captioned image`.

    Returns:
        A tokenizer for texts, an image processor for images, both for images with prompts.

    Raises:
        UserError: the files make no such processor.
    """
    with tempfile.TemporaryDirectory(prefix="fedpft-") as folder:
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        return load_processor(folder, kind)


__all__ = ["PRIVATE", "files_of", "from_files", "load_processor"]
