"""SASRec with cross entropy over the full or a sampled softmax."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from gflowtrl.catalog import Item
from gflowtrl.checks import COUNT, NOT_NEGATIVE, POSITIVE, SEED, SHARE_BELOW_ONE, check_type
from gflowtrl.data.windows import Windows
from gflowtrl.finite import NonFiniteError

from .teacher import History, TeacherModule


class Block(nn.Module):
    """A causal transformer layer with pre-normalization."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.attention_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention_in, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        heads = self.attention_in(self.attention_norm(hidden)).view(batch, length, 3, self.heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.dropout(self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width)))
        return hidden + self.dropout(self.feed(self.feed_norm(hidden)))


class SASRec(TeacherModule):
    """Self-attentive sequential recommendation (Kang and McAuley, ICDM 2018), trained with a softmax.

    The model has item embeddings (tied to the output layer), learned positions and a causal transformer. The loss is
    cross entropy over *all* items at every position, or in large catalogs over the target and many sampled items; with
    one negative per target, as in the original, the model is much weaker. Use `fit` to train a model.

    Args:
        items: the catalog, in the order of the score columns.
        max_history_items: longest history that is read. Longer histories are truncated to their last items.
        width, layers, heads, dropout: shape of the transformer. The width must be divisible by the number of heads.
        full_history: read the row's own history in training (`teacher_scores`), not only the items of the prompt. A
            recipe that sets `max_history_items` sets this too.

    Raises:
        ValueError: an option is out of bounds.
    """

    bounds = {
        "max_history_items": COUNT, "width": COUNT, "layers": COUNT, "heads": COUNT, "dropout": SHARE_BELOW_ONE,
        "epochs": COUNT, "patience": COUNT, "batch_size": COUNT, "learning_rate": POSITIVE, "seed": SEED,
        "weight_decay": NOT_NEGATIVE, "average": COUNT, "negatives": COUNT,
    }  # fmt: skip

    def __init__(
        self,
        items: Sequence[Item],
        max_history_items: int = 20,
        width: int = 64,
        layers: int = 2,
        heads: int = 2,
        dropout: float = 0.4,
        full_history: bool = False,
    ) -> None:
        config = dict(max_history_items=max_history_items, width=width, layers=layers, heads=heads, dropout=dropout)
        self.check_options(**config)
        super().__init__(items, **config, full_history=full_history)
        self.max_history_items, self.full_history = max_history_items, full_history
        self.item_embedding = nn.Embedding(len(self.items), width)
        self.position_embedding = nn.Embedding(max_history_items, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for embedding in (self.item_embedding, self.position_embedding):
            nn.init.normal_(embedding.weight, std=0.02)

    @classmethod
    def check_options(cls, **options: Any) -> None:
        # Only negatives may be None.
        super().check_options(
            **{name: value for name, value in options.items() if (name, value) != ("negatives", None)}
        )
        width, heads = options.get("width", 64), options.get("heads", 2)
        if width % heads:
            raise ValueError(f"width is {width}; it must be divisible by the number of heads, which is {heads}.")

    def item_vectors(self) -> Tensor:
        """Return the vector of each item, `(items, width)`, which input and output layer share."""
        return self.item_embedding.weight

    def forward(self, indices: Tensor, vectors: Tensor) -> Tensor:
        """Return the hidden states `(B, T, width)` of item indices `(B, T)`. State t depends on the items up to t."""
        # The vectors are scaled up at the input, because they are also the (small) weights of the output layer. This
        # improves speed and quality of the training.
        items = F.embedding(indices, vectors) * vectors.shape[1] ** 0.5
        positions = self.position_embedding.weight[: indices.shape[1]]
        return self.norm(self.blocks(self.dropout(items + positions)))

    @torch.no_grad()
    def score(self, histories: Sequence[History]) -> Tensor:
        """Return the next-item logits `(B, len(items))`. An empty history is an error."""
        rows = [row[-self.max_history_items :] for row in self.encode(histories)]
        if empty := [row for row, history in enumerate(rows) if not history]:
            raise ValueError(f"History {empty[0]} is empty; SASRec needs at least one item to start from.")
        return self._score_at(rows, torch.arange(len(rows)), torch.tensor([len(row) for row in rows]) - 1)

    @torch.no_grad()
    def score_windows(self, windows: Windows) -> Tensor:
        if int(windows.seen.max()) > self.max_history_items:
            return self.score(windows.histories)  # a truncated history does not start at the beginning of its window
        return self._score_at(self.encode(windows.prompts), windows.trunk, windows.seen - 1)

    def _score_at(self, rows: Sequence[Sequence[int]], row: Tensor, position: Tensor) -> Tensor:
        """Return the logits at some positions of some rows: `(n,)`, `(n,)` -> `(n, len(items))`."""
        # The padding is on the right, where it does not affect a causal model.
        padded = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(self.device)
        vectors = self.eval().item_vectors()
        return self(padded, vectors)[row, position] @ vectors.T

    @classmethod
    def fit(
        cls,
        train_sequences: Iterable[History],
        items: Sequence[Item],
        validation: Iterable[Mapping[str, Any]] | None = None,
        *,
        epochs: int = 60,
        patience: int = 8,
        batch_size: int = 512,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        average: int = 1,
        negatives: int | None = None,
        seed: int = 42,
        start: "SASRec | None" = None,
        device: str | torch.device = "cpu",
        progress: bool = True,
        **config: Any,
    ) -> "SASRec":
        """Train a model on the sequences and keep the epochs with the best NDCG@10 on `validation`.

        Args:
            train_sequences: one chronological list of items per user.
            items: the whole catalog.
            validation: rows with `"history"` and `"target"`. Without them, the last of all epochs is kept.
            patience: number of epochs without a better validation NDCG@10 after which the training stops.
            batch_size: targets per step.
            weight_decay: decoupled weight decay (AdamW).
            average: number of the best epochs whose weights are averaged (Izmailov et al., UAI 2018); without
                `validation`, of the last epochs.
            negatives: items per step that stand for the whole catalog in the softmax (`_loss`), the same for all
                targets of the step; None: the full softmax. The time per step then depends little on the number of
                items.
            seed: seed of initialization, order and dropout. The global random state does not change.
            start: a fitted model of the same shape with which the training begins. Items that it does not know begin
                at random.
            **config: `max_history_items`, `width`, `layers`, `heads`, `dropout`, `full_history`.

        Raises:
            ValueError: an option is out of bounds, or `start` has another shape.
            NonFiniteError: the training diverged.
        """
        cls.check_options(
            epochs=epochs, patience=patience, batch_size=batch_size, learning_rate=learning_rate, seed=seed,
            weight_decay=weight_decay, average=average, negatives=negatives,
        )  # fmt: skip
        check_type("start", start, SASRec, "a fitted SASRec", optional=True)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            teacher = cls._new(items, sequences := list(train_sequences), **config).to(device)
            if start is not None:
                teacher._begin_with(start)
            windows, rows = teacher._windows(sequences), teacher.validation_rows(validation)
            optimizer = torch.optim.AdamW(teacher.parameters(), lr=learning_rate, weight_decay=weight_decay)
            bar = tqdm(range(epochs), desc="SASRec", unit="epoch", disable=not progress)
            train_epoch = partial(teacher._train_epoch, windows, optimizer, batch_size, negatives)
            teacher._load_mean(teacher._best_epochs(bar, train_epoch, rows, patience, average))
        return teacher.eval()

    def _best_epochs(
        self,
        bar: tqdm,
        train_epoch: Callable[[], float],
        rows: Sequence[Mapping[str, Any]],
        patience: int,
        average: int,
    ) -> list[dict[str, Tensor]]:
        """Train until validation does not improve, and return the parameters of the best epochs."""
        kept: list[tuple[float, dict[str, Tensor]]] = []  # best first
        best, stale = -1.0, 0
        for epoch in bar:
            loss = train_epoch()
            value = self._ndcg(rows) if rows else float(epoch)
            state = {name: tensor.clone() for name, tensor in self.state_dict().items()}
            kept = sorted([*kept, (value, state)], key=lambda entry: -entry[0])[:average]
            if not rows:
                bar.set_postfix(loss=f"{loss:.3f}")
                continue
            best, stale = (value, 0) if value > best else (best, stale + 1)
            bar.set_postfix(loss=f"{loss:.3f}", validation_ndcg=f"{value:.4f}", best=f"{best:.4f}")
            if stale >= patience:
                break
        return [state for _, state in kept]

    @torch.no_grad()
    def _begin_with(self, start: "SASRec") -> None:
        """Copy the parameters of another model, with the vectors of the items that both know."""
        if start.config != self.config:
            raise ValueError(f"start has the options {start.config}, but the model has {self.config}. Give the same.")
        column = {item: index for index, item in enumerate(start.items)}
        rows = [row for row, item in enumerate(self.items) if item in column]
        vectors = self.item_embedding.weight.clone()
        vectors[rows] = start.item_embedding.weight[[column[self.items[row]] for row in rows]].to(vectors)
        self.load_state_dict({**start.state_dict(), "item_embedding.weight": vectors})

    def _load_mean(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Load the mean of the parameters of some epochs. Buffers do not change."""
        for name, parameter in self.named_parameters():
            parameter.data.copy_(torch.stack([state[name] for state in states]).mean(0))

    @classmethod
    def _new(cls, items: Sequence[Item], sequences: Sequence[History], **config: Any) -> "SASRec":
        """Return a teacher before its training; for subclasses."""
        return cls(items, **config)

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], context: Mapping[str, Any]) -> "SASRec":
        """Fit the teacher of a recipe. One that sets `max_history_items` reads full histories."""
        return super().from_spec(spec, {**context, "full_history": "max_history_items" in spec})

    def _windows(self, sequences: Iterable[History]) -> list[Tensor]:
        """Return training windows grouped by length, tensors (number, T + 1), so that batches have no padding.

        Long sequences are split from the end. Every item except the first of a user is the target of one window.
        """
        groups: dict[int, list[list[int]]] = defaultdict(list)
        for sequence in self.encode(sequences):
            for end in range(len(sequence), 1, -self.max_history_items):
                window = sequence[max(0, end - self.max_history_items - 1) : end]
                groups[len(window)].append(window)
        if not groups:
            raise ValueError("train_sequences has no sequence of two or more items; SASRec needs at least one.")
        return [torch.tensor(groups[length], device=self.device) for length in sorted(groups)]

    def _training_items(self) -> Tensor:
        """Return the items in the softmax of the training, `(n,)`; for subclasses."""
        return torch.arange(len(self.items), device=self.device)

    def _loss(self, hidden: Tensor, vectors: Tensor, targets: Tensor, negatives: int | None) -> Tensor:
        """Return the mean cross entropy of targets `(n,)` at states `(n, width)`, given the items' vectors.

        With `negatives`, the sum over the other items is estimated from that many uniform draws, each of which stands
        for items / negatives of them (sampled softmax, Jean et al., ACL 2015; as in eSASRec, RecSys 2025). Draws of a
        target itself are left out.
        """
        pool = self._training_items()
        if negatives is None:
            logits = hidden @ vectors.T
            if len(pool) < len(self.items):
                logits = logits + torch.full_like(logits[0], -torch.inf).index_fill_(0, pool, 0.0)
            return F.cross_entropy(logits, targets)
        drawn = pool[torch.randint(len(pool), (negatives,), device=pool.device)]
        positive = (hidden * vectors[targets]).sum(1, keepdim=True)
        others = hidden @ vectors[drawn].T + math.log(len(pool) / negatives)
        others = others.masked_fill(drawn == targets[:, None], -torch.inf)
        return (torch.cat([positive, others], 1).logsumexp(1) - positive.squeeze(1)).mean()

    def _train_epoch(
        self, windows: list[Tensor], optimizer: torch.optim.Optimizer, batch_size: int, negatives: int | None
    ) -> float:
        self.train()
        batches = [
            part
            for group in windows
            for part in group[torch.randperm(len(group))].split(max(1, batch_size // (group.shape[1] - 1)))
        ]
        total, count = 0.0, 0
        for index in torch.randperm(len(batches)).tolist():
            inputs, targets = batches[index][:, :-1], batches[index][:, 1:].flatten()
            vectors = self.item_vectors()
            loss = self._loss(self(inputs, vectors).flatten(0, 1), vectors, targets, negatives)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total, count = total + loss.item() * len(targets), count + len(targets)
        if not math.isfinite(total):
            rate = optimizer.param_groups[0]["lr"]
            raise NonFiniteError(
                f"The loss of SASRec is {total / count}: the training diverged. Lower learning_rate ({rate})."
            )
        return total / count

    def _ndcg(self, rows: Sequence[Mapping[str, Any]], k: int = 10) -> float:
        total = 0.0
        for scores, targets in self.scored(rows):
            # The best k scores suffice, and are found faster than all larger scores are counted.
            best = scores.topk(min(k, scores.shape[1])).values
            rank = 1 + (best > scores.gather(1, targets[:, None])).sum(1)
            total += torch.where(rank <= k, 1 / torch.log2(rank + 1.0), 0.0).sum().item()
        return total / len(rows)
