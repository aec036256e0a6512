"""Folders of images: one folder a class, its name the label."""

from __future__ import annotations

from pathlib import Path

from fedpft_core.data.hub import is_data_folder
from fedpft_core.disk import plain
from fedpft_core.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
"""Endings of the names of files that are images; others in a folder are passed over."""


def is_folder(source: str | Path) -> bool:
    """Whether a source of rows is a folder of images.

    Args:
        source: a file, a folder, or the name of built-in data.

    Returns:
        Whether it is a folder, and not one of data files.
    """
    return bool(source) and Path(source).is_dir() and not is_data_folder(source)


def images(folder: Path) -> list[Path]:
    """All images in a folder and in the folders in it.

    Args:
        folder: the folder; what is hidden in it is passed over.

    Returns:
        Files, sorted by name.
    """
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )


def read_classes(folder: Path, where: str) -> tuple[list[bytes], list[str]]:
    """The images of each class.

    Args:
        folder: with one folder a class.
        where: put in front of messages.

    Returns:
        The content of all images and their labels, class by class.

    Raises:
        UserError: there is no image, one lies beside the classes' folders, or one cannot be read.
    """
    content: list[bytes] = []
    labels: list[str] = []
    for path in images(folder):
        parts = path.relative_to(folder).parts
        if len(parts) < 2:
            raise UserError(
                f"{where}: the image {path.name} lies beside the folders; each class has a folder "
                "of its own, whose name is the label."
            )
        try:
            content.append(plain.read(path))
        except OSError as error:
            raise UserError(
                f"{where}: the image {path} cannot be read ({error.strerror or error})."
            ) from error
        labels.append(parts[0])
    if not content:
        raise UserError(
            f"{where}: the folder holds neither data files nor images; of images a folder for each "
            f"class is needed, with {', '.join(SUFFIXES)} files."
        )
    return content, labels
