"""What this host has, found without importing torch (its import costs seconds and a CUDA context costs memory)."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from lockstep.utils import env


def cuda_device_count() -> int:
    """CUDA devices that this process may use: device nodes, narrowed by CUDA_VISIBLE_DEVICES."""
    nodes = sum(1 for p in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", p.name))
    visible = env.cuda_visible_devices()
    if visible is None or nodes == 0:
        return nodes
    listed = [entry.strip() for entry in visible.split(",") if entry.strip()]
    if "-1" in listed:  # CUDA ignores everything from the first invalid entry on
        listed = listed[: listed.index("-1")]
    mig = any(entry.startswith("MIG-") for entry in listed)  # one node may hold several MIG devices
    return len(listed) if mig else min(len(listed), nodes)


def torch_has_cuda() -> bool:
    """Whether the installed torch was built for CUDA, read from its version file."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return False
    text = (Path(found.origin).parent / "version.py").read_text(encoding="utf-8")
    built = re.search(r"^cuda\s*(?::[^=\n]+)?=\s*(.+)$", text, re.MULTILINE)
    return built is not None and built.group(1).strip() != "None"
