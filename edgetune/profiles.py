"""One device profile: its fields, and the TOML file it is read from and written to. No torch.

A file can be anything a person or a download put there: it is refused with the file, the field, the value found and the
value allowed, and reading it costs neither much memory nor much time.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from edgetune.errors import ProfileError
from edgetune.units import MIB, format_bytes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

FORMAT_VERSION = 1

_MAX_FILE_BYTES = 64 * 1024
# A profile has three levels. TOML parsers recurse on nested brackets and are quadratic in the parts of a dotted key.
_MAX_BRACKETS = 200
_MAX_DOTS_A_LINE = 200

# Plausible ranges catch a unit slip: 4096 (MiB) as bytes, 25.6 (GB/s) as bytes a second, 236 (GFLOP/s) as FLOP/s.
_RamBytes = Annotated[int, msgspec.Meta(ge=32 * MIB, le=2**44)]
_ProcessBytes = Annotated[int, msgspec.Meta(ge=MIB, le=2**44)]
_FlopsPerSecond = Annotated[float, msgspec.Meta(ge=1e7, le=1e17)]
_BytesPerSecond = Annotated[float, msgspec.Meta(ge=1e7, le=1e14)]
_Line = Annotated[str, msgspec.Meta(min_length=1, max_length=300)]
_Prose = Annotated[str, msgspec.Meta(min_length=1, max_length=4000)]


class Runtime(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a process costs before the model: everything a run imports, peak resident bytes."""

    bytes: _ProcessBytes
    anonymous_bytes: _ProcessBytes | None = None
    timm_bytes: _ProcessBytes | None = None  # what timm adds where it has to build the model
    version: _Line
    source: _Prose
    verified: bool


class Runtimes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `Runtime` a backend; absent: nobody measured it (for `auto`: measured at the start of the run)."""

    torch: Runtime | None = None
    ort: Runtime | None = None


class Accelerator(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A GPU or the like. `peak_flops_per_s` is its fp32 figure, never the CPU's."""

    name: _Line
    kind: Literal["gpu", "tpu", "npu"]
    memory: Literal["shared", "own"] | None = None
    peak_flops_per_s: _FlopsPerSecond | None = None
    usable_for_training: bool
    note: _Prose | None = None


class DeviceProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One device with one RAM size. An absent figure is one nobody has; `peak_flops_per_s` is the CPU's, fp32.

    `usable_ram_bytes` is what one process can take beside the system. `usable_anonymous_bytes` bounds anonymous memory
    apart, where it is known: a full board drops file-backed pages first. `verified`: every figure was seen in the
    sources named, or follows from them by arithmetic; else at least one is an estimate.
    """

    format_version: int = FORMAT_VERSION
    id: Annotated[str, msgspec.Meta(pattern="^[a-z0-9-]{1,64}$")]
    name: _Line
    ram_bytes: _RamBytes
    usable_ram_bytes: _ProcessBytes
    usable_anonymous_bytes: _ProcessBytes | None = None
    cores: Annotated[int, msgspec.Meta(ge=1, le=4096)] | None = None
    cpu: _Line | None = None
    peak_flops_per_s: _FlopsPerSecond | None = None
    memory_bandwidth_bytes_per_s: _BytesPerSecond | None = None
    accelerator: Accelerator | None = None
    runtime: Runtimes = Runtimes()
    source: _Prose
    verified: bool
    notes: _Prose | None = None


# ---------------------------------------------------------------------------------------------- reading and writing


def load_profile(path: str | Path) -> DeviceProfile:
    """Read one profile and check it.

    Raises: ProfileError naming the file, the field, the value found and the value allowed.
    """
    path = Path(path)
    table = _parse(_read(path), path)
    version = table.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise ProfileError(f"{path}: format_version is {shown(version)}; this edgetune reads {FORMAT_VERSION}.")
    try:
        profile = msgspec.convert(table, DeviceProfile)
    except msgspec.ValidationError as error:
        raise ProfileError(f"{path}: {_explain(str(error), table)}") from None
    check_profile(profile, path)
    return profile


def save_profile(profile: DeviceProfile, path: str | Path) -> None:
    """Write a profile that `load_profile` accepts: beside the file first, then renamed over it.

    Raises: ProfileError if the profile is not valid under this file name, or the file can't be written.
    """
    import tempfile

    import tomli_w

    path = Path(path)
    table = _without_none(msgspec.to_builtins(profile))
    try:
        msgspec.convert(table, DeviceProfile)
    except msgspec.ValidationError as error:
        raise ProfileError(f"{path}: not written: {_explain(str(error), table)}") from None
    check_profile(profile, path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("wb", dir=path.parent, prefix=f".{path.stem}-", delete=False) as file:
            temporary = Path(file.name)
            file.write(tomli_w.dumps(table).encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, ValueError) as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise ProfileError(f"{path}: can't be written: {_reason(error)}. Name another place.") from None


def check_profile(profile: DeviceProfile, path: Path) -> None:
    """What the schema can't say: how fields stand to each other and to the file's name. Raises: ProfileError."""

    def at_most(field: str, size: int | None, limit_field: str, limit: int | None) -> None:
        if size is not None and limit is not None and size > limit:
            raise ProfileError(
                f"{path}: {field} is {size} ({format_bytes(size)}); allowed: at most {limit_field}, "
                f"which is {limit} ({format_bytes(limit)})."
            )

    if profile.id != path.stem or path.suffix != ".toml":
        raise ProfileError(f"{path}: id is {shown(profile.id)}; allowed: the file's name before .toml.")
    at_most("usable_ram_bytes", profile.usable_ram_bytes, "ram_bytes", profile.ram_bytes)
    usable, anonymous = profile.usable_ram_bytes, profile.usable_anonymous_bytes
    at_most("usable_anonymous_bytes", anonymous, "usable_ram_bytes", usable)
    for backend in ("torch", "ort"):
        runtime: Runtime | None = getattr(profile.runtime, backend)
        if runtime is not None:
            field = f"runtime.{backend}."
            if runtime.bytes == usable:
                raise ProfileError(f"{path}: {field}bytes is all of usable_ram_bytes; allowed: less, or nothing fits.")
            at_most(f"{field}bytes", runtime.bytes, "usable_ram_bytes", usable)
            at_most(f"{field}anonymous_bytes", runtime.anonymous_bytes, f"{field}bytes", runtime.bytes)
            at_most(f"{field}anonymous_bytes", runtime.anonymous_bytes, "usable_anonymous_bytes", anonymous)
    for field, text in _texts(msgspec.to_builtins(profile)):
        # A control or direction character in a name would rewrite the terminal that shows it.
        if not all(char.isprintable() or char == "\n" for char in text):
            raise ProfileError(f"{path}: {field} is {shown(text)}; allowed: printable text.")


# ------------------------------------------------------------------------------------------------------------ inside


def _read(path: Path) -> str:
    """The file's text. Only a regular file is opened: a pipe or a device would block or never end."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ProfileError(f"{path}: is a folder, not a TOML file. Name one of the files in it.")
        if not stat.S_ISREG(mode):
            raise ProfileError(f"{path}: is not a regular file.")
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ProfileError(f"{shown(str(path))}: can't be read: {_reason(error)}.") from None
    if len(content) > _MAX_FILE_BYTES:
        raise ProfileError(f"{path}: is larger than {format_bytes(_MAX_FILE_BYTES)}; a device profile is not.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ProfileError(f"{path}: is not UTF-8 text (byte {error.start}), so not a TOML file.") from None


def _parse(text: str, path: Path) -> dict[str, Any]:
    crowded = text.count("[") + text.count("{") > _MAX_BRACKETS
    if crowded or any(line.count(".") > _MAX_DOTS_A_LINE for line in text.splitlines()):
        raise ProfileError(f"{path}: is nested deeper than a device profile can be.")
    try:
        table: dict[str, Any] = tomllib.loads(text)
        return table
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"{path}: is not valid TOML: {error}.") from None


def _explain(message: str, table: dict[str, Any]) -> str:
    """msgspec's words with the field in front, the value found and the value allowed."""
    message, _, where = message.partition(" - at `$")
    keys = [key for key in where.rstrip("`").split(".") if key]
    prefix = "".join(f"{key}." for key in keys)
    if name := re.fullmatch(r"Object (missing required|contains unknown) field `(.*)`", message, re.DOTALL):
        known = [field.encode_name for field in msgspec.structs.fields(_struct_at(keys))]
        if name[1].startswith("missing"):
            return f"{prefix}{name[2]} is missing; a profile must have it."
        near = difflib.get_close_matches(name[2][:100], known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        return f"{shown(prefix + name[2])} is not a field of a profile; allowed: {', '.join(known)}.{hint}"
    found: Any = table
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    if message.startswith("Invalid enum value"):
        allowed = "one of gpu, tpu, npu" if keys[-1] == "kind" else "one of shared, own"
    else:
        allowed = message.replace("Expected ", "").replace("`", "").replace(" | null", "")
        allowed = allowed.replace("object", "a table").replace("Number out of range", "a number that fits 64 bits")
    return f"{prefix.rstrip('.') or 'the file'} is {shown(found)}; allowed: {allowed}."


def _struct_at(keys: list[str]) -> type[msgspec.Struct]:
    if not keys:
        return DeviceProfile
    if keys[0] == "accelerator":
        return Accelerator
    return Runtimes if len(keys) == 1 else Runtime


def shown(value: object) -> str:
    """A value of a file for a message: on one line, short, without control characters, whatever it is."""
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "an array"
    try:
        text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    except ValueError:  # an integer with more digits than Python prints
        return "a huge number"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _texts(table: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    texts: list[tuple[str, str]] = []
    for key, value in table.items():
        if isinstance(value, dict):
            texts += _texts(value, f"{prefix}{key}.")
        elif isinstance(value, str):
            texts.append((prefix + key, value))
    return texts


def _without_none(table: dict[str, Any]) -> dict[str, Any]:
    """TOML has no null: an absent figure is an absent key, a table with none left is absent too."""
    kept = {key: _without_none(value) if isinstance(value, dict) else value for key, value in table.items()}
    return {key: value for key, value in kept.items() if value is not None and value != {}}


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
