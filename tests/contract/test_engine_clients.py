"""Every engine client in the tree, those of tests and benchmarks too, has all that the contract asks for."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest

from lockstep.cluster.contract import EngineClient
from lockstep.config.build import build_config
from lockstep.config.validate import resolve
from lockstep.protocol import EngineOutput, EngineRequest, SamplingParams
from lockstep.testing.paced import make

ROOT = Path(__file__).parents[2]
HALVES = {"Operated"}  # of a client: no client by themselves


def client_classes() -> list[tuple[str, str]]:
    """(module, class) of everything below lockstep, tests and benchmarks that is based on EngineClient, by name."""
    bases = {"EngineClient"}
    found: list[tuple[str, str]] = []
    paths = [path for top in ("lockstep", "tests", "benchmarks") for path in sorted((ROOT / top).rglob("*.py"))]
    trees = {".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text()) for path in paths}
    for _ in range(3):  # a class may be based on one that is met later
        found = [
            (module, node.name)
            for module, tree in trees.items()
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef) and any(isinstance(base, ast.Name) and base.id in bases for base in node.bases)
        ]
        bases |= {name for _, name in found}
    return found


@pytest.mark.parametrize(("module", "name"), client_classes())
def test_it_can_be_made(module: str, name: str) -> None:
    cls = getattr(importlib.import_module(module), name)
    assert issubclass(cls, EngineClient)
    assert inspect.isabstract(cls) == (name in HALVES), f"{name} lacks {sorted(cls.__abstractmethods__)}"


def test_all_of_them_are_found() -> None:
    assert {"LocalClient", "DataParallelClient", "PacedClient"} <= {name for _, name in client_classes()}


def test_the_paced_one_stands_still_and_goes_on() -> None:
    client = make(*resolve(build_config(max_model_len=64)))
    request = EngineRequest(request_id="a", prompt_token_ids=[1, 2], sampling=SamplingParams(max_tokens=2), seed=0)
    client.add_request(request)
    client.sleep(1)
    assert client.step() == [] and client.health().sleep_level == 1 and [info.request_id for info in client.requests()] == ["a"]
    with pytest.raises(ValueError, match="sleeps"):
        client.resume()
    client.wake_up()
    outputs: list[EngineOutput] = []
    while not outputs or outputs[-1].finish_reason is None:
        outputs += wait(client)
    assert [output.finish_reason for output in outputs] == [None, "length"] and client.health().replicas[0].ready
    client.pause(), client.resume(), client.reset_prefix_cache()
    assert client.requests() == []


def wait(client: Any) -> list[EngineOutput]:
    """What comes next of a client that is not watched: its step returns at once."""
    while not (found := client.step()):
        pass
    return list(found)
