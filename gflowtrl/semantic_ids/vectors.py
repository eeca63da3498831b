"""Vectors of items: checked, read from a file, made of co-occurrences, put side by side."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from gflowtrl.catalog import Item
from gflowtrl.data.interactions import flatten
from gflowtrl.files import reading


logger = logging.getLogger(__name__)


def as_vectors(vectors: Tensor | np.ndarray, rows: int | None = None, dim: int | None = None) -> Tensor:
    """Vectors as a float32 tensor `(N, D)` on the CPU, checked.

    Raises:
        ValueError: if they are no matrix with numbers in it, not of `rows` rows or `dim` columns, or not all finite.
    """
    vectors = torch.as_tensor(vectors).detach().to("cpu", torch.float32)
    if vectors.ndim != 2 or 0 in vectors.shape:
        raise ValueError(f"Item vectors must be a matrix, one row an item, but their shape is {tuple(vectors.shape)}.")
    if rows is not None and len(vectors) != rows:
        raise ValueError(f"There are {rows} items but {len(vectors)} rows of vectors; give one row an item.")
    if dim is not None and vectors.shape[1] != dim:
        raise ValueError(f"The vectors have {vectors.shape[1]} columns, but {dim} are needed, as in fit().")
    broken = ~vectors.isfinite().all(1)
    if broken.any():
        row = int(broken.nonzero()[0])
        raise ValueError(f"{int(broken.sum())} item vectors are not finite, the first in row {row}. Repair them.")
    return vectors


def load_vectors(path: str | Path, items: Sequence[Item]) -> Tensor:
    """Reads vectors `(len(items), D)`, row i for `items[i]`, from `.npy` or from `.safetensors` with one tensor.

    Raises:
        FileNotFoundError: if the file is not there.
        ValueError: for another kind of file, a broken one, several tensors, another number of rows, or NaN; the
            message names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of item vectors at {path}.")
    if path.suffix == ".npy":
        with reading(path, "an array of numbers in numpy's .npy format"):
            vectors = torch.as_tensor(np.load(path))
    elif path.suffix == ".safetensors":
        with reading(path, "a .safetensors file"):
            tensors = load_file(path)
        if len(tensors) != 1:
            raise ValueError(f"{path} holds {len(tensors)} tensors ({', '.join(sorted(tensors))}); one is needed.")
        (vectors,) = tensors.values()
    else:
        raise ValueError(f"{path} is neither .npy nor .safetensors. Save the item vectors in one of these formats.")
    try:
        return as_vectors(vectors, rows=len(items))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def cooccurrence_vectors(
    train_sequences: Sequence[Sequence[Item]], items: Sequence[Item], dim: int = 128, seed: int = 0
) -> Tensor:
    """Collaborative vectors: items that the same users took are near each other.

    The matrix of positive pointwise mutual information, max(0, log P(i, j) / (P(i) P(j))) over pairs of different
    items of a user, is factorized as U S V', and a row of U sqrt(S), scaled to length 1, is an item's vector (Levy and
    Goldberg, NeurIPS 2014).

    Args:
        train_sequences: `Splits.train_sequences`. Held-out items must not be among them, or the ids tell the answer.
        items: the catalog, the order of the rows.
        dim: columns, at most; there are never as many as items.

    Returns:
        `(len(items), dim)`. Items that nobody took beside another one get a row of zeros, and the log counts them.

    Raises:
        ValueError: if an item is given twice or is missing in `items`, or no user took two items.
    """
    from sklearn.decomposition import TruncatedSVD  # slow to import, and rarely needed

    columns, starts = flatten(train_sequences, items)
    ones = np.ones(len(columns), dtype=np.float32)
    taken = sp.csr_matrix((ones, columns, starts), shape=(len(train_sequences), len(items)))
    taken.sum_duplicates()
    taken = taken.sign()
    information = _positive_pmi((taken.T @ taken).tocoo())
    if information.nnz == 0 or len(items) < 3:
        raise ValueError("No two items occur together more than by chance; collaborative vectors need such pairs.")
    svd = TruncatedSVD(min(dim, len(items) - 1), random_state=seed)
    vectors = torch.from_numpy(svd.fit_transform(information) / np.sqrt(svd.singular_values_.clip(1e-12))).float()
    alone = np.flatnonzero(np.diff(information.indptr) == 0)
    vectors[alone] = 0
    if len(alone):
        logger.warning(
            "%d of %d items occur beside no other one in training, the first is %r; their vectors are zero.",
            len(alone), len(items), items[alone[0]],
        )  # fmt: skip
    return F.normalize(vectors)


def combine_vectors(text: Tensor, collaborative: Tensor, weight: float = 0.5) -> Tensor:
    """Vectors side by side, `(N, D1 + D2)`, so that squared distances are 1 - weight and weight of the two parts.

    Both are scaled to rows of length 1 before that; rows of zeros stay zero.

    Raises:
        ValueError: if they have different numbers of rows, or weight is not between 0 and 1.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight is the share of the collaborative vectors, between 0 and 1, but {weight} was given.")
    text = as_vectors(text)
    collaborative = as_vectors(collaborative, rows=len(text))
    return torch.cat([F.normalize(text) * (1 - weight) ** 0.5, F.normalize(collaborative) * weight**0.5], dim=1)


def _positive_pmi(pairs: sp.coo_matrix) -> sp.csr_matrix:
    other = pairs.row != pairs.col
    row, column, count = pairs.row[other], pairs.col[other], pairs.data[other].astype(np.float64)
    per_item = np.bincount(row, weights=count, minlength=pairs.shape[0])
    information = np.log(count * count.sum() / (per_item[row] * per_item[column]))
    positive = information > 0
    return sp.csr_matrix((information[positive], (row[positive], column[positive])), shape=pairs.shape)
