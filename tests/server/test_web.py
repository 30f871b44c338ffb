"""The page at `/`: how it is served, and what people meet on it, in a real browser."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from lockstep.server.routes import web
from lockstep.testing.server import running_server
from tests.server.browser.fake_server import KEY, fake_server
from tests.server.browser.setup import browser_folder, drive
from tests.server.node import NoNodeError

ROOT = Path(__file__).parents[2]
SCENARIOS = re.findall(r"^  async (\w+)\(", (Path(__file__).parent / "browser" / "scenarios.mjs").read_text(), re.MULTILINE)
FAKE = [name for name in SCENARIOS if name != "real"]


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()
    app.include_router(web.router)
    return TestClient(app)


def test_every_file_of_the_page_is_served_with_the_policy(client: TestClient) -> None:
    paths = ["/", "/favicon.ico", *(f"/web/{path.name}" for path in web.FOLDER.iterdir())]
    assert len(paths) > 10
    for path in paths:
        found = client.get(path)
        assert found.status_code == 200 and found.content, path
        assert web.is_shell(path)
        assert found.headers["content-security-policy"] == web.POLICY
        assert found.headers["x-content-type-options"] == "nosniff"
        again = client.get(path, headers={"If-None-Match": found.headers["etag"]})
        assert again.status_code == 304 and not again.content
        assert client.head(path).status_code == 200


@pytest.mark.parametrize("name", ["..%2Froutes%2Fweb.py", "%2e%2e/app.py", "nothing.js", "index.html%00.js"])
def test_nothing_else_is_served(client: TestClient, name: str) -> None:
    assert client.get(f"/web/{name}").status_code == 404


def test_only_the_page_needs_no_key() -> None:
    for path in ("/v1/models", "/v1/cluster", "/metrics", "/web", "/webhook", "//web/app.js"):
        assert not web.is_shell(path)


def test_the_html_has_no_script_no_style_and_no_address_of_another_host() -> None:
    html = (web.FOLDER / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)", html)
    assert not re.search(r"\son\w+=|\sstyle=|<style|javascript:", html)
    for path in web.FOLDER.iterdir():
        addresses = set(re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}[^\s\"')]*", path.read_text()))
        assert addresses <= {"http://www.w3.org/2000/svg"}, path.name


def test_scripts_make_no_html_of_text() -> None:
    makers = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser"
    for path in web.FOLDER.glob("*.js"):
        assert not re.search(makers, path.read_text()), path.name


def test_the_page_is_small() -> None:
    assert sum(len(asset.content) for asset in web.assets().values()) < 80_000


def test_the_wheel_has_the_page(tmp_path: Path) -> None:
    """Built as users build it, without kernels, which take a minute."""
    code = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    environment = {"LOCKSTEP_KERNELS": "torch", "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=environment, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"lockstep/server/web/{path.name}" for path in web.FOLDER.iterdir()} <= names


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    """Every scenario against the fake server: one browser for all of them."""
    with fake_server() as fake:
        try:
            return {result["name"]: result for result in drive("scenarios.mjs", [fake.url, *FAKE], timeout_s=150)}
        except NoNodeError as e:
            pytest.skip(str(e))


@pytest.mark.parametrize("name", FAKE)
def test_in_a_browser(results: dict[str, dict[str, Any]], name: str) -> None:
    assert results[name]["ok"], results[name]["error"]


def test_in_a_browser_with_a_real_server() -> None:
    """The demo model over two ranks, from the page to the engine and back. The page itself comes without the key."""
    try:
        browser_folder()
    except NoNodeError as e:
        pytest.skip(str(e))
    with running_server("--api-key", KEY) as server:
        for path in ("/", *(f"/web/{name}" for name in web.assets()), "/favicon.ico"):
            assert httpx.get(server.url + path, timeout=10).status_code == 200, path
        (result,) = drive("scenarios.mjs", [server.url, "real"], timeout_s=90)
    assert result["ok"], result["error"]
