"""The house has floors: a package imports only from the floors below it, read from the source itself."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "lockstep"
FLOORS = {
    "version": 0, "utils": 0, "protocol": 1, "config": 1, "observability": 2, "grammar": 2, "kernels": 3, "distributed": 4,
    "attention": 5, "planner": 5, "layers": 6, "weights": 7, "models": 8, "worker": 9, "executor": 10,
    "engine": 11, "simulation": 11.5, "cluster": 12, "frontend": 13,
    "server": 14, "llm": 14, "cli": 15,
}  # fmt: skip
# protocol and config share a floor, and stay apart all the same; attention and planner likewise
SIBLINGS = {("config", "protocol"), ("protocol", "config"), ("attention", "planner"), ("planner", "attention")}
# above the executor only its contract and its factory may be named, and the core plan, which doctor prints
EXECUTOR_DOOR = {
    "lockstep.cluster.load_book",
    "lockstep.cluster.prefix_index",
    "lockstep.executor.contract",
    "lockstep.executor.factory",
    "lockstep.executor.affinity",
}
TORCH_FREE = [
    "lockstep", "lockstep.engine.core", "lockstep.protocol", "lockstep.config.validate", "lockstep.config.hf", "lockstep.llm",
    "lockstep.distributed.topology", "lockstep.distributed.partition", "lockstep.distributed.progress",
    "lockstep.distributed.message_queue",
    "lockstep.executor.contract", "lockstep.executor.factory", "lockstep.executor.multiproc", "lockstep.executor.node_agent",
    "lockstep.frontend.inputs",
    "lockstep.grammar.compiled", "lockstep.planner", "lockstep.cli.plan",
    "lockstep.frontend.tokenizer", "lockstep.cli.main", "lockstep.cli.flags", "lockstep.utils.net", "lockstep.observability.logging",
]  # fmt: skip


def modules():
    return [p for p in sorted(ROOT.rglob("*.py")) if "testing" not in p.parts and "assets" not in p.parts]


def floor_name(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path):
    """(module, names) of every import in the file, function-local ones too; TYPE_CHECKING blocks are types only."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module, [alias.name for alias in node.names]


def violations(path: Path):
    here = floor_name(path)
    if here in ("__init__", "__main__"):
        return
    assert here in FLOORS, f"{path} stands on no floor of the table"
    for module, names in imported(path):
        parts = module.split(".")
        if parts[0] != "lockstep" or module == "lockstep":
            continue
        there = parts[1]
        if there == "testing":
            yield f"{path}: imports {module}: testing is imported by nothing in the package"
        elif there != here and (FLOORS[there] > FLOORS[here] or (FLOORS[there] == FLOORS[here] and (here, there) not in SIBLINGS)):
            yield f"{path}: {here} (floor {FLOORS[here]}) imports {there} (floor {FLOORS[there]})"
        elif there == "executor" and FLOORS[here] > FLOORS["executor"]:
            full = {module} | {f"{module}.{n}" for n in names}
            if not full & EXECUTOR_DOOR:
                yield f"{path}: imports {module}: above the executor only {sorted(EXECUTOR_DOOR)} may be named"


def test_every_import_points_down():
    found = [v for path in modules() for v in violations(path)]
    assert not found, "\n".join(found)


def test_the_rule_can_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "layers").mkdir()
    bad = tmp_path / "layers" / "x.py"
    bad.write_text("def f():\n    from lockstep.engine import core\n")
    assert list(violations(bad))


@pytest.mark.parametrize("module", TORCH_FREE)
def test_imports_with_torch_blocked(module):
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'torch': raise ImportError('torch is blocked')\n"
        "sys.meta_path.insert(0, Block())\n"
        f"import {module}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
