"""Hatchling's build hook: compiles the engine when qbench is installed; without a compiler it warns and goes on."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

sys.path.insert(0, str(Path(__file__).parents[2]))  # the hook runs before the package is installed
from qbench.native import build, sources


class EngineHook(BuildHookInterface[Any]):
    """Adds the library to a wheel, or leaves it beside its sources in an editable install."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile before anything is packed."""
        if self.target_name != "wheel":
            return
        if reason := build.build():
            self.app.display_warning(f"qbench: the native backend was not built: {reason}; the reference runs instead")
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        build_data["artifacts"].append(f"qbench/native/{sources.LIBRARY.name}")
