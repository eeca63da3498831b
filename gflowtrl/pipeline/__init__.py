"""The main job in stages, configured by recipes, resumable: teacher, SFT, its control, GFlowNet, test, report."""

from .job import run
from .recipe import Recipe, load_recipe


__all__ = ["Recipe", "load_recipe", "run"]
