"""The examples with TRL's trainers and the paper's method, on tiny shops."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gflowtrl import ItemCatalog, Recommender
from gflowtrl.data import PromptEncoder, SyntheticShop, build_tokenizer, leave_one_out, read_interactions, write_folder
from gflowtrl.data.recommender_files import write_recommender_files
from tests.processes import run_python
from tests.tiny import tiny_model


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """The folders of the data and of a recommender with random weights."""
    root = tmp_path_factory.mktemp("examples")
    shop = SyntheticShop(n_users=60, n_items=40, departments=3, shelves=3, interests=3, min_users_shown=15)
    data = shop.generate()[0]
    write_folder(data, root / "data")
    tokenizer = build_tokenizer(data.semantic_ids)
    catalog = ItemCatalog.from_semantic_ids(data.semantic_ids, tokenizer)
    tiny_model(len(tokenizer)).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    catalog.save_pretrained(root / "model")
    write_recommender_files(root / "model", PromptEncoder(catalog, tokenizer))
    return root / "data", root / "model"


@pytest.mark.parametrize("name", ["trl_sft", "trl_dpo", "trl_grpo"])
def test_they_train_evaluate_and_save_a_recommender(name, folders, tmp_path):
    data_dir, model = folders
    command = [EXAMPLES / f"{name}.py", "--data_dir", data_dir, "--model", model]
    options = ["--output_dir", tmp_path, "--max_steps", "2", "--use_cpu", "true", "--learning_rate", "0.01"]
    ran = run_python([*command, *options], tmp_path)
    assert ran.returncode == 0, ran.stderr[-3000:]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["steps"] == 2
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path))
    if name != "trl_grpo":  # GRPO learns nothing because no free completion is correct
        assert any(not torch.equal(before[key], after[key]) for key in before)
    recommender = Recommender.from_pretrained(tmp_path)
    test = leave_one_out(read_interactions(data_dir)).test
    lists = recommender.recommend(test["history"], k=5, num_beams=20)
    hits = [target in [one.item for one in ranked] for ranked, target in zip(lists, test["target"], strict=True)]
    assert sum(hits) / len(hits) == pytest.approx(metrics["item_recall@5"])


def test_prompts_as_text_have_the_tokens_of_the_recommender(folders, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import same_rows

    rows = same_rows.SameRows(same_rows.RowsArguments(*map(str, folders)))
    for history in rows.splits.test["history"][:10]:
        again = rows.tokenizer(rows.prompt(history))["input_ids"]
        assert again == rows.encoder([history])["input_ids"][0].tolist()
        completion = rows.tokenizer(" " + rows.semantic_id(history[-1]))["input_ids"]
        nodes = rows.catalog.tree.walk(rows.catalog.leaf_of([history[-1]]))[0, 1:]
        assert completion == rows.catalog.tree.tokens_of(nodes).tolist()


@pytest.mark.parametrize("source", ["shop", "folder"])
def test_the_papers_method_trains_evaluates_and_saves_recommenders(source, folders, tmp_path):
    """The shop has a session log; a folder without events has only the target."""
    if source == "shop":
        data, options, reward = SyntheticShop(n_users=60).generate()[0], ["--users", "60"], "1 x interaction"
    else:
        folder = shutil.copytree(folders[0], tmp_path / "data", ignore=shutil.ignore_patterns("events.jsonl"))
        data, options, reward = read_interactions(folder), ["--data_dir", folder], "10 x ground_truth"
    out = tmp_path / "out"
    ran = run_python([EXAMPLES / "gflowgr_paper.py", *options, "--epochs", "1", "1", "--output_dir", out], tmp_path)
    assert ran.returncode == 0, ran.stderr[-3000:]
    table = {name: values for name, values in re.findall(r"^(SFT|SFT continued|GFlowGR) {2,}(.*)$", ran.stdout, re.M)}
    assert list(table) == ["SFT", "SFT continued", "GFlowGR"]
    test = leave_one_out(data).test
    for values, name in zip(table.values(), ["sft", "sft_continued", "gflowgr"], strict=True):
        recall, ndcg, coverage = map(float, values.split())
        assert 0 <= ndcg <= recall <= 1 and 0 < coverage <= 1  # False for NaN
        ranked = Recommender.from_pretrained(out / name).recommend(test["history"], k=10, num_beams=20)
        lists = [[one.item for one in recommendations] for recommendations in ranked]
        hits = [target in items for items, target in zip(lists, test["target"], strict=True)]
        assert recall == pytest.approx(sum(hits) / len(hits), abs=5e-5)
        assert coverage == pytest.approx(len(set(sum(lists, []))) / len(data.items), abs=5e-5)
    card = (out / "gflowgr" / "README.md").read_text()
    assert "| losses | 1 x sft, 1 x trajectory_balance |" in card
    assert f"| rewards | {reward}, 1 x collaborative, 1 x token_similarity |" in card
    assert "| trajectories | 3 per prompt from ground_truth, curriculum |" in card


def test_the_page_of_the_paper_shows_the_whole_script_in_order():
    page = (EXAMPLES.parent / "docs" / "paper.md").read_text()
    sections = re.findall(r":start-after: \"- (\d\. .*)\"", page)
    headings = re.findall(r"^# -+ (\d\. .*)$", (EXAMPLES / "gflowgr_paper.py").read_text(), re.M)
    assert sections == headings == re.findall(r"^## (\d\. .*)$", page, re.M)
