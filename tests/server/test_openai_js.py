"""OpenAI's JavaScript client against a real server, which wants a key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lockstep import LLM, SamplingParams
from lockstep.testing.server import running_server
from tests.server import node

FOLDER = Path(__file__).parent / "js"
SCENARIOS = re.findall(r"^  async (\w+)\(", (FOLDER / "client.mjs").read_text(), re.MULTILINE)
KEY, PROMPT = "sk-of-the-test", "def fibonacci(n):"


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    """Every scenario in one run of node."""
    try:
        folder = node.installed(FOLDER)
    except node.NoNodeError as e:
        pytest.skip(str(e))
    with LLM(cpu_binding=False) as llm:
        text = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=10), use_tqdm=False)[0].outputs[0].text
    with running_server("--api-key", KEY) as server:
        found = node.drive(FOLDER / "client.mjs", [server.url, KEY, text], {"CLIENT_FOLDER": str(folder)}, timeout_s=150)
    return {result["name"]: result for result in found}


@pytest.mark.parametrize("name", SCENARIOS)
def test_in_javascript(results: dict[str, dict[str, Any]], name: str) -> None:
    assert results[name]["ok"], results[name]["error"]
