"""The page's folder is complete or says what it lacks; serving it shows that folder, to this machine, and nothing else."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from artifacts_cases import make_artifacts
from serving import served
from typer.testing import CliRunner

from edgetune import errors
from edgetune.artifacts.manifest import Manifest
from edgetune.artifacts.reading import check_files, files_in, read_manifest
from edgetune.cli import app
from edgetune.web import folder as pages
from edgetune.web.folder import PAGE, PageSettings, find_runtime, write_page
from edgetune.web.server import CONTENT_SECURITY_POLICY, server


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_artifacts(tmp_path / "page")


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files that stand for npm's, with hashes of their own."""
    import hashlib

    dist = tmp_path / "npm" / "node_modules" / "onnxruntime-web" / "dist"
    dist.mkdir(parents=True)
    hashes = {}
    for name in pages.RUNTIME_FILES:
        (dist / name).write_bytes(name.encode())
        hashes[name] = hashlib.sha256(name.encode()).hexdigest()
    monkeypatch.setattr(pages, "RUNTIME_FILES", hashes)
    return dist


def run(*arguments: object) -> tuple[int, str, BaseException | None]:
    found = CliRunner().invoke(app, [str(each) for each in arguments])
    return found.exit_code, found.output, found.exception


def test_the_page_is_put_beside_artifacts_that_stay_as_they_are(
    manifest: Manifest, tmp_path: Path, runtime: Path
) -> None:
    page = tmp_path / "page"
    before = (page / "manifest.json").read_bytes()
    code, said, _ = run("export", "--web", page, "--ort-web", tmp_path / "npm", "--device", "android-4gb")
    assert code == 0
    assert f"page: edgetune serve {page}" in said
    assert (page / "manifest.json").read_bytes() == before
    check_files(page, read_manifest(page))
    for name in files_in(PAGE):
        assert (page / name).read_bytes() == (PAGE / name).read_bytes()
    for name in pages.RUNTIME_FILES:
        assert (page / "ort" / name).read_bytes() == (runtime / name).read_bytes()
    settings = json.loads((page / "page.json").read_text())
    assert settings["cap_bytes"] == 2**30
    assert settings["device"] == "Android phone, 4 GB"


def test_without_the_runtime_the_lines_that_get_it_are_printed(manifest: Manifest, tmp_path: Path) -> None:
    page = tmp_path / "page"
    code, said, _ = run("export", "--web", page, "--ram-cap", "300MiB")
    assert code == 0
    assert "npm install --ignore-scripts --prefix ort-web onnxruntime-web@1.19.2" in said
    assert f"edgetune export --web {page} --ort-web ort-web --ram-cap 300MiB" in said
    assert json.loads((page / "page.json").read_text())["cap_bytes"] == 300 * 2**20


@pytest.mark.parametrize("place", ["npm", "npm/node_modules", "npm/node_modules/onnxruntime-web", "npm/node_modules/onnxruntime-web/dist"])  # fmt: skip
def test_the_runtime_is_found_where_npm_may_have_put_it(tmp_path: Path, runtime: Path, place: str) -> None:
    assert find_runtime(tmp_path / place, "1.19.2") == runtime


def test_another_version_of_the_runtime_is_refused_before_anything_is_written(
    manifest: Manifest, tmp_path: Path, runtime: Path
) -> None:
    before = set(files_in(tmp_path / "page"))
    last = list(pages.RUNTIME_FILES)[-1]
    (runtime / last).write_bytes(b"of 1.20")
    for words in (f"{last} has other bytes; wanted: the file of onnxruntime-web 1.19.2", f"{last} is missing"):
        _, _, error = run("export", "--web", tmp_path / "page", "--ort-web", runtime)
        assert isinstance(error, errors.BackendUnavailable)
        assert words in str(error)
        (runtime / last).unlink(missing_ok=True)
    _, _, error = run("export", "--web", tmp_path / "page", "--ort-web", tmp_path / "page")
    assert isinstance(error, errors.BackendUnavailable)
    assert "npm install" in str(error)
    assert set(files_in(tmp_path / "page")) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--ort-web", "x", "--classes", "3", "--output", "y"), "name its folder with --web"),
        (("--web", "x", "--output", "y", "--classes", "3"), "leave --output out"),
        (("--web", "x", "--format", "onnx"), "--format ort"),
    ],
)
def test_what_makes_no_sense_together_is_a_usage_error(arguments: tuple[str, ...], words: str) -> None:
    _, _, error = run("export", *arguments)
    assert isinstance(error, errors.UsageError)
    assert words in str(error)


def test_artifacts_that_have_a_file_of_the_pages_name_are_refused(manifest: Manifest, tmp_path: Path) -> None:
    import msgspec

    taken = msgspec.structs.replace(manifest, files={**manifest.files, "app.js": manifest.files["model.safetensors"]})
    with pytest.raises(errors.ArtifactsError, match=r"hold app\.js, which the page needs"):
        write_page(tmp_path / "page", taken, PageSettings(), None)


# ------------------------------------------------------------------------------------------------------------- serving


@pytest.fixture
def address(manifest: Manifest, tmp_path: Path) -> Iterator[str]:
    write_page(tmp_path / "page", manifest, PageSettings(), None)
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "page" / "link.txt").symlink_to(tmp_path / "secret.txt")
    (tmp_path / "page" / ".hidden").write_text("secret")
    with served(tmp_path / "page") as url:
        yield url.removeprefix("http://").rstrip("/")


def ask(address: str, path: str, *, method: str = "GET", host: str | None = None) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(address, timeout=10)
    connection.putrequest(method, path, skip_host=host is not None)
    if host is not None:
        connection.putheader("Host", host)
    connection.endheaders()
    return connection.getresponse()


def test_the_page_and_its_modules_come_isolated_and_with_their_types(address: str, tmp_path: Path) -> None:
    for path, kind in (
        ("/", "text/html"),
        ("/app.js?threads=1", "text/javascript"),
        ("/manifest.json", "application/json"),
    ):
        answer = ask(address, path)
        assert answer.status == 200
        assert answer.headers["Content-Type"].startswith(kind)
        assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        assert answer.headers["Content-Security-Policy"] == CONTENT_SECURITY_POLICY
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert ask(address, "/").read() == (PAGE / "index.html").read_bytes()
    head = ask(address, "/", method="HEAD")
    assert (head.status, head.read()) == (200, b"")


@pytest.mark.parametrize(
    "path",
    ["/../secret.txt", "/%2e%2e/secret.txt", "/..%2fsecret.txt", "/core/../../secret.txt", "//secret.txt", "/link.txt",
     "/.hidden", "/core", "/core/", "/nothing", "/C:/x", "/%00", "/a%5c..%5csecret.txt"],
)  # fmt: skip
def test_nothing_but_plain_files_of_the_folder_is_served(address: str, path: str) -> None:
    answer = ask(address, path)
    assert answer.status == 404
    assert b"secret" not in answer.read()


def test_other_names_for_this_machine_and_other_methods_are_refused(address: str) -> None:
    assert ask(address, "/", host="rebound.example").status == 421
    assert ask(address, "/", host="localhost:1").status == 200
    assert ask(address, "/", method="POST").status == 501


def test_the_page_says_the_same_policy_as_the_server() -> None:
    text = (PAGE / "index.html").read_text(encoding="utf-8")
    for part in CONTENT_SECURITY_POLICY.split("; "):
        # A page can't say of itself who may frame it.
        assert part in text or part.startswith("frame-ancestors")


def test_no_page_and_a_port_that_is_taken_are_errors(tmp_path: Path, manifest: Manifest) -> None:
    with pytest.raises(errors.ArtifactsError, match=r"holds no page \(index.html\)"):
        server(tmp_path, 0)
    write_page(tmp_path / "page", manifest, PageSettings(), None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(errors.UsageError, match="Try another --port"):
            server(tmp_path / "page", taken.getsockname()[1])
