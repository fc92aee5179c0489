"""What the documents say works: command lines parse, make targets exist, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from edgetune.cli import app

REPOSITORY = Path(__file__).parents[1]
DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md"), *REPOSITORY.glob("benchmarks/*.md")])
MAKEFILE_TARGETS = set(re.findall(r"^([A-Za-z][\w-]*):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.M))
BLOCK = re.compile(r"^[ \t]*```[^\n]*\n(.*?)^[ \t]*```", re.M | re.S)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")


def command_lines(text: str) -> list[list[str]]:
    """The arguments of every `edgetune ...` in code blocks: prompts, variables and comments off, backslashes joined."""
    found = []
    for block in BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            bare = re.sub(r"^\s*(?:[$>]\s+)?(?:\w+=\S+\s+)*(?:\S*/bin/)?(?:python3? -m )?", "", line)
            if not bare.startswith("edgetune ") or "[OPTIONS]" in bare:
                continue
            words = shlex.split(bare, comments=True)
            end = next((place for place, word in enumerate(words) if word in {"|", ">", "&&", ";", "2>"}), len(words))
            found.append(words[1:end])
    return found


def parse(arguments: list[str]) -> None:
    """Parse as the command line would, running nothing. Raises: what click raises for what it doesn't understand."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("edgetune", list(arguments))
    while getattr(command, "commands", None):
        remaining = [*getattr(context, "_protected_args", ()), *context.args]
        if not remaining:
            return  # `edgetune --version`
        name, command, rest = command.resolve_command(context, remaining)
        context = command.make_context(name, rest, parent=context)


def make_targets(text: str) -> set[str]:
    spans = [*BLOCK.findall(text), *SPAN.findall(BLOCK.sub("", text))]
    lines = [line for span in spans for line in span.splitlines()]
    named: set[str] = set()
    for line in lines:
        match = re.match(r"\s*(?:[$>]\s+)?make((?:\s+[a-z][\w-]*)+)", line)
        named |= set(match.group(1).split()) if match else set()
    return named


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives a document's headings."""
    headings = re.findall(r"^#+\s+(.*)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(path: Path) -> list[str]:
    text = BLOCK.sub("", path.read_text(encoding="utf-8"))
    broken = []
    for link in LINK.findall(text):
        if re.match(r"[a-z][a-z+.-]*:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_every_command_line_parses(path: Path) -> None:
    for arguments in command_lines(path.read_text(encoding="utf-8")):
        try:
            parse(arguments)
        except SystemExit:
            continue  # --version, --help
        except Exception as error:
            message = getattr(error, "format_message", lambda error=error: repr(error))()
            pytest.fail(f"edgetune {shlex.join(arguments)}: {message}")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_every_make_target_exists(path: Path) -> None:
    assert make_targets(path.read_text(encoding="utf-8")) - MAKEFILE_TARGETS == set()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_every_local_link_leads_somewhere(path: Path) -> None:
    assert broken_links(path) == []


# ------------------------------------------------------------------------------------------------ that the checks check

GOOD = """
```console
$ edgetune finetune --device jetson-nano \\
    --method last-k -b 8   # a comment
within cap: whatever
$ PYTHONUTF8=1 python -m edgetune predict RUN a.jpg --json | head -1
.venv/bin/edgetune devices show auto
edgetune --version
```
Also `make test` and

    make setup
"""


def test_command_lines_are_found_and_parse() -> None:
    lines = command_lines(GOOD)
    assert lines == [
        ["finetune", "--device", "jetson-nano", "--method", "last-k", "-b", "8"],
        ["predict", "RUN", "a.jpg", "--json"],
        ["devices", "show", "auto"],
        ["--version"],
    ]
    for arguments in lines[:3]:
        parse(arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train"],
        ["finetune", "--devise", "jetson-nano"],
        ["finetune", "--method", "magic"],
        ["finetune", "--epochs", "many"],
        ["predict"],
        ["devices", "shew", "auto"],
        ["evaluate", "RUN", "extra"],
    ],
    ids=" ".join,
)
def test_a_command_line_with_a_fault_is_caught(arguments: list[str]) -> None:
    with pytest.raises(Exception, match=r".") as error:
        parse(arguments)
    assert type(error.value).__name__ in {"UsageError", "NoSuchOption", "BadParameter", "MissingParameter", "NoArgsIsHelpError"}  # fmt: skip


def test_make_targets_and_links_are_found(tmp_path: Path) -> None:
    assert make_targets(GOOD) >= {"test"}
    assert make_targets("```\n$ make setup demo\n```") == {"setup", "demo"}
    page = tmp_path / "page.md"
    page.write_text("# A Title, here\n[a](#a-title-here) [b](#b) [c](page.md) [d](no.md) [e](https://x.org)", "utf-8")
    assert broken_links(page) == ["#b", "no.md"]
