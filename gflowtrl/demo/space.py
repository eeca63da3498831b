"""The folder of a Hugging Face Space that shows the demo of a recommender."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from huggingface_hub import ModelCard, SpaceCardData

import gflowtrl
from gflowtrl.checks import check_text
from gflowtrl.files import check_new_folder, new_folder, reading, write_text
from gflowtrl.hub import local_copy
from gflowtrl.recommender import Recommender

from .run_reward import copy_reward, read_run_reward


CARD = "README.md"
APP = '''"""The demo of a recommender that was trained with gflowtrl."""

from pathlib import Path

from gflowtrl.demo import run_demo


if __name__ == "__main__":
    run_demo(Path(__file__).parent / "model", title={title!r})
'''
#: Spaces without a GPU get torch without CUDA, which is gigabytes smaller.
REQUIREMENTS = """--extra-index-url https://download.pytorch.org/whl/cpu
{requirement}
"""
TEXT = """# {title}

A generative recommender of {items:,} items: build a history, see what the model recommends with which probability, and
follow each recommendation through the tree of semantic ids, token by token. `app.py` serves the page of
`gflowtrl demo` for the recommender in `model`.
"""


def write_space(
    model_dir: str | os.PathLike,
    out: str | os.PathLike,
    title: str | None = None,
    requirement: str | None = None,
) -> Path:
    """Write the folder of a Space: `app.py`, `requirements.txt`, `README.md` and the recommender in `model`.

    Nothing is uploaded. The recommender is loaded and saved again, so that the folder has neither optimizer states nor
    other files of a checkpoint. Of a run's stage, only the options of the reward are copied.

    Args:
        model_dir: the folder of a recommender, or its name on the Hugging Face Hub.
        out: the new folder, which is complete or missing.
        title: title of the Space; by default the name of the model.
        requirement: how pip installs this library; by default this release from the package index.

    Returns:
        The folder.

    Raises:
        FileExistsError: `out` exists and is not an empty folder.
        ValueError: a file of the recommender is damaged.
        FileNotFoundError: the recommender's folder or one of its files is missing.
        ImportError: Gradio is not installed, so that its version is unknown.
    """
    out = Path(out)
    check_new_folder(out)
    check_text("The title", title, optional=True)
    check_text("The requirement", requirement, optional=True)
    try:
        gradio = version("gradio")
    except PackageNotFoundError:
        raise ImportError("The demo needs gradio. Run: pip install gflowtrl[demo]") from None
    source = local_copy(model_dir)
    recommender = Recommender.from_pretrained(source)
    read_run_reward(source, recommender)  # a damaged file is an error here, and not on the Space
    title = title or model_name(model_dir)
    data = SpaceCardData(
        title=title, emoji="🌳", colorFrom="blue", colorTo="green", sdk="gradio", sdk_version=gradio,
        python_version="3.12", app_file="app.py", pinned=False, license=_license_of(source),
    )  # fmt: skip
    with new_folder(out) as folder:
        recommender.save_pretrained(folder / "model")
        if (source / CARD).is_file():
            shutil.copyfile(source / CARD, folder / "model" / CARD)
        copy_reward(source, recommender, folder)
        write_text(folder / "app.py", APP.format(title=title))
        requirement = requirement or f"gflowtrl[demo]=={gflowtrl.__version__}"
        write_text(folder / "requirements.txt", REQUIREMENTS.format(requirement=requirement))
        text = TEXT.format(title=title, items=len(recommender.catalog))
        write_text(folder / CARD, f"---\n{data}\n---\n\n{text}")
    return out


def model_name(model_dir: str | os.PathLike) -> str:
    """Return the name of a model for people, who need not know where its folder is: of the stage, if it is one's."""
    if not Path(model_dir).is_dir():  # a name on the Hub
        return str(model_dir)
    path = Path(model_dir).resolve()
    return path.parent.name if path.name == "model" else path.name


def _license_of(folder: Path) -> str | None:
    """Return the license that the card of a model names, if it has a card."""
    card = folder / CARD
    if not card.is_file():
        return None
    with reading(card, "a model card"):
        return ModelCard.load(card).data.license
