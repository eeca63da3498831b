"""The `gflowtrl` command on a tiny run: the result of each command, and its error messages."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors import SafetensorError

from gflowtrl import Recommender, __version__
from gflowtrl.cli import COMMANDS, main
from gflowtrl.cli.common import guarded
from gflowtrl.data import SyntheticShop, write_folder
from tests.pipeline.micro import micro_settings


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with data, a recipe, and its output of `gflowtrl train` for two seeds."""
    root = tmp_path_factory.mktemp("cli")
    shop = SyntheticShop(n_users=40, n_items=30, departments=3, shelves=3, interests=3, min_users_shown=15)
    data = shop.generate()[0]
    write_folder(data, root / "data")
    settings = micro_settings(root / "out", data={"max_history_items": 6})
    settings["sft"]["max_steps"] = settings["gflownet"]["max_steps"] = 3
    (root / "micro.yaml").write_text(yaml.safe_dump(settings | {"data_dir": str(root / "data")}))
    for seed in ("1", "2"):
        assert main(["train", "--config", str(root / "micro.yaml"), "--seed", seed, "--use_cpu", "true"]) == 0
    return root


@pytest.fixture(scope="module")
def results(home) -> dict:
    return json.loads((home / "out" / "results.json").read_text())


def test_evaluate_reproduces_the_metrics_of_the_run(home, results, capsys):
    entry = results["methods"]["gflownet"]
    options = ["--model", entry["model"], "--data_dir", str(home / "data"), "--ks", "3", "5", "--num_beams", "5"]
    assert main(["evaluate", *options, "--json", "--output", str(home / "metrics.json")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["metrics"] == pytest.approx({name: entry["metrics"][name] for name in printed["metrics"]})
    assert printed["metrics"].keys() >= {"item_recall@5", "unseen_item_recall@5", "unseen_coverage@3"}
    assert json.loads((home / "metrics.json").read_text()) == printed
    assert main(["evaluate", *options, "--split", "validation"]) == 0
    printed = capsys.readouterr().out
    assert "| recall@5 " in printed and "| seen removed |" in printed


def test_options_come_from_a_file_and_the_command_line_wins(home, results, capsys):
    options = {"model": results["methods"]["sft"]["model"], "data_dir": str(home / "data"), "json": True}
    (home / "evaluate.yaml").write_text(yaml.safe_dump(options | {"ks": [3], "num_beams": 7}))
    assert main(["evaluate", "--config", str(home / "evaluate.yaml"), "--num_beams", "5"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["num_beams"] == 5 and "recall@3" in printed["metrics"] and "recall@5" not in printed["metrics"]
    (home / "wrong.yaml").write_text("modle: x")
    assert main(["evaluate", "--config", str(home / "wrong.yaml")]) == 2
    assert "Did you mean" in capsys.readouterr().err


def test_recommend_answers_each_line_as_the_recommender_does(home, results, capsys):
    model = results["methods"]["gflownet"]["model"]
    recommender = Recommender.from_pretrained(model)
    items = recommender.catalog.items
    histories = [[items[0], items[3]], [items[5]], []]
    lines = [{"user": "u1", "history": histories[0]}, histories[1], {"history": histories[2], "note": 1}]
    (home / "in.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    files = ["--input", str(home / "in.jsonl"), "--output", str(home / "answers" / "out.jsonl")]
    assert main(["recommend", "--model", model, "-k", "4", *files]) == 0
    answers = [json.loads(line) for line in (home / "answers" / "out.jsonl").read_text().splitlines()]
    expected = recommender.recommend(histories, k=4)
    assert [[one["item"] for one in answer["recommendations"]] for answer in answers] == [
        [one.item for one in ranked] for ranked in expected
    ]
    assert all(one["title"] for answer in answers for one in answer["recommendations"])
    assert answers[0]["user"] == "u1" and answers[2]["note"] == 1 and answers[1]["history"] == histories[1]
    (home / "allowed.json").write_text(json.dumps(items[:2]))
    assert main(["recommend", "--model", model, *files[:2], "--allowed_items", str(home / "allowed.json")]) == 0
    lists = [json.loads(line)["recommendations"] for line in capsys.readouterr().out.splitlines()]
    assert all({one["item"] for one in ranked} == set(items[:2]) for ranked in lists)


def test_unknown_items_give_one_line_of_warning(home, results, capsys):
    (home / "strange.jsonl").write_text("[123456789]\n")
    words = ["--model", results["methods"]["sft"]["model"], "--input", str(home / "strange.jsonl"), "-k", "2"]
    assert main(["recommend", *words]) == 0
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)["recommendations"]) == 2
    assert "warning: 1 items of the histories are not in the catalog" in printed.err
    assert "recommend(" not in printed.err  # the source line that Python would print


def test_an_invalid_line_is_named_and_leaves_no_partial_file(home, results, capsys):
    (home / "broken.jsonl").write_text("[1]\n{history: 1}\n")
    out = home / "never.jsonl"
    model = results["methods"]["sft"]["model"]
    assert main(["recommend", "--model", model, "--input", str(home / "broken.jsonl"), "--output", str(out)]) == 2
    assert "broken.jsonl, line 2: invalid JSON" in capsys.readouterr().err
    assert not list(home.glob("*never*"))


def test_compare_lists_every_method_once_with_means_over_seeds(home, results, capsys):
    assert main(["compare", str(home / "out"), "--k", "5", "--json", "--plot", str(home / "plot.png")]) == 0
    rows = {row["title"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == ["Teacher", "SFT", "SFT continued (control), 3 steps", "GFlowNet: micro"]
    files = sorted((home / "out").glob("report-*/results.json"))
    runs = [json.loads(file.read_text()) for file in files]
    values = [run["methods"]["gflownet"]["metrics"]["item_ndcg@5"] for run in runs]
    assert len(values) == 2 and sorted(rows["GFlowNet: micro"]["seeds"]) == [1, 2]
    assert rows["GFlowNet: micro"]["metrics"]["item_ndcg@5"] == pytest.approx(sum(values) / 2)
    gaps = [v - run["methods"]["control"]["metrics"]["item_ndcg@5"] for v, run in zip(values, runs, strict=True)]
    assert rows["GFlowNet: micro"]["differences"]["item_ndcg@5"]["mean_difference"] == pytest.approx(sum(gaps) / 2)
    assert (home / "plot.png").stat().st_size > 5000
    assert main(["compare", str(home / "out"), "--k", "5"]) == 0
    assert "±" in capsys.readouterr().out


def test_teacher_and_sft_run_only_their_stages(home, capsys):
    options = ["--config", str(home / "micro.yaml"), "--output_dir", str(home / "alone"), "--use_cpu", "true"]
    assert main(["teacher", *options]) == 0
    assert {folder.name.split("-")[0] for folder in (home / "alone").glob("*-*")} == {"teacher", "test", "report"}
    assert main(["sft", *options, "--stages", "teacher"]) == 2
    assert "sets the stages itself; leave --stages out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "'trian' is not a command of gflowtrl"),
        (["train", "--config", "nowhere"], "There is no recipe nowhere; give a YAML file, or one of .*quickstart"),
        (["train", "--num_processes", "2", "--gflownet.learning_rat", "1"], "Did you mean 'gflownet.learning_rate'"),
        (["train", "--num_processes", "two"], "--num_processes: invalid int value: 'two'. Run gflowtrl train --help"),
        (["train", "--num_processes", "0"], "--num_processes is 0; give a whole number of at least 1"),
        (["train", "--num_processes"], "--num_processes: expected one argument. Run gflowtrl train --help"),
        (["train", "--accelerate_config", "zero9"], "no accelerate configuration zero9.*zero2"),
        (["evaluate"], "are required: --model, --data_dir. Run gflowtrl evaluate --help"),
        (["recommend", "--model", "/no/where"], "/no/where is not a folder"),
        (["compare", "/no/where"], "/no/where has no results.json"),
    ],
)
def test_errors_are_one_line(words, message, capsys, tmp_path):
    (tmp_path / "empty").touch()
    extra = ["--input", str(tmp_path / "empty")] if words[0] == "recommend" else []
    assert main([*words, *extra]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error), error


def test_errors_of_the_operating_system_are_sentences(tmp_path, capsys):
    assert guarded(lambda: (tmp_path / "histories").read_text()) == 2
    assert capsys.readouterr().err == f"error: There is no file {tmp_path}/histories. Check the path.\n"
    assert guarded(lambda: tmp_path.read_text()) == 2
    assert capsys.readouterr().err == f"error: {tmp_path} cannot be used: Is a directory.\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RecursionError("maximum recursion depth exceeded"), "Something in the input is nested too deeply to be read"),
        (OverflowError("int too large"), r"A number in the input is too large \(int too large\)"),
        (SafetensorError("header too large"), r"A file of tensors cannot be read \(header too large\)"),
        (EOFError(), r"A file ends too early \(EOFError\)"),
    ],
)
def test_errors_of_parsers_are_sentences(error, message, capsys):
    def work():
        raise error

    assert guarded(work) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and re.match(f"error: {message}", printed), printed


def test_a_recipe_that_is_nested_too_deeply_is_named(tmp_path, capsys):
    file = tmp_path / "deep.yaml"
    file.write_text(f"a: {9999 * '['}")
    assert main(["train", "--config", str(file)]) == 2
    printed = capsys.readouterr().err
    assert printed == f"error: {file} cannot be read as YAML (it is nested too deeply). Repair or replace the file.\n"


def test_help_and_version(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in COMMANDS)
    assert main(["--version"]) == 0 and capsys.readouterr().out.strip() == __version__
    for name in COMMANDS:
        try:
            assert main([name, "--help"]) == 0
        except SystemExit as stop:
            assert stop.code == 0
        assert f"usage: gflowtrl {name}" in capsys.readouterr().out


def test_the_installed_command_is_the_module():
    ran = subprocess.run([sys.executable, "-m", "gflowtrl", "--version"], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == __version__


def test_a_closed_pipe_prints_no_error():
    command = [sys.executable, "-m", "gflowtrl", "--help"]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    job.stdout.close()
    assert job.stderr.read() == b"" and job.wait() == 1


def test_help_shows_defaults_except_none_and_false(capsys):
    with pytest.raises(SystemExit):
        main(["prepare", "--help"])
    printed = capsys.readouterr().out
    assert "(default: first)" in printed and "(default: None)" not in printed and "(default: False)" not in printed


def test_recommend_names_the_line_of_the_file(home, results, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("gflowtrl.cli.recommend.CHUNK_SIZE", 2)
    model = results["methods"]["gflownet"]["model"]
    item = Recommender.from_pretrained(model).catalog.items[0]
    lines = [[item], [item], "", [item], [item], [item], [item, 987654321]]
    file = tmp_path / "in.jsonl"
    file.write_text("\n".join(json.dumps(line) if line else "" for line in lines), encoding="utf-8-sig")
    words = ["recommend", "-k", "2", "--input", str(file)]
    assert main([*words, "--model", model]) == 0
    printed = capsys.readouterr()
    answers = [json.loads(line) for line in printed.out.splitlines()]
    assert [answer["history"] for answer in answers] == [line for line in lines if line]
    warning = "warning: 1 items of the histories are not in the catalog and were left out; the first is 987654321"
    assert f"{warning} in {file}, line 7." in printed.err

    shutil.copytree(model, tmp_path / "bare")
    (tmp_path / "bare" / "item_details.json").unlink()  # with the counts for users without known items
    file.write_text("\n".join(json.dumps(line) for line in [[item], [item], [item], [123456789]]))
    assert main([*words, "--model", str(tmp_path / "bare")]) == 2
    assert f"The history in {file}, line 4 is empty or holds no known item" in capsys.readouterr().err


def test_consecutive_seeds_draw_different_lists(home, results, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("gflowtrl.cli.recommend.CHUNK_SIZE", 2)
    model = results["methods"]["gflownet"]["model"]
    recommender = Recommender.from_pretrained(model)
    histories = [recommender.catalog.items[:1]] * 8
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, histories)))
    drawn = []
    for seed in ("0", "1", "0", "-1"):
        words = ["--model", model, "--input", str(tmp_path / "in.jsonl"), "--strategy", "sample", "--seed", seed]
        assert main(["recommend", *words, "-k", "5"]) == 0
        lists = [json.loads(line)["recommendations"] for line in capsys.readouterr().out.splitlines()]
        drawn.append([tuple(one["item"] for one in ranked) for ranked in lists])
    assert drawn[0] == drawn[2]
    assert len({*drawn[0], *drawn[1], *drawn[3]}) == 24  # all draws differ between lines and between seeds
    in_python = recommender.recommend(histories[:2], k=5, strategy="sample", seed=0)
    assert drawn[0][:2] == [tuple(one.item for one in ranked) for ranked in in_python]


@pytest.mark.parametrize("content", [b"[1, 2", b'{"a": 1}', b"[[1]]", b"[1.5]", b"\xff"])
def test_an_invalid_file_of_allowed_items_is_named(content, tmp_path, capsys):
    (tmp_path / "allowed.json").write_bytes(content)
    words = ["--model", "x", "--input", str(tmp_path / "in"), "--allowed_items", str(tmp_path / "allowed.json")]
    assert main(["recommend", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(
        r"/allowed\.json (must hold|cannot be read as) a JSON list of items", error
    )
