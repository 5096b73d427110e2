"""The build hook: the dashboard goes into the wheel, and into the source tree of an editable install."""

from __future__ import annotations

import sys
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class DashboardHook(BuildHookInterface):  # type: ignore[type-arg]
    """Without npm's packages the API and the command line are built all the same; the server's front page says what is missing."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - hatchling calls it by these names
        sys.path.insert(0, self.root)
        from web.build import NotBuilt, build

        try:
            build()
        except NotBuilt as error:
            self.app.display_warning(f"Without the dashboard (run `python -m web.build` when npm's packages can be had): {error}")
