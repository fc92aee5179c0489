"""Where the class folders of a data set lie, and which files are in them. Refuses what would train on other data
than was meant.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path, PurePath

from edgetune.data.files import (
    IMAGE_SUFFIXES,
    ClassFiles,
    class_folders,
    counted,
    entries,
    is_folder,
    is_junk,
    plural,
    walk_class,
)
from edgetune.data.images import shown
from edgetune.errors import DataError

_TRAIN_NAMES = ("train", "training")
_VAL_NAMES = ("val", "valid", "validation")
_NAMED_AT_MOST = 5


def find_layout(root: str, *, evaluating: bool = False) -> tuple[str, str | None, list[str]]:
    """Where the class folders lie: (train, val or None, notes)."""
    folders = {entry.name: entry.path for entry in entries(root) if is_folder(entry) and not is_junk(entry.name)}
    train = _only(root, folders, _TRAIN_NAMES)
    val = _only(root, folders, _VAL_NAMES)
    if evaluating and val and class_folders(folders[val]):
        return root, folders[val], []
    if train is None or (val is None and not class_folders(folders[train])):  # `train` may be a class: car, bus, train
        return root, None, [f"{shown(val)}/ is taken for a class: there is no train/ beside it."] if val else []
    if evaluating:
        raise DataError(f"{shown(root)} has {train}/ but no val/. Name the folder that holds what is to be evaluated.")
    others = [shown(name) for name in sorted(folders) if name not in (train, val)]
    notes = [f"Not used: {', '.join(n + '/' for n in others[:_NAMED_AT_MOST])} beside {train}/."] if others else []
    return folders[train], folders[val] if val else None, notes


def _only(root: str, folders: dict[str, str], names: tuple[str, ...]) -> str | None:
    found = sorted(name for name in folders if name.casefold() in names)
    if len(found) > 1:
        raise DataError(f"{shown(root)} has {' and '.join(n + '/' for n in found)}. Leave one of them.")
    return found[0] if found else None


def list_files(root: str, folder: str, notes: list[str]) -> dict[str, ClassFiles]:
    """The files of each class folder in `folder`; what is left out goes into `notes`."""
    files = {name: walk_class(root, paths) for name, paths in class_folders(folder).items()}
    top = [entry.name for entry in entries(folder)]
    junk = Counter(name for name in top if is_junk(name))
    where = "" if folder == root else shown(PurePath(folder).name) + "/"
    for name, found in files.items():
        ignored = found.pictures + found.others
        if ignored:
            notes.append(f"{where}{shown(name)}: {plural(ignored.total(), 'file')} ignored ({counted(ignored)}).")
        junk += found.junk
    if junk:
        notes.append(f"Skipped in {where or 'the folder'}: hidden and system files ({counted(junk)}).")
    stray = _stray(folder)
    if stray and not files:
        raise DataError(
            f"{shown(folder)} holds images but no class folders. Put the images of each class into a folder of its own."
        )
    if stray:
        notes.append(
            f"{plural(stray, 'image')} directly in {where or 'the folder'}, outside any class folder: ignored."
        )
    return files


def _stray(folder: str) -> int:
    """How many files with an image's suffix lie directly in `folder`."""
    names = [entry.name for entry in entries(folder) if not is_folder(entry) and not is_junk(entry.name)]
    return sum(PurePath(name).suffix.lower() in IMAGE_SUFFIXES for name in names)


def refuse_unusable(folder: str, files: dict[str, ClassFiles]) -> None:
    """Raises: DataError when the folders found can't be classes to train: none, only one, or one without images."""
    if len(files) < 2:
        found = f"only one class folder, {shown(next(iter(files)))!r}" if files else "no class folders"
        inner = [str(Path(folder, name)) for name in files if class_folders(str(Path(folder, name)))]
        hint = f" Or did you mean {shown(inner[0])}?" if inner else ""
        raise DataError(f"{shown(folder)} holds {found}. At least two are needed, one folder of images each.{hint}")
    empty = [name for name, found in files.items() if not found.images]
    if len(empty) == len(files):
        raise DataError(f"{shown(folder)} holds {len(files)} folders and no images.{_ignored(files)}")
    if empty:
        names = ", ".join(repr(shown(name)) for name in empty[:_NAMED_AT_MOST])
        raise DataError(
            f"no images in class {names} of {shown(folder)}. Add some or take the folder away."
            + _ignored({name: files[name] for name in empty})
        )


def _ignored(files: dict[str, ClassFiles]) -> str:
    ignored = sum((found.pictures + found.others for found in files.values()), Counter[str]())
    return f" Files that are no images edgetune reads: {counted(ignored)}." if ignored else ""


def refuse_lost(files: dict[str, ClassFiles], max_bad: float) -> None:
    """Raises: DataError when a class loses more than the share `max_bad` of its pictures to formats that can't be
    read.
    """
    for name, found in files.items():
        lost = found.pictures.total()
        if lost > max_bad * (lost + len(found.images)):
            raise DataError(
                f"class {shown(name)!r} would lose {lost} of its {lost + len(found.images)} pictures: "
                f"{counted(found.pictures)} can't be read. Convert them to JPEG or PNG, or allow it with a larger "
                "--max-bad."
            )


def known_classes(files: dict[str, ClassFiles], classes: tuple[str, ...], folder: str) -> dict[str, ClassFiles]:
    """The files of the classes that train knows. Raises: DataError when others hold images, or none holds any."""
    extra = [shown(name) for name, found in files.items() if name not in classes and found.images]
    if extra:
        raise DataError(
            f"{shown(folder)} has classes that were not trained on: {', '.join(extra[:_NAMED_AT_MOST])}. "
            f"Known are {', '.join(shown(name) for name in classes[:20])}. Rename the folders or take them away."
        )
    if not any(found.images for found in files.values()):
        raise DataError(f"{shown(folder)} holds no images of any class.{_ignored(files)}")
    return {name: files[name] for name in classes if name in files}
