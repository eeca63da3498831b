"""Loading refuses a folder with inconsistent files and names the file, and runs none of the folder's code."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config

import gflowtrl
from gflowtrl import GFlowNetConfig, GFlowNetTrainer, ItemCatalog, Recommender
from gflowtrl.data import PromptFormat, TextPromptEncoder, add_item_tokens
from gflowtrl.policy import load_backbone
from gflowtrl.policy.loading import load_tokenizer
from gflowtrl.rewards import GroundTruthReward
from gflowtrl.teachers import Popularity
from tests.data.words import byte_tokenizer
from tests.tiny import tiny_model, tiny_seq2seq
from tests.trainer.world import ITEMS, SEMANTIC_IDS, TOKENIZER, make_catalog, make_rows


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    counts, titles = torch.arange(len(ITEMS)), {item: f"item {item}" for item in ITEMS}
    Recommender(
        tiny_model(len(TOKENIZER)), TOKENIZER, make_catalog(), item_counts=counts, titles=titles
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def change(file: Path, edit) -> None:
    """Edit the content of a JSON or safetensors file."""
    if file.suffix == ".json":
        content = json.loads(file.read_text())
        file.write_text(json.dumps(edit(content) or content))
    else:
        content = load_file(file)
        save_file(edit(content) or content, file, metadata={"format": "pt"})


def drop(content, key) -> None:
    content.pop(key)


def swap(mapping: dict, one: str, other: str) -> None:
    mapping[one], mapping[other] = mapping[other], mapping[one]


LAYER = "model.layers.1.mlp.up_proj.weight"
FAULTS = {
    "a tensor is missing": ("model.safetensors", lambda c: drop(c, LAYER), rf"lacks 1 tensors \('{LAYER}'\)"),
    "an unexpected tensor": (
        "model.safetensors",
        lambda c: c.update(strange=torch.ones(2)),
        "holds, but the model does not have, 1 tensors \\('strange'",
    ),
    "a tensor of another shape": (
        "model.safetensors",
        lambda c: c.update({LAYER: torch.ones(3, 4)}),
        rf"holds in another shape 1 tensors \('{LAYER}'\)",
    ),
    "fewer layers configured": ("config.json", lambda c: c.update(num_hidden_layers=1), "not have, 9 tensors"),
    "more layers configured": ("config.json", lambda c: c.update(num_hidden_layers=3), "lacks 9 tensors"),
    "another architecture": (
        "config.json",
        lambda c: {**GPT2Config(vocab_size=len(TOKENIZER), n_embd=32, n_layer=2, n_head=4).to_dict()},
        "are not those of GPT2LMHeadModel, which its config.json describes",
    ),
    "another architecture with the same tensors": (
        "config.json",
        lambda c: c.update(model_type="mistral"),
        r"was saved as LlamaForCausalLM, but its config.json describes MistralForCausalLM \(model_type 'mistral'\)",
    ),
    "swapped tokens": (
        "tokenizer.json",
        lambda c: swap(c["model"]["vocab"], "<a_0>", "<a_1>"),
        r"catalog\.json gives token '<a_0>' the token id 3, but the tokenizer gives it 4 \(2 of",
    ),
    "swapped numbers in the catalog": (
        "catalog.json",
        lambda c: swap(c["token_ids"], "<a_0>", "<c_1>"),
        r"catalog\.json gives token .* but the tokenizer gives",
    ),
    "a token of another tokenizer": (
        "catalog.json",
        lambda c: {
            **c,
            "semantic_ids": [["<new>" if t == "<a_2>" else t for t in ids] for ids in c["semantic_ids"]],
            "token_ids": {"<new>" if t == "<a_2>" else t: n for t, n in c["token_ids"].items()},
        },
        "gives token '<new>' the token id 5, but the tokenizer does not know it",
    ),
    "shared tokens": (
        "catalog.json",
        lambda c: c["token_ids"].update({"<a_0>": c["token_ids"]["<a_1>"]}),
        r"catalog\.json gives the tokens '<a_0>' and '<a_1>' the same token id",
    ),
    "a token out of range": (
        "catalog.json",
        lambda c: c["token_ids"].update({"<a_0>": 10**6}),
        r"catalog\.json gives token '<a_0>' the token id 1000000, but the tokenizer gives it 3",
    ),
    "a negative token": ("catalog.json", lambda c: c["token_ids"].update({"<a_0>": -1}), "of '<a_0>' is -1; it"),
    "a token without number": ("catalog.json", lambda c: drop(c["token_ids"], "<a_0>"), "no token id for '<a_0>'"),
    "a null item": ("catalog.json", lambda c: c["items"].__setitem__(3, None), r"catalog\.json: item 3 is None"),
    "a number that is not whole": ("catalog.json", lambda c: c["items"].__setitem__(3, 1.5), "item 3 is 1.5"),
    "an item twice": ("catalog.json", lambda c: c["items"].__setitem__(3, c["items"][0]), "lists item 'i001' 2 times"),
    "a null id": ("catalog.json", lambda c: c["semantic_ids"].__setitem__(3, None), "semantic id of item .* is None"),
    "a null token": ("catalog.json", lambda c: c["semantic_ids"][3].__setitem__(0, None), r"is \[None, "),
    "a missing id": ("catalog.json", lambda c: drop(c["semantic_ids"], -1), "has 24 items and 23 semantic ids"),
    "no token ids": ("catalog.json", lambda c: drop(c, "token_ids"), r"must hold items, semantic_ids and token_ids"),
    "null titles": ("item_details.json", lambda c: c["titles"].__setitem__(0, 3), "invalid value 3 in titles"),
    "a negative count": ("item_details.json", lambda c: c["counts"].__setitem__(0, -1), "value -1 in counts"),
    "a missing count": ("item_details.json", lambda c: drop(c["counts"], -1), "counts for 23 items, but the catalog"),
    "details of the wrong type": ("item_details.json", lambda c: [c], "must contain a JSON object"),
    "no history length": ("recommender_config.json", lambda c: drop(c, "max_history_items"), "lacks 'max_hist"),
    "a history length of 0": ("recommender_config.json", lambda c: c.update(max_history_items=0), "cannot be used: "),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_inconsistent_files_are_named(folder, fault):
    file, edit, message = FAULTS[fault]
    change(folder / file, edit)
    with pytest.raises(ValueError, match=message):
        Recommender.from_pretrained(folder)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "catalog.json",
        "tokenizer.json",
        "model.safetensors",
        "item_details.json",
        "recommender_config.json",
    ],
)
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000])
def test_damaged_files_are_named(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises((ValueError, OSError), match=name.replace(".", r"\.") + "|" + str(folder)):
        Recommender.from_pretrained(folder)


@pytest.mark.parametrize("name", ["item_details.json", "recommender_config.json"])
def test_an_optional_file_that_is_a_broken_link_is_an_error(folder, name):
    """As in a cache of the Hub that has lost files: without it, prompts would have another length or form."""
    (folder / name).unlink()
    Recommender.from_pretrained(folder)
    (folder / name).symlink_to(folder / "lost")
    with pytest.raises(OSError, match=name):
        Recommender.from_pretrained(folder)


def test_a_longest_input_that_is_not_a_number_is_named(folder):
    change(folder / "tokenizer_config.json", lambda c: c.update(model_max_length=[512]))
    with pytest.raises(
        ValueError, match=r"tokenizer_config\.json\) of .* cannot be loaded: model_max_length is \[512\]"
    ):
        Recommender.from_pretrained(folder)


def test_a_trainer_names_inconsistent_files_too(folder):
    change(folder / "tokenizer.json", FAULTS["swapped tokens"][1])
    with pytest.raises(ValueError, match="gives token '<a_0>' the token id 3, but the tokenizer gives it 4"):
        GFlowNetTrainer(str(folder), [GroundTruthReward()], GFlowNetConfig(str(folder), use_cpu=True), make_rows())


def test_a_model_with_fewer_tokens_than_its_catalog_is_refused(folder):
    small = tiny_model(8)
    small.save_pretrained(folder)
    with pytest.raises(ValueError, match="The catalog uses token 12, but the model embeds only 8 tokens"):
        Recommender.from_pretrained(folder)


def test_tied_and_intentionally_absent_tensors_are_not_missing(tmp_path):
    for kind in ("t5", "bart", "marian"):
        tiny_seq2seq(40, kind).save_pretrained(tmp_path / kind)
        load_backbone(tmp_path / kind)
    tied = tiny_model(40)
    tied.config.tie_word_embeddings = True
    tied.lm_head.weight = tied.model.embed_tokens.weight
    tied.save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    load_backbone(tmp_path / "tied")


def test_a_plain_model_may_have_extra_tensors_but_none_missing(tmp_path):
    """Published checkpoints often hold a few tensors that the class does not load."""
    tiny_model(40).save_pretrained(tmp_path)
    change(tmp_path / "model.safetensors", lambda c: c.update(extra=torch.ones(1)))
    load_backbone(tmp_path)
    change(tmp_path / "model.safetensors", lambda c: drop(c, "lm_head.weight"))
    with pytest.raises(ValueError, match="lacks 1 tensors .'lm_head.weight'.*load it by its own class"):
        load_backbone(tmp_path)


def test_a_teacher_that_lacks_items_is_named(folder):
    Popularity(ITEMS[:-1]).save_pretrained(folder / "teacher")
    with pytest.raises(ValueError, match="The teacher in .*teacher does not know 1 items of catalog.json"):
        Recommender.from_pretrained(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: {k: v for k, v in c.items() if "layers.1" not in k}, "The adapters of .* the file lacks 2 tensors"),
        (lambda c: {**c, "base_model.model.strange.weight": torch.ones(1)}, "does not have, 1 tensors"),
        (lambda c: {k: v[:1] if "lora_A" in k else v for k, v in c.items()}, "The adapters of .* cannot be loaded"),
    ],
)
def test_inconsistent_adapters_are_named(tmp_path, edit, message):
    tiny_model(40).save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(load_backbone(tmp_path / "base"), config).save_pretrained(tmp_path / "adapters")
    load_backbone(tmp_path / "adapters")
    change(tmp_path / "adapters" / "adapter_model.safetensors", edit)
    with pytest.raises(ValueError, match=message):
        load_backbone(tmp_path / "adapters")


def widen(content: dict) -> dict:
    return {"tokens": torch.nn.functional.pad(content["tokens"], (0, 1), value=9032)}


@pytest.fixture(scope="module")
def text_prompts(tmp_path_factory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("words"), byte_tokenizer()
    add_item_tokens(tokenizer, SEMANTIC_IDS)
    catalog = ItemCatalog.from_semantic_ids(SEMANTIC_IDS, tokenizer)
    encoder = TextPromptEncoder(catalog, tokenizer, {item: f"item {item}" for item in ITEMS}, PromptFormat(), 4)
    Recommender(tiny_model(len(tokenizer)), tokenizer, catalog, encoder=encoder).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        ("item_prompts.safetensors", None, "item_prompts.safetensors is missing"),
        ("item_prompts.safetensors", lambda c: {"tokens": c["tokens"][:-1]}, "shape .23, .* 24 items"),
        ("item_prompts.safetensors", lambda c: {"words": c["tokens"]}, "item_prompts.safetensors cannot be read"),
        ("item_prompts.safetensors", lambda c: {"tokens": c["tokens"].roll(1, 0)}, "does not contain the tokens"),
        ("item_prompts.safetensors", widen, "use token 9032"),
        ("recommender_config.json", lambda c: drop(c, "head"), "recommender_config.json lacks 'head'"),
        ("recommender_config.json", lambda c: c.update(tail=[None]), "tail must be a list of token ids"),
        ("recommender_config.json", lambda c: c.update(item="no place"), "cannot be used: item is 'no place'"),
        ("recommender_config.json", lambda c: c.update(prompt_format="verse"), "prompt_format is 'verse'"),
    ],
)  # fmt: skip
def test_inconsistent_prompts_are_named(text_prompts, tmp_path, file, edit, message):
    folder = Path(shutil.copytree(text_prompts, tmp_path / "model"))
    if edit is None:
        (folder / file).unlink()
    else:
        change(folder / file, edit)
    with pytest.raises(ValueError, match=message):
        Recommender.from_pretrained(folder)


# --------------------------------------------------------------------------------------------------- code in a folder
CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import {base} as Base
class Foreign(Base):
    model_type = "foreign"
"""
PLACES = {
    "config": ("config.json", {"model_type": "foreign", "auto_map": {"AutoConfig": "foreign.Foreign"}}, "LlamaConfig"),
    "model": (
        "config.json",
        {"model_type": "foreign", "auto_map": {n: "foreign.Foreign" for n in ("AutoConfig", "AutoModelForCausalLM")}},
        "LlamaConfig",
    ),
    "tokenizer": (
        "tokenizer_config.json",
        {"tokenizer_class": "Foreign", "auto_map": {"AutoTokenizer": [None, "foreign.Foreign"]}},
        "PreTrainedTokenizerFast",
    ),
}


@pytest.fixture(params=PLACES)
def with_code(request, folder, tmp_path) -> tuple[Path, Path]:
    """A recommender's folder with Python code, and the file that this code creates when it runs."""
    file, entries, base = PLACES[request.param]
    marker = tmp_path / "was_run"
    (folder / "foreign.py").write_text(CODE.format(marker=str(marker), base=base))
    change(folder / file, lambda content: content.update(entries))
    return folder, marker


def command(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "gflowtrl", *words], input="y\n" * 9, text=True, capture_output=True)


def test_code_in_a_folder_does_not_run_and_the_user_is_not_asked(with_code, monkeypatch, tmp_path):
    folder, marker = with_code
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    loads = [
        lambda: Recommender.from_pretrained(folder),
        lambda: GFlowNetTrainer(
            str(folder), [GroundTruthReward()], GFlowNetConfig(str(tmp_path), use_cpu=True), make_rows()
        ),
        lambda: (load_tokenizer(folder), load_backbone(folder)),
    ]
    for load in loads:
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            load()
    assert not marker.exists()


def test_code_runs_if_the_user_trusts_it(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    file, entries, base = PLACES["tokenizer"]
    (folder / "foreign.py").write_text(CODE.format(marker=str(tmp_path / "was_run"), base=base))
    change(folder / file, lambda content: content.update(entries))
    tokenizer = load_tokenizer(folder, trust_remote_code=True)
    assert type(tokenizer).__name__ == "Foreign" and (tmp_path / "was_run").exists()


def test_models_are_loaded_in_one_file_only():
    """A loader of transformers used elsewhere might ask at the terminal, or initialize missing tensors randomly."""
    loader = re.compile(r"\b(Auto\w+|PeftModel|PreTrained\w+|\w*loader)\.from_pretrained\(")
    package = Path(gflowtrl.__file__).parent
    files = {path.name for path in package.rglob("*.py") if loader.search(re.sub(r"`[^`]*`", "", path.read_text()))}
    assert files == {"loading.py"}


@pytest.mark.parametrize("with_code", ["model"], indirect=True)
@pytest.mark.parametrize("name", ["recommend", "serve", "evaluate", "train"])
def test_commands_run_no_code_even_if_the_user_answers_yes(with_code, tmp_path, name):
    folder, marker = with_code
    data = tmp_path / "data"
    data.mkdir()
    (data / "semantic_ids.json").write_text(json.dumps(SEMANTIC_IDS))
    (data / "sequences.jsonl").write_text(
        "\n".join(json.dumps({"user": u, "items": ITEMS[u : u + 4]}) for u in range(9))
    )
    (data / "items.jsonl").write_text("\n".join(json.dumps({"item": item}) for item in ITEMS))
    (data / "dataset.json").write_text(json.dumps({"name": "shop"}))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"data_dir": str(data), "model": {"model_name_or_path": str(folder)}}))
    words = {
        "recommend": ["--model", str(folder)],
        "serve": ["--model", str(folder), "--port", "0"],
        "evaluate": ["--model", str(folder), "--data_dir", str(data)],
        "train": ["--config", str(recipe)],
    }[name]
    ran = command(name, *words)
    assert ran.returncode == 2, ran.stderr
    assert not marker.exists()
    assert "error: " in ran.stderr and "trust_remote_code" in ran.stderr and "Traceback" not in ran.stderr
