"""vLLM itself recommends and samples what the recommender does. `make test-vllm` installs it and runs this file."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from gflowtrl import ItemCatalog, Recommender
from gflowtrl.data import build_tokenizer
from gflowtrl.export import vllm_files
from tests.export.shop import HISTORIES, assert_same_lists, make_recommender
from tests.tiny import tiny_model


PYTHON = os.environ.get("GFLOWTRL_VLLM_PYTHON", "")
pytestmark = pytest.mark.skipif(
    not Path(PYTHON).is_file(), reason="GFLOWTRL_VLLM_PYTHON is not an interpreter with vLLM; `make test-vllm` sets it"
)
SETTINGS = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
WIDTH = 128  # vLLM's attention on a CPU needs heads of at least 32


def ask(recommender: Recommender, folder: Path, histories: list, beams: int = 0) -> dict:
    """Return the answer of `vllm_worker.py`."""
    (folder / "export").mkdir()
    vllm_files.write(recommender, folder / "export")
    (folder / "in.json").write_text(json.dumps({"histories": histories, "count": 20, "beams": beams}))
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    worker = Path(__file__).with_name("vllm_worker.py")
    command = [PYTHON, worker, folder / "export", folder / "in.json", folder / "out.json"]
    done = subprocess.run(command, capture_output=True, text=True, env=variables | SETTINGS, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "out.json").read_text())


def check_draws(recommender: Recommender, histories: list, draws: list) -> set[int]:
    """Compare each draw's log-probability with the policy's, and return the lengths of the drawn ids."""
    log_probs = recommender.policy.leaf_log_probs(recommender.prompts(histories))
    lengths = set()
    for row, drawn in zip(log_probs, draws, strict=True):
        assert len(drawn) == 20
        for items, value in drawn:
            leaf = int(recommender.catalog.leaf_of(items[:1]))
            assert items == recommender.catalog.items_of(leaf) and abs(float(row[leaf]) - value) < 1e-4
            lengths.add(int(recommender.catalog.tree.leaf_lengths[leaf]))
    return lengths


def test_beam_search_and_samples(tmp_path):
    # vLLM's beam search asks for 40 tokens at each step, so the vocabulary must have as many.
    ids = {
        item: tuple(f"<{level}_{code}>" for level, code in zip("abc", (item % 16, item % 13, item % 11), strict=True))
        for item in range(150)
    }
    tokenizer = build_tokenizer(ids)
    model = tiny_model(len(tokenizer), hidden_size=WIDTH)
    catalog = ItemCatalog.from_semantic_ids(ids, tokenizer)
    recommender = Recommender(model, tokenizer, catalog, max_history_items=8)
    histories = [[1, 2, 3], [149], list(range(20))]
    answer = ask(recommender, tmp_path, histories, beams=20)
    assert_same_lists(recommender.recommend(histories, k=20, num_beams=20), answer["lists"])
    assert check_draws(recommender, histories, answer["draws"]) == {3}


def test_samples_of_ids_of_several_lengths_at_a_temperature(tmp_path):
    recommender = make_recommender(hidden_size=WIDTH)
    answer = ask(recommender, tmp_path, HISTORIES)
    assert check_draws(recommender, HISTORIES, answer["draws"]) == {2, 3}
