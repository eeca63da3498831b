"""A run that continues an earlier one with new users and items."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gflowtrl import ItemCatalog, Recommender
from gflowtrl.cli import main
from gflowtrl.data import InteractionData, SyntheticShop, read_folder, write_folder
from gflowtrl.pipeline import run
from gflowtrl.pipeline.continuing import EarlierRun
from gflowtrl.pipeline.run_data import prepare
from gflowtrl.teachers import SASRec, load_teacher

from .micro import micro_recipe
from .test_untrained import Seen


SASREC = {"type": "sasrec", "epochs": 2, "width": 8, "heads": 1, "layers": 1, "learning_rate": 1e-2}
TEACHER = {"type": "mixture", "parts": [SASREC, {"type": "ease"}]}
SHAPE = {"data": {"max_history_items": 6, "semantic_ids": {"codes": 8}}}


def shop() -> InteractionData:
    made = SyntheticShop(n_users=40, n_items=30, departments=3, shelves=3, interests=3, min_users_shown=15)
    return replace(made.generate()[0], events=None, semantic_ids=None)


def before(data: InteractionData) -> tuple[InteractionData, set]:
    """The data of 30 users before three items and each user's last interaction, and these items."""
    new = set(data.items[-3:])
    sequences = [[item for item in sequence[:-1] if item not in new] for sequence in data.sequences[:30]]
    kept = [row for row, sequence in enumerate(sequences) if len(sequence) >= 3]
    items = [item for item in data.items if item not in new]
    old = replace(
        data,
        users=[data.users[row] for row in kept],
        sequences=[sequences[row] for row in kept],
        items=items,
        item_features={item: data.item_features[item] for item in items},
    )
    return old, new


def files_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture(scope="module")
def earlier(tmp_path_factory) -> Path:
    """A folder with the data `old` and `new`, and the run `run` of the former."""
    root = tmp_path_factory.mktemp("earlier")
    data = shop()
    write_folder(before(data)[0], root / "old")
    write_folder(data, root / "new")
    run(micro_recipe(root / "run", data_dir=str(root / "old"), teacher=TEACHER, **SHAPE), quiet=True)
    return root


@pytest.fixture(scope="module")
def continued(earlier):
    recipe = micro_recipe(
        earlier / "next", data_dir=str(earlier / "new"), continue_from=str(earlier / "run"), teacher=TEACHER, **SHAPE
    )
    files, seen = files_of(earlier / "run"), Seen()
    results = run(recipe, quiet=True, callbacks=[seen])
    assert files_of(earlier / "run") == files  # old results are not touched
    return recipe, results, seen.weights


def test_items_keep_their_ids_and_new_ones_get_some(earlier, continued):
    recipe, results, _ = continued
    old = ItemCatalog.from_pretrained(EarlierRun.read(earlier / "run").model)
    new = ItemCatalog.from_pretrained(results["methods"]["gflownet"]["model"])
    ids = dict(zip(new.items, new.semantic_ids, strict=True))
    assert {item: ids[item] for item in old.items} == dict(zip(old.items, old.semantic_ids, strict=True))
    assert set(new.items) - set(old.items) == before(shop())[1] and len(set(ids.values())) == len(ids)
    assert recipe.earlier.summary(new.items).endswith("27 of its items, 3 new ones; 0 are gone.")


def test_the_policy_begins_with_the_earlier_one(earlier, continued):
    _, results, weights = continued
    assert list(results["methods"]) == ["teacher", "control", "gflownet"]
    source = Recommender.from_pretrained(EarlierRun.read(earlier / "run").model)
    tokens = len(source.tokenizer)
    for method in ("control", "gflownet"):
        for name, value in source.model.state_dict().items():
            found = weights[method][name]
            rows = tokens if found.shape != value.shape else len(found)
            assert torch.equal(found[:rows], value[:rows]), name
    recommender = Recommender.from_pretrained(results["methods"]["gflownet"]["model"])
    assert recommender.recommend([recommender.catalog.items[-3:]], k=3)[0]  # also for new items
    assert (Path(results["methods"]["gflownet"]["model"]) / "item_tokenizer").is_dir()


def test_the_run_can_be_continued_again(earlier, continued, tmp_path):
    recipe, _, _ = continued
    again = replace(recipe, continue_from=str(earlier / "next"), output_dir=str(tmp_path / "again"))
    assert prepare(again).catalog.semantic_ids == prepare(recipe).catalog.semantic_ids
    assert again.model["model_name_or_path"].startswith(str(earlier / "next"))


def test_a_teacher_begins_with_another_one():
    data = shop()
    old, new = before(data)
    options = {"epochs": 2, "width": 8, "heads": 1, "layers": 1, "progress": False}
    start = SASRec.fit(old.sequences, old.items, learning_rate=1e-2, **options)
    warm = SASRec.fit(data.sequences, data.items[::-1], start=start, learning_rate=1e-12, **options)
    known = [item for item in old.items if item not in new]
    vectors = {item: vector for item, vector in zip(warm.items, warm.item_vectors(), strict=True)}
    torch.testing.assert_close(torch.stack([vectors[item] for item in known]), start.item_vectors(), atol=1e-6, rtol=0)
    for name, value in start.state_dict().items():
        if name != "item_embedding.weight":
            torch.testing.assert_close(warm.state_dict()[name], value, atol=1e-6, rtol=0)
    assert torch.stack([vectors[item] for item in new]).norm(dim=1).min() > 0
    with pytest.raises(ValueError, match="start has the options"):
        SASRec.fit(old.sequences, old.items, start=start, epochs=1, width=16, progress=False)


def test_the_run_trains_its_teacher_further(earlier, tmp_path):
    """After two epochs it is closer to the earlier one than a new teacher is, whatever the seed."""
    options = {"data_dir": str(earlier / "new"), "continue_from": str(earlier / "run"), "stages": ["teacher"], **SHAPE}
    run(micro_recipe(tmp_path / "warm", teacher=TEACHER, **options | {"seed": 8}), quiet=True)
    cold = {key: value for key, value in options.items() if key != "continue_from"}
    run(micro_recipe(tmp_path / "cold", teacher=TEACHER, **cold | {"seed": 8}), quiet=True)
    (start,) = (
        part
        for part in load_teacher(EarlierRun.read(earlier / "run").model / "teacher").parts
        if isinstance(part, SASRec)
    )

    def distance(folder: Path) -> float:
        (found,) = (
            model for path in folder.glob("teacher-*/model") if isinstance(model := load_teacher(path), SASRec)
        )
        rows = [found.items.index(item) for item in start.items]
        return float((found.item_vectors()[rows] - start.item_vectors()).norm() / start.item_vectors().norm())

    assert distance(tmp_path / "warm") < 0.7 * distance(tmp_path / "cold")


def test_other_options_make_a_new_teacher(earlier):
    found = EarlierRun.read(earlier / "run")
    assert isinstance(found.teacher(SASREC), SASRec) and isinstance(found.teacher({**SASREC, "seed": 5}), SASRec)
    assert found.teacher({**SASREC, "width": 16}) is None and found.teacher({"type": "ease"}) is None
    assert found.teacher({**SASREC, "folds": 2}) is None


def test_mistakes(earlier, tmp_path, capsys):
    options = {"data_dir": str(earlier / "new"), "continue_from": str(earlier / "run"), **SHAPE}
    with pytest.raises(FileNotFoundError, match=r"no results\.json. Give the output_dir of a run that has finished"):
        micro_recipe(tmp_path / "x", **options | {"continue_from": str(tmp_path)})
    with pytest.raises(ValueError, match="output_dir is that of the run to continue"):
        micro_recipe(earlier / "run", **options)
    with pytest.raises(ValueError, match="which does not exist under continue_from: set rewards.0.of: policy"):
        micro_recipe(tmp_path / "x", **options, rewards=[{"type": "likelihood"}])
    data = shop()
    ids = {item: ("<a_0>", f"<b_{number}>") for number, item in enumerate(data.items)}
    write_folder(replace(data, semantic_ids=ids), tmp_path / "changed")
    changed = options | {"data_dir": str(tmp_path / "changed"), "data": {"max_history_items": 6}}
    with pytest.raises(ValueError, match=r"27 items have other semantic ids.*tokenize --add"):
        prepare(micro_recipe(tmp_path / "x", **changed))
    renamed = {item: f"n{item}" for item in data.items}
    other = InteractionData(
        "other", data.users, [[renamed[item] for item in row] for row in data.sequences], sorted(renamed.values())
    )
    write_folder(other, tmp_path / "other")
    with pytest.raises(ValueError, match="other has no item of the run"):
        prepare(micro_recipe(tmp_path / "x", **options | {"data_dir": str(tmp_path / "other")}))
    words = [
        "train",
        "--data_dir",
        str(earlier / "new"),
        "--continue_from",
        str(tmp_path),
        "--output_dir",
        str(tmp_path / "y"),
    ]
    assert main(words) == 2
    assert "continue_from" in capsys.readouterr().err and not (tmp_path / "y").exists()


def test_ids_of_the_data_are_kept_too(earlier, continued, tmp_path):
    """A run whose ids are those of its data is continued with data whose new items were added by `tokenize --add`."""
    _, results, _ = continued
    folder = tmp_path / "data"
    data = read_folder(earlier / "new")
    catalog = ItemCatalog.from_pretrained(results["methods"]["gflownet"]["model"])
    ids = dict(zip(catalog.items, catalog.semantic_ids, strict=True))
    write_folder(replace(data, semantic_ids=ids), folder)
    recipe = micro_recipe(
        tmp_path / "out", data_dir=str(folder), continue_from=str(earlier / "next"), data={"max_history_items": 6}
    )
    found = prepare(recipe)
    assert found.item_tokenizer is None and found.catalog.semantic_ids == catalog.semantic_ids
    assert json.loads(json.dumps(recipe.as_dict()))["continue_from"] == str(earlier / "next")


def test_a_damaged_model_is_named_before_anything_is_computed(tmp_path):
    model = tmp_path / "gflownet-1" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    recipe = {"teacher": {"type": "ease"}, "seed": 1}
    results = {"methods": {"gflownet": {"model": "elsewhere/gflownet-1/model"}}, "recipe": recipe}
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert EarlierRun.read(tmp_path).model == model
    (model / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"continue_from: .*model\.safetensors is not a whole safetensors file"):
        EarlierRun.read(tmp_path)
