"""What comes back from the emulated board is judged right: on what a real run left, and on every way that it can be wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
MIB = 2**20


@pytest.fixture(scope="module")
def check() -> ModuleType:
    sys.path.insert(0, str(ROOT / "tools" / "board"))
    try:
        import check
    finally:
        sys.path.pop(0)
    return check


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """What a board leaves that did all it had to."""
    facts = {
        "mem_total_kb": 490000, "install.rc": 0, "requirements.rc": 0, "startup.rc": 0, "limit.rc": 137, "limit.kills": 1,
        "run.rc": 143, "run.oom_kills": 1, "resume.rc": 0, "resume.oom_kills": 1, "evaluate.rc": 0, "evaluate.oom_kills": 1,
        "killed.rc": 137, "killed.oom_kills": 2, "promised.rc": 4, "promised.oom_kills": 2, "refused.rc": 3, "refused.oom_kills": 2,
    }  # fmt: skip
    (tmp_path / "facts.txt").write_text("".join(f"{name}={value}\n" for name, value in facts.items()))
    for job in ("run", "resume", "evaluate", "killed", "promised", "refused"):
        lines = [
            f"VmHWM:\t  {240 * 1024} kB\nRssAnon:\t  {size * 1024} kB\nRssFile:\t 60000 kB\n"
            for size in (100, 180, 170)
        ]
        (tmp_path / f"{job}.memory").write_text("".join(lines))
        (tmp_path / f"{job}.log").write_text(f"{job} said something\n")
    (tmp_path / "limit.log").write_text("".join(f"{size * MIB}\n" for size in (1, 2, 430)))
    report = {"simulated": False, "within_cap": True, "device_peak_bytes": 241 * MIB, "cap_bytes": 420 * MIB}
    (tmp_path / "report.json").write_text(json.dumps(report))
    return tmp_path


def test_a_board_that_did_all_of_it_has_no_problem_and_a_line_of_figures(check: ModuleType, out: Path) -> None:
    assert check.problems(out, usable_anonymous_bytes=400 * MIB, lean=True) == []
    line = check.closing_line(out, usable_anonymous_bytes=400 * MIB, what="a board")
    assert line.startswith("board: a board: exit 0, within cap (241 of 420 MiB), RssAnon 180 of 400 MiB, oom_kill 0;")
    assert "killed (137)" in line
    assert "exit 3" in line
    assert "430 MiB here" in line


def _fact(name: str, value: int) -> Callable[[Path], None]:
    def change(out: Path) -> None:
        lines = (out / "facts.txt").read_text().splitlines()
        kept = [line for line in lines if not line.startswith(f"{name}=")]
        (out / "facts.txt").write_text("\n".join([*kept, f"{name}={value}"]))

    return change


def _report(name: str, value: object) -> Callable[[Path], None]:
    def change(out: Path) -> None:
        report = json.loads((out / "report.json").read_text())
        (out / "report.json").write_text(json.dumps({**report, name: value}))

    return change


def _gone(name: str) -> Callable[[Path], None]:
    return lambda out: (out / name).unlink()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_gone("facts.txt"), "the board left nothing"),
        (_gone("run.memory"), "nothing was seen of the memory of run"),
        (_gone("report.json"), "can't be read"),
        (_fact("install.rc", 1), "install ended with 1"),
        (_fact("requirements.rc", 1), "requirements ended with 1"),
        (_fact("run.rc", 0), "run ended with 0, not 143"),
        (_fact("run.rc", 137), "run ended with 137"),
        (_fact("resume.rc", 4), "resume ended with 4"),
        (_fact("evaluate.rc", 1), "evaluate ended with 1"),
        (_fact("evaluate.oom_kills", 2), "killed 1 processes"),
        (_fact("killed.rc", 0), "was not killed by the kernel"),
        (_fact("killed.oom_kills", 1), "was not killed by the kernel"),
        (_fact("promised.rc", 0), "neither stopped nor killed"),
        (_fact("refused.rc", 137), "did not end by itself"),
        (_fact("refused.rc", 0), "did not end by itself"),
        (_fact("refused.oom_kills", 3), "was killed by the kernel"),
        (lambda out: (out / "refused.log").write_text(""), "say why"),
        (_report("simulated", True), "took itself for a simulation"),
        (_report("within_cap", False), "not within the cap"),
        (_report("device_peak_bytes", 500 * MIB), "not within the cap"),
        (_report("device_peak_bytes", 100 * MIB), "from outside 240 were seen"),
        (lambda out: (out / "run.memory").write_text(f"RssAnon: {401 * 1024} kB\n"), "401 MiB of anonymous memory"),
        (lambda out: (out / "report.json").write_text("{"), "can't be read"),
    ],
)
def test_what_is_wrong_is_said(check: ModuleType, out: Path, spoil: Callable[[Path], None], said: str) -> None:
    spoil(out)
    found = check.problems(out, usable_anonymous_bytes=400 * MIB, lean=True)
    assert any(said in line for line in found), found


def test_what_is_not_lean_is_said(check: ModuleType, out: Path) -> None:
    assert any("more to bare torch" in line for line in check.problems(out, usable_anonymous_bytes=None, lean=False))


def test_a_fact_that_is_missing_or_no_number_is_a_problem_and_no_crash(check: ModuleType, out: Path) -> None:
    text = (out / "facts.txt").read_text()
    for spoilt in (text.replace("run.rc=143\n", ""), text.replace("run.rc=143", "run.rc=")):
        (out / "facts.txt").write_text(spoilt)
        assert check.problems(out, usable_anonymous_bytes=None, lean=True) == ["the board left no figure for run.rc"]


RECORDED = ROOT / "benchmarks" / "results" / "board.jsonl"


@pytest.mark.skipif(not RECORDED.is_file(), reason="no board was recorded")
def test_what_was_recorded_of_boards_held() -> None:
    for line in RECORDED.read_text().splitlines():
        found = json.loads(line)
        assert found["report"]["within_cap"], found["what"]
        assert not found["report"]["simulated"]
        assert found["board"]["killed.rc"] == "137"
        assert found["board"]["refused.rc"] in ("3", "4")
        assert found["board"]["swap_total_kb"] == "0"
        assert max(found["rss_anon_bytes"][job] for job in ("run", "resume", "evaluate")) < found["limit_bytes"]


def test_the_table_names_versions_and_gives_the_figures(
    check: ModuleType, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "board"))
    import record

    def mark(anonymous: int, file: int, seconds: float) -> dict[str, float]:
        return {"anonymous_bytes": anonymous * MIB, "file_bytes": file * MIB, "seconds": seconds, "modules": 9}

    marks = {"start": mark(7, 5, 1.0), "torch": mark(140, 74, 41.0), "ready": mark(147, 76, 43.0)}
    facts = check.facts(out) | {"kernel": "Linux 6.1 aarch64"}
    found = {
        "what": "a board", "qemu": "QEMU 7.2", "board": facts, "packages": ["torch==2.9.1", "pygments==1"],
        "startup": {"marks": marks}, "report": json.loads((out / "report.json").read_text()), "limit_bytes": 430 * MIB,
        "rss_anon_bytes": {job: check.peak_bytes(out, job) for job in record.JOBS}, "refused_said": "one\nneeds 5 GiB",
    }  # fmt: skip
    text = record.text([found])
    assert "| a board | 7.0 + 2.0 | 0.05 | 180, 180, 180 | 241 of 420 | 430 |" in text
    assert "exit 3: needs 5 GiB" in text
    assert "QEMU 7.2; torch==2.9.1\n" in text
