"""Wheels with the kernels in them: one library for each kind of CPU of the building machine's architecture.

They serve every CPython from 3.11 on (the stable ABI), so such a wheel needs no compiler where it is installed. Without a
compiler here the wheel is a pure one, and kernels are built on first use. So they are for editable installs, and with
LOCKSTEP_KERNELS=torch, which builds a wheel in a second.
"""

from __future__ import annotations

import platform
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelBuildHook(BuildHookInterface):  # type: ignore[misc]
    """Called by hatchling around the making of a wheel."""

    _scratch: tempfile.TemporaryDirectory[str] | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """version: "standard" or "editable". Adds the libraries to `build_data`, and the platform to the wheel's tag."""
        if self.target_name != "wheel" or version == "editable":
            return
        sys.path.insert(0, self.root)
        try:
            from lockstep.kernels import build, variants
            from lockstep.utils import env
        finally:
            sys.path.remove(self.root)
        if env.kernels() == "torch":
            return
        try:
            build.compiler()
        except build.BuildError as error:
            self.app.display_warning(f"no kernels in this wheel, they are built on first use: {error}")
            return
        self._scratch = tempfile.TemporaryDirectory()
        libraries = []
        for variant in variants.VARIANTS:
            if variant.machine not in ("", platform.machine()):
                continue
            self.app.display_info(f"compiling the kernels for {variant.name} ...")
            try:
                libraries.append(build.build(variant, Path(self._scratch.name)))
            except build.BuildError as error:  # an older compiler does not know every CPU
                self.app.display_warning(f"no kernels for {variant.name} in this wheel: {error}")
        if not libraries:
            return
        build_data["force_include"].update({str(path): f"lockstep/kernels/{build.SHIPPED.name}/{path.name}" for path in libraries})
        build_data["pure_python"] = False
        build_data["tag"] = f"cp311-abi3-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """The wheel at `artifact_path` is made."""
        if self._scratch is not None:
            self._scratch.cleanup()
