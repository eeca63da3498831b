"""Reading recipes and command lines."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from gflowtrl.configuration import merged, parse_options, parse_value, read_yaml, set_option
from gflowtrl.pipeline import load_recipe
from gflowtrl.pipeline.recipe import SCHEDULE
from tests.tiny import tiny_model

from .micro import micro_recipe, micro_settings


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("2E5", 2e5),
        ("-1.5e-2", -0.015),
        ("7", 7),
        ("null", None),
        ("true", True),
        ("False", False),
        ("no", "no"),
        ("on", "on"),
        ("a: [1", "a: [1"),
    ],
)
def test_values_are_yaml_and_exponents_are_numbers(text, value):
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


BILLION = ["a: &a [1]", *(f"{b}: &{b} [{', '.join(9 * ['*' + a])}]" for a, b in pairwise("abcdefgh"))]


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (BILLION, "more than 100,000 values.*line 6"),
        (["model: &a", "  hidden_size: *a"], "an alias contains itself.*line 1"),
        (["rewards: &a [*a]"], "an alias contains itself"),
    ],
)
def test_aliases_that_grow_without_end_are_refused(tmp_path, lines, reason):
    """Otherwise the checks of the values, which visit each one, take hours."""
    file = tmp_path / "recipe.yaml"
    file.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=rf"(?s)recipe\.yaml cannot be read as YAML \(.*{reason}"):
        read_yaml(file)
    text = "a: &a {b: 1}\nc: *a\nd: [*a, *a]\n"
    file.write_text(text)
    assert read_yaml(file) == yaml.safe_load(text)


@pytest.mark.parametrize(
    "value",
    ["2024-13-41", "!!int x", "!!float x", "!!bool x", "!!timestamp x", "!!map x", "9" * 5000, "a\x00b"],
)
def test_a_value_that_yaml_cannot_make_is_named_with_its_line(tmp_path, value):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"seed: 1\nname: {value}\n")
    with pytest.raises(ValueError, match=r"(?s)recipe\.yaml cannot be read as YAML \(.*line 2") as caught:
        read_yaml(file)
    assert len(str(caught.value)) < 700


def test_the_second_of_two_equal_keys_is_named(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("seed: 1\nmodel:\n  dtype: a\n  dtype: b\n")
    with pytest.raises(ValueError, match=r"duplicate key 'dtype'.*line 4"):
        read_yaml(file)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("../up", "without / and"), ("a\nb", "printable"), ("n" * 201, "200 bytes"), ("\ud800", "half a character")],
)
def test_a_name_must_fit_into_the_name_of_a_folder(tmp_path, name, reason):
    """The report's folder is made when everything has been computed."""
    with pytest.raises(ValueError, match=rf"name .*{reason}"):
        micro_recipe(tmp_path, name=name)
    assert micro_recipe(tmp_path, name="Übung 1: (a)").name == "Übung 1: (a)"


def test_options_take_every_form():
    options = parse_options(shlex.split("--a.b 1 --c=x --flag --losses vargrad sft --low -0.5"))
    assert options == {"a.b": 1, "c": "x", "flag": True, "losses": ["vargrad", "sft"], "low": -0.5}
    with pytest.raises(ValueError, match="'stray' is not an option"):
        parse_options(["stray"])


def test_an_option_that_is_nested_too_deeply_is_shown():
    with pytest.raises(ValueError, match=r"^The value '\[\[\[.*\[\[' is nested too deeply"):
        parse_options(["--prompt", "[" * 5000])
    assert parse_value("2024-13-41") == "2024-13-41"  # text, if YAML cannot make a value of it


def test_set_option_reaches_into_lists_and_makes_sections():
    tree = {"rewards": [{"weight": 1}, {"weight": 2}], "seed": 1}
    set_option(tree, "rewards.1.weight", 5)
    set_option(tree, "sft.learning_rate", 0.1)
    assert tree == {"rewards": [{"weight": 1}, {"weight": 5}], "seed": 1, "sft": {"learning_rate": 0.1}}
    tree["data"] = {"semantic_ids": None}
    set_option(tree, "data.semantic_ids.levels", 2)
    assert tree.pop("data") == {"semantic_ids": {"levels": 2}}
    with pytest.raises(ValueError, match=re.escape("--rewards.2 cannot be set: it is a list with positions 0 to 1")):
        set_option(tree, "rewards.2.weight", 5)
    with pytest.raises(ValueError, match="seed is the value 1 and has no fields"):
        set_option(tree, "seed.x", 5)


def test_another_type_replaces_its_section(recipe_file):
    """Whatever the order of the options; the weight of a reward stays, and so does a section of the same type."""
    options = "--teacher.epochs 2 --teacher.type sasrec --rewards.1.type token_similarity --rewards.1.prefix true"
    recipe = load_recipe(recipe_file, shlex.split(options))
    assert recipe.teacher == {"type": "sasrec", "epochs": 2}
    assert recipe.rewards[1] == {"type": "token_similarity", "weight": 0.7, "prefix": True}
    assert load_recipe(recipe_file, shlex.split("--teacher.type ease")).teacher["regularization"] == 5.0


def test_another_model_keeps_its_section():
    """The sizes of one model type are mostly those of another; unknown ones are errors (`_check_model`)."""
    for key in ("model_type", "model_name_or_path"):
        tree = {"model": {"hidden_size": 8, "model_type": "llama"}}
        set_option(tree, f"model.{key}", "x")
        assert tree["model"] == {"hidden_size": 8, "model_type": "llama"} | {key: "x"}


def test_a_type_changes_a_section_that_another_option_gives(recipe_file):
    """It is the later one, so it counts."""
    text = "--teacher '{type: sasrec, epochs: 2}' --teacher.regularization 3 --teacher.type ease"
    assert load_recipe(recipe_file, shlex.split(text)).teacher == {"type": "ease", "regularization": 3}
    text = "--rewards '[{type: ground_truth, weight: 2}]' --rewards.0.type token_similarity"
    assert load_recipe(recipe_file, shlex.split(text)).rewards == [{"type": "token_similarity", "weight": 2}]


def test_a_recipe_tells_its_differences_to_the_base():
    base = {
        "model": {"model_type": "llama", "hidden_size": 8},
        "teacher": {"type": "sasrec", "dropout": 0.1},
        "seed": 1,
    }
    changes = {"model": {"model_type": "t5", "d_model": 4}, "teacher": {"dropout": 0.3}}
    assert merged(base, changes) == {
        "model": {"model_type": "t5", "d_model": 4}, "teacher": {"type": "sasrec", "dropout": 0.3}, "seed": 1,
    }  # fmt: skip
    assert merged(base, {"teacher": {}}) == base | {"teacher": {}} and merged(base, {}) == base


def test_the_largest_recipe_trains_all_weights(tmp_path):
    tiny_model(vocab_size=8).config.save_pretrained(tmp_path)
    found = {
        name: load_recipe(ROOT / f"recipes/gflowgr_office_{name}.yaml", ["--model.model_name_or_path", str(tmp_path)])
        for name in ("qwen", "smollm2")
    }
    assert found["qwen"].peft == {} and found["qwen"].peft_config is None
    assert found["smollm2"].peft_config is not None


ROOT = Path(__file__).parents[2]
RECIPES = sorted([*ROOT.glob("recipes/*.yaml"), *ROOT.glob("benchmarks/*/recipes/**/*.yaml")])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_this_repository_are_valid(path, tmp_path):
    tiny_model(vocab_size=8).config.save_pretrained(tmp_path)  # nothing is looked up on the Hub here
    options = ["--data_dir", "somewhere"] if path.stem != "quickstart" else []
    if "office_smollm2" in path.stem or "qwen" in path.stem:
        options += ["--model.model_name_or_path", str(tmp_path)]
    recipe = load_recipe(path, options)
    assert recipe.name == path.stem
    missing = {"sft"} if recipe.start == "untrained" else set()
    if path.stem in ("ease", "most_popular", "text"):  # rows of tables
        missing = {"sft", "control", "gflownet"}
    assert {"teacher", "sft", "control", "gflownet"} - set(recipe.stages) == missing


def test_a_base_lies_beside_the_recipe_or_comes_with_the_library(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("base: gflowgr_office_llama\ngflownet: {num_generations: 9}\n")
    recipe = load_recipe(mine)
    assert recipe.gflownet["num_generations"] == 9 and recipe.model["hidden_size"] == 128 and recipe.name == "mine"
    (tmp_path / "gflowgr_office_llama").write_text("model: {hidden_size: 8, num_attention_heads: 2}\nstages: [sft]\n")
    assert load_recipe(mine).model["hidden_size"] == 8  # a file next to it comes first
    mine.write_text("base: other.yaml\n")
    with pytest.raises(
        FileNotFoundError, match=r"no recipe other\.yaml, which .*mine\.yaml names as its base.*quickst"
    ):
        load_recipe(mine)


def test_broken_yaml_and_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no recipe .*absent.yaml"):
        read_yaml(tmp_path / "absent.yaml")
    file = tmp_path / "recipe.yaml"
    for content, message in (
        ("a: [1", "cannot be read as YAML .*line 1"),
        ("seed: 1\nseed: 2", "duplicate key 'seed'"),
        ("- 1", "not list"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_yaml(file)


@pytest.fixture
def recipe_file(tmp_path):
    file = tmp_path / "micro.yaml"
    settings = micro_settings(tmp_path / "out")
    del settings["name"]
    file.write_text(yaml.safe_dump(settings))
    return file


def test_command_line_sets_any_field(recipe_file):
    options = (
        "--data_dir d --sft.learning_rate 1e-2 --learning_rate 3e-4 --loss_type vargrad --rewards.1.weight 2 "
        "--rewards.1.temperature 0.5 --evaluation.ks 3 --data.max_history_items=4"
    )
    recipe = load_recipe(recipe_file, shlex.split(options))
    assert recipe.name == "micro"
    assert recipe.data_dir == "d"
    assert recipe.data.max_history_items == 4
    assert recipe.evaluation.ks == [3]
    assert recipe.training_arguments("sft", "x").learning_rate == 1e-2
    arguments = recipe.training_arguments("gflownet", "x")
    assert (arguments.learning_rate, arguments.loss_type, arguments.eval_ks) == (3e-4, ["vargrad"], [3])
    assert arguments.reward_weights == [0.3, 2.0]
    assert recipe.rewards[1]["temperature"] == 0.5


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--sft.learning_rat 1", "no field 'sft.learning_rat'. Did you mean 'sft.learning_rate'"),
        ("--num_generation 4", "Did you mean 'num_generations'"),
        ("--gflowent.learning_rate 1", "Did you mean 'gflownet'"),
        ("--evaluation.beams 4", "no field 'evaluation.beams'"),
        ("--data.shop.n_user 4", "Did you mean 'data.shop.n_users'"),
        ("--teacher.regularizaton 4", "Did you mean 'teacher.regularization'"),
        ("--rewards.1.temprature 1", "Did you mean 'rewards.1.temperature'"),
        ("--model.hidden_sizes 1", "Did you mean 'model.hidden_size'"),
        ("--data.shop.n_users many", "data.shop.n_users must be a whole number, but it is 'many'"),
        ("--data.shop.noise 2", "data.shop.noise is 2"),
        ("--teacher.type als", "teacher.type is 'als'; choose from sasrec"),
        ("--rewards.0.type none", "rewards.0.type is 'none'"),
        ("--rewards.0.weight much", "rewards.0.weight must be a number or 'learned'"),
        ("--rewards.0.weight learned", "rewards.0.weight is 'learned': validation rows decide it"),
        ("--rewards.1.weight learned --reward_beta 2", "not gflownet.reward_beta: 2"),
        ("--rewards.1.temperature 0", "rewards.1: The temperature of CollaborativeReward is 0; it must be a finite"),
        ("--rewards.1.normalization minmax", "rewards.1.normalization is 'minmax'; choose 'softmax' or"),
        ("--rewards.1.normalization standard", "rewards.1 has negative values, but gflownet.reward_transform is p"),
        ("--rewards.0.type rank_penalty", "rewards.0 has negative values, but gflownet.reward_transform is power"),
        ("--rewards.1.popularity views", "rewards.1.popularity is 'views'; choose 'interactions' or 'impressions'"),
        ("--rewards.1.item_counts 3", "no field 'rewards.1.item_counts'"),
        ("--rewards.0.normalize true", "no field 'rewards.0.normalize'"),
        ("--rewards.0.type interaction --rewards.0.values 1 0", "rewards.0: The values of InteractionReward are"),
        ("--sft.lr_scheduler_kwargs x", "sft.lr_scheduler_kwargs is 'x'; give options with their values"),
        ("--gflownet.lr_scheduler_kwargs x", "gflownet.lr_scheduler_kwargs is 'x'; give options with their values"),
        (
            "--rewards.0.type token_similarity --rewards.0.prefix no",
            "rewards.0.prefix must be true or false, but it is 'no'",
        ),
        ("--rewards.0.type interaction --rewards.0.values [null]", "rewards.0: a number in values is None"),
        ("--rewards.0.type interaction --rewards.0.values 3", "rewards.0.values is 3; give a list"),
        ("--rewards.0.type interaction --rewards.0.target x", "rewards.0.target is 'x'; it must be a finite number"),
        ("--rewards.0.type interaction --rewards.0.value 1", "Did you mean 'rewards.0.values'"),
        ("--rewards.0.type token_similarity --rewards.0.prefixes true", "Did you mean 'rewards.0.prefix'"),
        ("--rewards.0.type likelihood --rewards.0.of teacher", "rewards.0.of is 'teacher'; choose 'sft' or 'policy'"),
        ("--rewards.0.type title_likelihood", "rewards.0.model must name the language model"),
        ("--rewards.0.type title_likelihood --rewards.0.model m --rewards.0.titles t", "no field 'rewards.0.titles'"),
        (
            "--rewards.0.type title_likelihood --rewards.0.model m --rewards.0.batch_size 0",
            "rewards.0.batch_size of TitleLikelihoodReward is 0; it must be a whole number of at least 1",
        ),
        ("--seed soon", "seed must be a whole number, but it is 'soon'"),
        ("--sft.learning_rate fast", "sft.learning_rate must be a number"),
        ("--num_generations 0", "num_generations is 0"),
        ("--num_generations 1 --loss_type vargrad", "needs at least 2"),
        ("--sampler no_such", "Unknown sampler 'no_such'"),
        ("--stages sft gflow", "There is no stage 'gflow'. Did you mean 'gflownet'"),
        ("--control.num_train_epochs 9", "the control takes exactly the GFlowNet's steps"),
        (
            "--start untrained --control.per_device_train_batch_size 9",
            "the control takes exactly the GFlowNet's rows in a step",
        ),
        ("--start untrained --control.num_train_epochs -1", "control.num_train_epochs is -1"),
        ("--start untrained --gflownet.num_train_epochs -1", "gflownet.num_train_epochs is -1"),
        ("--gflownet.num_train_epochs two", "gflownet.num_train_epochs must be a number, but it is 'two'"),
        ("--start untrained --control.loss_type vargrad", "leave control.loss_type out"),
        ("--start teacher", "start is 'teacher'; choose 'sft' or 'untrained'"),
        (
            "--start untrained --rewards.0.type likelihood",
            "rewards.0 is the likelihood of the SFT model, which does not exist under start: untrained: set start: "
            "sft, or rewards.0.of: policy",
        ),
        (
            "--start untrained --ref_weight 0.5",
            "gflownet.ref_weight is 0.5, but under start: untrained the reference model would be untrained too",
        ),
        (
            "--start untrained --loss_type sdpo",
            "gflownet.loss_type 'sdpo' has a reference, but under start: untrained",
        ),
        ("--control.loss_type vargrad", "leave control.loss_type out"),
        ("--gflownet.output_dir x", "gflownet.output_dir cannot be set: it follows from output_dir"),
        ("--data.k_core 5", "the synthetic shop is taken as it is"),
        ("--evaluation.num_beams 2", "evaluation.num_beams is 2; evaluation.ks needs at least 5"),
        ("--stages sft --evaluation.num_beams 2", "evaluation.num_beams is 2"),
        ("--evaluation.ks 0 3", "evaluation.ks is [0, 3]; give lengths of at least 1"),
        (
            "--evaluation.bootstrap_samples 1",
            "evaluation.bootstrap_samples is 1; it must be a whole number of at least 2",
        ),
        ("--evaluation.batch_size 0", "evaluation.batch_size is 0"),
        ("--stages []", "stages is empty"),
        ("--stages gflownet --sft.learning_rat 1", "Did you mean 'sft.learning_rate'"),
        ("--rewards []", "gflownet.loss_type ['exact_flow'] needs rewards"),
        (
            "--gflownet.trajectory_weighting source --gflownet.source_weights {on_policy: 2}",
            "source_weights names 'on_policy', but the sampler's sources",
        ),
        ("--gflownet.max_history_items 3", "it follows from data.max_history_items"),
        ("--control.max_history_items 3", "it follows from data.max_history_items"),
        ("--gflownet.eval_ks 3", "it follows from evaluation.ks"),
        ("--gflownet.model_init_kwargs {dtype: float32}", "it follows from model"),
        ("--sft.packing true", "sft.packing cannot be set"),
        ("--sft.max_length 9", "sft.max_length cannot be set: it follows from data.max_history_items"),
    ],
)
def test_mistakes_are_found_before_any_work(recipe_file, option, message):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        load_recipe(recipe_file, shlex.split(re.sub(r"({.*})", r"'\1'", option)))


def test_the_control_copies_the_schedule(tmp_path):
    recipe = micro_recipe(tmp_path)
    control, flow = (recipe.training_arguments(stage, tmp_path) for stage in ("control", "gflownet"))
    assert control.loss_type == ["sft"]
    assert control.learning_rate == flow.learning_rate == 2e-3
    for name in SCHEDULE:
        assert getattr(control, name) == getattr(flow, name)


@pytest.mark.parametrize(
    ("control", "flow", "expected"),
    [
        ({}, {"num_train_epochs": 2}, (2, -1)),
        ({}, {"max_steps": 7}, (3, 7)),
        ({"num_train_epochs": 5}, {"num_train_epochs": 2}, (5, -1)),
        ({"num_train_epochs": 5}, {"max_steps": 7}, (5, -1)),
        ({"max_steps": 9}, {"num_train_epochs": 2}, (3, 9)),
    ],
)
def test_a_control_from_the_untrained_model_may_have_its_own_length(tmp_path, control, flow, expected):
    flow = flow | {"loss_type": "exact_flow", "per_device_train_batch_size": 16}
    recipe = micro_recipe(tmp_path, start="untrained", control=control, gflownet=flow)
    args = recipe.training_arguments("control", tmp_path)
    assert (args.num_train_epochs, args.max_steps) == expected and args.per_device_train_batch_size == 16


def test_sft_runs_where_others_begin_from_it_or_it_is_asked_for(tmp_path):
    for settings, trained in (
        ({}, ["sft", "control", "gflownet"]),
        ({"stages": ["gflownet"]}, ["sft", "gflownet"]),
        ({"stages": ["teacher"]}, []),
        ({"start": "untrained"}, ["control", "gflownet"]),
        ({"start": "untrained", "stages": ["teacher", "gflownet"]}, ["gflownet"]),
        ({"start": "untrained", "stages": ["sft", "gflownet"]}, ["sft", "gflownet"]),
        ({"start": "untrained", "stages": ["sft"]}, ["sft"]),
        ({"start": "untrained", "stages": ["teacher"]}, []),
    ):
        assert micro_recipe(tmp_path, **settings).trained_stages == trained, settings
