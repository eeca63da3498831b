"""The main job in stages, configured by recipes, resumable: teacher, SFT, its control, GFlowNet, test, report."""

import logging


# Where bitsandbytes is installed, importing PEFT makes it warn of a kernel that nothing here needs.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from .command import main  # noqa: E402
from .job import run  # noqa: E402
from .recipe import Recipe, load_recipe  # noqa: E402


__all__ = ["Recipe", "load_recipe", "main", "run"]
