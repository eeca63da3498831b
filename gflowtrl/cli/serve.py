"""`gflowtrl serve`: recommendations over HTTP."""

from gflowtrl.serving.command import main


__all__ = ["main"]
