"""The logits processor for vLLM, driven by fake batch updates, and its beam search and sampling on a fake engine."""

import json
import random
import subprocess
import sys
from enum import Enum, auto
from types import ModuleType, SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from gflowtrl import ItemCatalog, Recommender
from gflowtrl.data import PromptEncoder, PromptFormat, TextPromptEncoder, add_item_tokens
from gflowtrl.export import export, vllm_files
from gflowtrl.export.standalone.gflowtrl_tree import Catalog, RowNodes, read_histories
from gflowtrl.policy import attach_flow_heads
from tests.data.words import byte_tokenizer
from tests.export.shop import HISTORIES, assert_same_lists, make_recommender, make_windowed
from tests.tiny import tiny_seq2seq
from tests.trainer.world import TOKENIZER, make_catalog


@pytest.fixture(scope="module")
def recommender() -> Recommender:
    return make_recommender()


@pytest.fixture(scope="module")
def folder(recommender, tmp_path_factory):
    root = tmp_path_factory.mktemp("vllm")
    recommender.save_pretrained(root / "model")
    return export(root / "model", "vllm", root / "export")


@pytest.fixture(scope="module")
def catalog(folder) -> Catalog:
    return Catalog(folder / "catalog")


def paths_of(tree) -> list[tuple[list[int], list[int]]]:
    """Return the tokens and the nodes of every leaf, root first."""
    pairs = zip(tree.paths.tolist(), tree.path_nodes.tolist(), strict=True)
    return [([t for t in path if t >= 0], [n for n in nodes if n >= 0]) for path, nodes in pairs]


def expected_log_probs(recommender: Recommender, logits: torch.Tensor, nodes: list[int], end: int) -> torch.Tensor:
    """Return log-probabilities `(R, V)` over the children, from a mask of allowed tokens; `end` for leaves and -1."""
    tree = recommender.catalog.tree
    allowed = tree.allowed_tokens(torch.tensor(nodes), logits.shape[1])
    closed = ~allowed.any(1)
    allowed[closed, end] = True
    return (logits / recommender.policy.temperature).masked_fill(~allowed, -torch.inf).log_softmax(-1)


def test_every_node_allows_its_children_with_their_probabilities(recommender, catalog):
    tree, vocabulary = recommender.catalog.tree, len(TOKENIZER) + 5  # engines pad the vocabulary
    nodes = [*range(tree.num_nodes), -1]
    random.Random(0).shuffle(nodes)
    logits = torch.randn(2 * len(nodes), vocabulary, generator=torch.Generator().manual_seed(0))
    rows = list(range(1, 2 * len(nodes), 2))
    expected = expected_log_probs(recommender, logits[rows], nodes, catalog.end_token)
    changed = logits.clone()
    catalog.restrict(changed, rows, nodes)
    torch.testing.assert_close(changed[rows].log_softmax(-1), expected, rtol=0, atol=1e-6)
    assert torch.equal(changed[::2], logits[::2])


def test_the_end_of_a_prompt_tells_the_node(recommender, catalog):
    """Whatever the history is, and how many tokens of a beam follow it. A complete id is one more item."""
    for history in HISTORIES:
        prompt = recommender.encoder([history])["input_ids"][0].tolist()
        assert catalog.prompt_of(history) == prompt and catalog.node_after(prompt) == 0
        for path, nodes in paths_of(recommender.catalog.tree):
            for length in range(len(path)):
                assert catalog.node_after([*prompt, *path[:length]]) == nodes[length]
            assert catalog.node_after([*prompt, *path]) == 0
            assert catalog.node_after([*prompt, path[0], path[0]]) == -1


@pytest.mark.parametrize(
    "words", ["{semantic_id} {title}\n", "{title}: {semantic_id}", "{semantic_id}", "{semantic_id} {title}"]
)
def test_prompts_with_words(words, tmp_path):
    ids = {1: ("<a>", "<b>", "<c>"), 2: ("<d>",), 3: ("<a>", "<e>")}
    tokenizer = byte_tokenizer()
    add_item_tokens(tokenizer, ids)
    items = ItemCatalog.from_semantic_ids(ids, tokenizer)
    titles = {1: "A <a> b", 2: "<d> <a>", 3: "Pad <a> <b>"}
    encoder = TextPromptEncoder(items, tokenizer, titles, PromptFormat("Had: {history}", words))
    if words == "{semantic_id} {title}":
        with pytest.raises(ValueError, match="Item 2 ends in a prompt with tokens of an unfinished semantic id"):
            vllm_files.check_prompts(encoder)
        return
    vllm_files.check_prompts(encoder)
    model = SimpleNamespace(
        encoder=encoder, catalog=items, policy=SimpleNamespace(temperature=1.0), tokenizer=tokenizer
    )
    vllm_files.arrays.write(model, tmp_path)
    catalog = Catalog(tmp_path)
    for history in ([1], [2, 3], [3, 2, 1]):
        prompt = encoder([history])["input_ids"][0].tolist()
        assert catalog.prompt_of(history) == prompt
        for path, nodes in paths_of(items.tree):
            assert [catalog.node_after([*prompt, *path[:n]]) for n in range(len(path))] == nodes[: len(path)]


def test_a_template_that_ends_within_an_id_is_refused():
    ids = {1: ("<a>", "<b>")}
    tokenizer = byte_tokenizer()
    add_item_tokens(tokenizer, ids)
    items = ItemCatalog.from_semantic_ids(ids, tokenizer)
    with pytest.raises(ValueError, match="text before or after the history ends with tokens of a semantic id"):
        vllm_files.check_prompts(
            TextPromptEncoder(items, tokenizer, {}, PromptFormat("{history}<a>", "{semantic_id}"))
        )
    vllm_files.check_prompts(PromptEncoder(items, tokenizer))


def test_a_retired_id_that_begins_another_one_is_refused():
    ids = {1: ("<a>", "<b>"), 2: ("<a>",)}
    tokenizer = byte_tokenizer()
    add_item_tokens(tokenizer, ids)
    items = ItemCatalog.from_semantic_ids(ids, tokenizer, retired=[2])
    with pytest.raises(ValueError, match="could not read histories with retired items. Token path .* is a prefix of"):
        vllm_files.check_prompts(PromptEncoder(items, tokenizer))


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_followed_through_every_change_of_the_batch(recommender, catalog, seed):
    """Requests come, go, move and swap; tokens arrive late. Each row has the node of its own request's tokens."""
    chance, paths = random.Random(seed), paths_of(recommender.catalog.tree)
    rows, requests = RowNodes(catalog), {}
    for _ in range(60):
        for row in [row for row in requests if chance.random() < 0.15]:
            rows.remove(row)
            del requests[row]
        for row in range(8):
            if row not in requests and chance.random() < 0.3:
                path, nodes = chance.choice(paths)
                start = chance.randrange(len(path))  # tokens of a beam at the end of the prompt
                begun = chance.randrange(start, len(path))  # a request that was interrupted has some output
                prompt = recommender.encoder([chance.choice(HISTORIES)])["input_ids"][0].tolist()
                requests[row] = {"path": path, "nodes": [*nodes, -1, -1], "at": begun, "output": path[start:begun]}
                rows.add(row, prompt + path[:start], requests[row]["output"])
        for _ in range(2):
            source, target, swap = chance.randrange(8), chance.randrange(8), chance.random() < 0.5
            if source != target and source in requests and (swap or target not in requests):
                moved, other = requests.pop(source), requests.pop(target, None)
                requests[target] = moved
                if other is not None:
                    requests[source] = other
                rows.move(source, target, swap)
        logits = torch.randn(8, len(TOKENIZER), generator=torch.Generator().manual_seed(seed))
        changed = rows.apply(logits.clone())
        used = sorted(requests)
        nodes = [requests[row]["nodes"][requests[row]["at"]] for row in used]
        if used:
            wanted = expected_log_probs(recommender, logits[used], nodes, catalog.end_token)
            torch.testing.assert_close(changed[used].log_softmax(-1), wanted, rtol=0, atol=1e-6)
        free = [row for row in range(8) if row not in requests]
        assert torch.equal(changed[free], logits[free])
        for request in requests.values():  # the token of this step is a placeholder until the next one
            if request["output"][-1:] == [-1]:
                request["output"].pop()
            position = request["at"]
            request["output"].append(
                request["path"][position] if position < len(request["path"]) else catalog.end_token
            )
            request["at"] = min(position + 1, len(request["nodes"]) - 1)
            if chance.random() < 0.3:
                request["output"].append(-1)


class Direction(Enum):
    UNIDIRECTIONAL = auto()
    SWAP = auto()


@pytest.fixture
def processor_module(monkeypatch, folder):
    """Import the exported file with stand-ins for the names of vLLM."""
    names = {
        "vllm": ["LLM"],
        "vllm.config": ["VllmConfig"],
        "vllm.v1.sample.logits_processor": ["BatchUpdate", "LogitsProcessor"],
    }
    for name, classes in names.items():
        module = ModuleType(name)
        for one in classes:
            setattr(module, one, type(one, (), {}))
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["vllm.v1.sample.logits_processor"].MoveDirectionality = Direction
    sys.modules["vllm"].SamplingParams = SimpleNamespace
    platforms = ModuleType("vllm.platforms")
    platforms.current_platform = SimpleNamespace(is_cpu=lambda: True)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    beams = ModuleType("vllm.sampling_params")
    beams.BeamSearchParams = lambda width, tokens, **options: SimpleNamespace(width=width, tokens=tokens, **options)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", beams)
    monkeypatch.syspath_prepend(str(folder))
    yield __import__("gflowtrl_vllm")
    for name in ("gflowtrl_vllm", "gflowtrl_tree"):
        del sys.modules[name]


class FakeEngine:
    """vLLM's way of sampling and beam search, with the model's plain forward and the exported logits processor."""

    def __init__(self, module, recommender: Recommender, folder):
        config = SimpleNamespace(model_config=SimpleNamespace(model=str(folder)))
        self.model_config = SimpleNamespace(max_logprobs=80, get_vocab_size=lambda: 1000)
        self.model, self.processor = recommender.model, module.TreeLogitsProcessor(config, torch.device("cpu"), False)

    @torch.no_grad()
    def log_probs(self, sequences: list[list[int]]) -> torch.Tensor:
        logits = torch.stack([self.model(input_ids=torch.tensor([tokens])).logits[0, -1] for tokens in sequences])
        return self.processor.apply(logits).log_softmax(-1)

    def beam_search(self, prompts: list[dict], params: SimpleNamespace) -> list[SimpleNamespace]:
        """Each step sends prompt and beam as new prompts, and keeps the best of twice as many tokens as beams."""
        assert params.ignore_eos and params.length_penalty == 0.0
        outputs = []
        for prompt in prompts:
            beams = [SimpleNamespace(tokens=prompt["prompt_token_ids"], cum_logprob=0.0)]
            for _ in range(params.tokens):
                added = [(row, None, beam.tokens, []) for row, beam in enumerate(beams)]
                self.processor.update_state(SimpleNamespace(removed=[], added=added, moved=[]))
                log_probs = self.log_probs([beam.tokens for beam in beams])
                top = log_probs.topk(min(2 * params.width, log_probs.shape[1]))
                beams = [
                    SimpleNamespace(tokens=[*beam.tokens, token], cum_logprob=beam.cum_logprob + value)
                    for beam, values, tokens in zip(beams, top.values.tolist(), top.indices.tolist(), strict=True)
                    for value, token in zip(values, tokens, strict=True)
                ]
                beams = sorted(beams, key=lambda beam: -beam.cum_logprob)[: params.width]
            outputs.append(SimpleNamespace(sequences=beams))
        return outputs

    def generate(self, prompts: list[dict], params: SimpleNamespace, use_tqdm: bool) -> list[SimpleNamespace]:
        """All draws run at once, from the last row to the first; those that end are removed and others take their
        rows."""
        assert params.logprobs == 0 and params.temperature == 1.0
        draws = [prompt["prompt_token_ids"] for prompt in prompts for _ in range(params.n)]
        outputs, values = [[] for _ in draws], [[] for _ in draws]
        added = [(row, None, draw, outputs[row]) for row, draw in enumerate(draws)]
        self.processor.update_state(SimpleNamespace(removed=[], added=added, moved=[]))
        running, generator = list(range(len(draws))), torch.Generator().manual_seed(params.seed)
        for _ in range(params.max_tokens):
            log_probs = self.log_probs([draws[one] + outputs[one] for one in running])
            tokens = log_probs.exp().multinomial(1, generator=generator).squeeze(1).tolist()
            for one, token, row in zip(running, tokens, log_probs, strict=True):
                outputs[one].append(token)
                values[one].append({token: SimpleNamespace(logprob=float(row[token]))})
            self.processor.update_state(None)
            ended = [row for row, one in enumerate(running) if outputs[one][-1] in params.stop_token_ids]
            moved = []
            for row in sorted(ended):  # as vLLM: the last running requests fill the holes
                while len(running) - 1 in ended and len(running) - 1 > row:
                    running.pop()
                if row < len(running) - 1:
                    moved.append((len(running) - 1, row, Direction.UNIDIRECTIONAL))
                    running[row] = running[-1]
                if row < len(running):
                    running.pop()
            self.processor.update_state(SimpleNamespace(removed=ended, added=[], moved=moved))
        done = [SimpleNamespace(token_ids=ids, logprobs=steps) for ids, steps in zip(outputs, values, strict=True)]
        return [SimpleNamespace(outputs=done[i : i + params.n]) for i in range(0, len(done), params.n)]


def test_the_beam_search_of_vllm_finds_the_lists_of_the_recommender(processor_module, tmp_path):
    recommender = make_windowed("qwen3")
    vllm_files.write(recommender, tmp_path)
    engine, catalog = FakeEngine(processor_module, recommender, tmp_path), Catalog(tmp_path / "catalog")
    histories = [[1, 2, 3], [4, 26]]
    expected = recommender.recommend(histories, k=20, num_beams=25)
    found = processor_module.recommend(engine, catalog, histories, k=20, num_beams=25)
    assert_same_lists(expected, found)
    everything = processor_module.recommend(engine, catalog, histories, k=40)  # more beams than leaves
    assert [len(rows) for rows in everything] == [27, 27]
    assert processor_module.recommend(engine, catalog, []) == []
    with pytest.raises(ValueError, match=r"41 beams need an engine with max_logprobs=82.*this one allows 40 beams"):
        processor_module.recommend(engine, catalog, histories, k=41)
    with pytest.raises(ValueError, match="k is 0; it must be at least 1"):
        processor_module.recommend(engine, catalog, histories, k=0)
    with pytest.raises(ValueError, match="num_beams is -1, less than k; it must be at least 5"):
        processor_module.recommend(engine, catalog, histories, k=5, num_beams=-1)
    engine.model_config.get_vocab_size = lambda: 39
    with pytest.raises(ValueError, match=r"20 beams need .* 40 tokens.* num_beams .* of at most 19"):
        processor_module.recommend(engine, catalog, histories)
    engine.model_config.get_vocab_size = lambda: 1000
    with pytest.raises(ValueError, match="1 is not a history; give a list of items"):
        processor_module.recommend(engine, catalog, [1, 2, 3])


def test_lines_are_checked_before_the_engine_starts(catalog, capsys):
    known, other = catalog.items[:2]
    lines = [json.dumps([known, other]), "", json.dumps([known, "nonsense"])]
    assert read_histories(lines, catalog) == [[known, other], [known, "nonsense"]]
    assert capsys.readouterr().err == "line 3: left out, because the catalog does not have them: ['nonsense']\n"
    for wrong, message in (
        ("[]", "The history [] has no item"),
        ("1 2", "Extra data"),
        ('"1"', "is not a history"),
        ("null", "is not a history"),
        ("[[1]]", "[1] is not an item"),
        ('[{"a": 1}]', "is not an item"),
        ("[true]", "True is not an item"),
        ("[" * 100_000, "recursion"),
    ):
        with pytest.raises(SystemExit) as stop:
            read_histories([lines[0], wrong], catalog)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("error: line 2: ") and message in error


@pytest.mark.parametrize(("options", "message"), [
    (["--k", "0"], "--k must be at least 1"),
    (["--k", "5", "--num_beams", "4"], "--num_beams at least as large"),
    (["--options", "[1]"], "--options must be a JSON object"),
    ([], "which these are not; use --sample"),
])  # fmt: skip
def test_options_of_the_example_are_checked_before_the_engine_starts(folder, options, message):
    """Without vLLM here, its import would be another error."""
    command = [sys.executable, folder / "example.py", *options]
    ran = subprocess.run(command, input='["i010"]', capture_output=True, text=True)
    assert (
        ran.returncode == 2 and ran.stderr.splitlines()[-1].startswith("example.py: error: ") and message in ran.stderr
    )


def test_the_example_starts_no_engine_without_a_history(folder):
    subprocess.run([sys.executable, folder / "example.py", "--sample"], input="\n", text=True, check=True)


def test_only_the_processor_needs_torch(folder):
    """A client of the server has the catalog alone."""
    program = "import sys; sys.modules['torch'] = None; from gflowtrl_tree import Catalog; Catalog('catalog')"
    subprocess.run([sys.executable, "-c", program], cwd=folder, check=True)


def test_beam_search_needs_ids_of_one_length(processor_module, recommender, folder, catalog):
    engine = FakeEngine(processor_module, recommender, folder)
    with pytest.raises(ValueError, match=r"The semantic ids have several lengths.*Use sample\(...\)\."):
        processor_module.recommend(engine, catalog, HISTORIES)


def test_samples_are_items_with_the_log_probability_of_the_policy(processor_module, recommender, folder, catalog):
    engine = FakeEngine(processor_module, recommender, folder)
    lists = processor_module.sample(engine, catalog, HISTORIES, count=40, seed=1)
    log_probs = recommender.policy.leaf_log_probs(recommender.prompts(HISTORIES))
    lengths = set()
    for row, draws in zip(log_probs, lists, strict=True):
        assert len(draws) == 40 and len({items[0] for items, _ in draws}) > 3
        for items, value in draws:
            leaf = int(recommender.catalog.leaf_of(items[:1]))
            assert items == recommender.catalog.items_of(leaf) and abs(float(row[leaf]) - value) < 1e-4
            lengths.add(int(recommender.catalog.tree.leaf_lengths[leaf]))
    assert lengths == {2, 3}  # shorter ids end with the end token


def test_the_folder_is_a_plain_model(recommender, folder):
    """vLLM reads all .safetensors files at the top, so flow heads and tables must not be there."""
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    prompts = recommender.prompts(HISTORIES)
    with torch.no_grad():
        assert torch.equal(loaded(**prompts).logits, recommender.model(**prompts).logits)


def test_flow_heads_stay_behind(tmp_path):
    recommender = make_recommender()
    attach_flow_heads(recommender.model)
    recommender.save_pretrained(tmp_path / "model")
    folder = export(tmp_path / "model", "vllm", tmp_path / "export")
    _, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())


def test_encoder_decoders_are_refused(tmp_path):
    recommender = Recommender(tiny_seq2seq(len(TOKENIZER), "bart"), TOKENIZER, make_catalog(), max_history_items=5)
    with pytest.raises(ValueError, match="is an encoder-decoder, which vLLM does not run"):
        vllm_files.write(recommender, tmp_path)


def test_adapters_are_refused(tmp_path):
    recommender = make_recommender()
    recommender.model = get_peft_model(recommender.model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="has adapters that are not merged"):
        vllm_files.write(recommender, tmp_path)
    assert not list(tmp_path.iterdir())
