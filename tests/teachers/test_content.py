"""ContentSASRec: vectors of known and new items, saving, options, and a new item that is recommended by its text."""

import pytest
import torch

from gflowtrl.finite import NonFiniteError
from gflowtrl.teachers import ContentSASRec, SASRec, load_teacher, top_items


ITEMS = [f"{color}{number}" for color in ("red", "blue") for number in range(6)]
NEW = ("red5", "blue5")  # in no sequence
#: Content: the color, and the number in one of twelve directions.
VECTORS = torch.cat([torch.eye(2).repeat_interleave(6, 0), 0.3 * torch.eye(12)], 1)
OPTIONS = {"width": 16, "epochs": 30, "learning_rate": 1e-2, "batch_size": 32, "dropout": 0.0, "progress": False}


def sequences(count: int = 80) -> list[list[str]]:
    """Each user takes items of one color, in random order."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for user in range(count):
        color = "red" if user % 2 else "blue"
        found.append([f"{color}{number}" for number in torch.randperm(5, generator=generator).tolist()])
    return found


@pytest.fixture(scope="module")
def fitted() -> ContentSASRec:
    return ContentSASRec.fit(sequences(), ITEMS, vectors=VECTORS, **OPTIONS)


def test_a_new_item_is_scored_by_its_content(fitted):
    assert fitted.known.tolist() == [item not in NEW for item in ITEMS]
    probs = fitted.score([["red0", "red1"], ["blue0", "blue1"]]).softmax(1)
    red5, blue5 = (ITEMS.index(item) for item in NEW)
    assert probs[0, red5] > 5 * probs[0, blue5] and probs[1, blue5] > 5 * probs[1, red5]
    # The same model without content can only guess.
    plain = SASRec.fit(sequences(), ITEMS, **OPTIONS).score([["red0", "red1"]]).softmax(1)
    assert plain[0, red5] < probs[0, red5] / 3
    top = [ITEMS[i] for i in top_items(fitted, [["red0", "red1", "red2", "red3"]], 3)[0].tolist()]
    assert all(item.startswith("red") for item in top)


def test_vectors_are_projections_and_those_of_known_items_have_an_embedding(fitted):
    projected = fitted.projection(torch.nn.functional.normalize(VECTORS, dim=1))
    vectors = fitted.eval().item_vectors()
    difference = vectors - projected
    assert torch.equal(vectors[~fitted.known], projected[~fitted.known])
    torch.testing.assert_close(difference[fitted.known], fitted.item_embedding.weight[fitted.known], atol=1e-6, rtol=0)


def test_embeddings_are_left_out_with_the_given_probability():
    teacher = ContentSASRec([str(i) for i in range(2000)], 3, embedding_dropout=0.3, width=4)
    teacher.train()
    left_out = ((teacher.item_vectors() - teacher.projection(teacher.vectors)).abs().sum(1) < 1e-9).float().mean()
    assert left_out.item() == pytest.approx(0.3, abs=0.04)
    always = ContentSASRec([str(i) for i in range(50)], 3, embedding_dropout=0.0, width=4).train()
    assert torch.equal(always.item_vectors(), always.eval().item_vectors())


def test_saving_keeps_the_scores(fitted, tmp_path):
    fitted.save_pretrained(tmp_path)
    loaded = load_teacher(tmp_path)
    assert isinstance(loaded, ContentSASRec) and loaded.config == fitted.config
    assert torch.equal(loaded.score([["red0"]]), fitted.score([["red0"]]))


def test_averages_and_sampled_items_work_too():
    options = OPTIONS | {"epochs": 3, "average": 2, "negatives": 8, "embedding_dropout": 0.2}
    teacher = ContentSASRec.fit(sequences(20), ITEMS, vectors=VECTORS, **options)
    assert teacher.known.sum() == 10 and teacher.score([["red0"]]).isfinite().all()


def test_options_of_recipes():
    names = ContentSASRec.option_names()
    assert {"embedding_dropout", "embedder", "negatives", "width", "epochs"} <= names
    assert not {"vectors", "dim", "items", "config", "options"} & names
    context = {"train_sequences": sequences(8), "items": ITEMS, "embed": lambda name: VECTORS, "progress": False,
               "max_history_items": 7}  # fmt: skip
    teacher = ContentSASRec.from_spec({"embedder": "tfidf", "epochs": 1, "width": 8}, context)
    assert teacher.max_history_items == 7 and not teacher.full_history
    own = ContentSASRec.from_spec({"max_history_items": 3, "epochs": 1, "width": 8}, context)
    assert own.max_history_items == 3 and own.full_history
    for options, message in (
        ({"vectors": VECTORS[:3]}, "vectors has shape .3, 14., but there are 12 items"),
        ({"vectors": VECTORS, "embedding_dropout": 1.0}, "embedding_dropout is 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            ContentSASRec.fit(sequences(2), ITEMS, epochs=1, progress=False, **options)
    with pytest.raises(NonFiniteError, match="ContentSASRec"):
        ContentSASRec.fit(sequences(2), ITEMS, vectors=VECTORS / 0, progress=False)
