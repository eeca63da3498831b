"""The main job in stages, configured by recipes, resumable: teacher, SFT, its control, GFlowNet, test, report."""

from .recipe import Recipe, load_recipe
from .run import run


__all__ = ["Recipe", "load_recipe", "run"]
