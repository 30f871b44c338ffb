"""Rules of size and safety, read from the source."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lockstep"
MAX_FILE, MAX_FUNCTION = 400, 80
ALLOWED_LONG: set[str] = set()  # starts empty, and should stay so
PICKLES = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
PICKLING_CALLS = {
    "broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "send_object_list", "recv_object_list",
}  # fmt: skip


def sources(*folders: Path):
    return [p for f in folders for p in sorted(f.rglob("*.py"))]


def test_files_are_short():
    long = {str(p.relative_to(ROOT)): n for p in sources(PACKAGE, ROOT / "scripts") if (n := len(p.read_text().splitlines())) > MAX_FILE}
    assert set(long) <= ALLOWED_LONG, long


def test_functions_are_short():
    long = [
        f"{p.relative_to(ROOT)}:{n.lineno} {n.name} has {n.end_lineno - n.lineno + 1} lines"
        for p in sources(PACKAGE, ROOT / "scripts")
        for n in ast.walk(ast.parse(p.read_text()))
        if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) and n.end_lineno - n.lineno + 1 > MAX_FUNCTION
    ]
    assert not long, "\n".join(long)


def test_only_parallel_state_has_globals():
    found = [
        f"{p.relative_to(ROOT)}:{n.lineno}"
        for p in sources(PACKAGE)
        if p != PACKAGE / "distributed" / "parallel_state.py"
        for n in ast.walk(ast.parse(p.read_text()))
        if isinstance(n, ast.Global)
    ]
    assert not found, found


def test_environment_is_read_in_one_file():
    """os.environ may be read only in utils/env.py (a child's environment is made from a copy in utils/procs.py)."""
    found = [
        f"{p.relative_to(ROOT)}:{n.lineno} {ast.unparse(n)}"
        for p in sources(PACKAGE)
        if p != PACKAGE / "utils" / "env.py" and "testing" not in p.parts
        for n in ast.walk(ast.parse(p.read_text()))
        if isinstance(n, ast.Attribute) and ast.unparse(n) in ("os.environ", "os.getenv")
    ]
    assert not found, "\n".join(found)


def test_nothing_is_pickled():
    found = []
    for p in sources(PACKAGE):
        for n in ast.walk(ast.parse(p.read_text())):
            names = [a.name for a in n.names] if isinstance(n, ast.Import) else [n.module or ""] if isinstance(n, ast.ImportFrom) else []
            found += [f"{p.relative_to(ROOT)}:{n.lineno} imports {x}" for x in names if x.split(".")[0] in PICKLES]
            if isinstance(n, ast.Call):
                call = ast.unparse(n.func)
                torch_object = call.split(".")[0] in ("dist", "torch") and call.split(".")[-1] in PICKLING_CALLS
                if call in ("torch.save", "torch.load") or torch_object:
                    found.append(f"{p.relative_to(ROOT)}:{n.lineno} calls {call}")
    assert not found, "\n".join(found)


def test_readme_is_short_and_starts_with_a_command():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) < 200
    assert any(line.startswith("```") for line in lines[:30])
