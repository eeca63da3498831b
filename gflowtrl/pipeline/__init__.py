"""The main job as stages: data, teacher, SFT, its control, GFlowNet, test, report; resumable, and configured by recipes."""

from .main import main
from .recipe import Recipe, load_recipe
from .run import run


__all__ = ["Recipe", "load_recipe", "main", "run"]
