"""The examples that train with TRL's own trainers, and the paper's method, on micro shops."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gflowtrl import ItemCatalog, Recommender
from gflowtrl.data import PromptEncoder, SyntheticShop, build_tokenizer, leave_one_out, read_interactions, write_folder
from gflowtrl.recommender import write_recommender_files
from tests.processes import run_python
from tests.tiny import tiny_model


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """The data, and a recommender of random weights."""
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
def test_they_train_measure_and_leave_a_recommender(name, folders, tmp_path):
    data_dir, model = folders
    command = [EXAMPLES / f"{name}.py", "--data_dir", data_dir, "--model", model]
    options = ["--output_dir", tmp_path, "--max_steps", "2", "--use_cpu", "true", "--learning_rate", "0.01"]
    ran = run_python([*command, *options], tmp_path)
    assert ran.returncode == 0, ran.stderr[-3000:]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["steps"] == 2
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path))
    if name != "trl_grpo":  # where no free answer is right, GRPO has nothing to learn from
        assert any(not torch.equal(before[key], after[key]) for key in before)
    recommender = Recommender.from_pretrained(tmp_path)
    test = leave_one_out(read_interactions(data_dir)).test
    lists = recommender.recommend(test["history"], k=5, num_beams=20)
    hits = [target in [one.item for one in found] for found, target in zip(lists, test["target"], strict=True)]
    assert sum(hits) / len(hits) == pytest.approx(metrics["item_recall@5"])


def test_prompts_as_text_are_the_tokens_that_recommending_reads(folders, monkeypatch):
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
def test_the_papers_method_trains_measures_and_leaves_recommenders(source, folders, tmp_path):
    """The shop logs sessions, a folder without events knows the target alone."""
    if source == "shop":
        data, where, rewarded = SyntheticShop(n_users=60).generate()[0], ["--users", "60"], "1 x interaction"
    else:
        folder = shutil.copytree(folders[0], tmp_path / "data", ignore=shutil.ignore_patterns("events.jsonl"))
        data, where, rewarded = read_interactions(folder), ["--data_dir", folder], "10 x ground_truth"
    out = tmp_path / "out"
    ran = run_python([EXAMPLES / "gflowgr_paper.py", *where, "--epochs", "1", "1", "--output_dir", out], tmp_path)
    assert ran.returncode == 0, ran.stderr[-3000:]
    table = {name: values for name, values in re.findall(r"^(SFT|SFT continued|GFlowGR) {2,}(.*)$", ran.stdout, re.M)}
    assert list(table) == ["SFT", "SFT continued", "GFlowGR"]
    test = leave_one_out(data).test
    for values, name in zip(table.values(), ["sft", "sft_continued", "gflowgr"], strict=True):
        recall, ndcg, coverage = map(float, values.split())
        assert 0 <= ndcg <= recall <= 1 and 0 < coverage <= 1  # NaN is not
        lists = Recommender.from_pretrained(out / name).recommend(test["history"], k=10, num_beams=20)
        found = [[one.item for one in ranked] for ranked in lists]
        hits = [target in items for items, target in zip(found, test["target"], strict=True)]
        assert recall == pytest.approx(sum(hits) / len(hits), abs=5e-5)
        assert coverage == pytest.approx(len(set(sum(found, []))) / len(data.items), abs=5e-5)
    card = (out / "gflowgr" / "README.md").read_text()
    assert "| losses | 1 x sft, 1 x trajectory_balance |" in card
    assert f"| rewards | {rewarded}, 1 x collaborative, 1 x token_similarity |" in card
    assert "| trajectories | 3 per prompt from ground_truth, curriculum |" in card


def test_the_page_of_the_paper_shows_the_whole_script_in_its_order():
    page = (EXAMPLES.parent / "docs" / "paper.md").read_text()
    shown = re.findall(r":start-after: \"- (\d\. .*)\"", page)
    headings = re.findall(r"^# -+ (\d\. .*)$", (EXAMPLES / "gflowgr_paper.py").read_text(), re.M)
    assert shown == headings == re.findall(r"^## (\d\. .*)$", page, re.M)
