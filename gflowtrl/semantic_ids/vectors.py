"""Item vectors: checks, loading, co-occurrence vectors, and combination."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor

from gflowtrl.catalog import Item
from gflowtrl.checks import SHARE, check_number
from gflowtrl.data.interactions import flatten
from gflowtrl.files import read_tensors, reading


logger = logging.getLogger(__name__)


def as_vectors(vectors: Tensor | np.ndarray, rows: int | None = None, dim: int | None = None) -> Tensor:
    """Return vectors as a checked float32 tensor `(N, D)` on the CPU.

    Raises:
        ValueError: if they are not a nonempty matrix of `rows` rows and `dim` columns, or not all finite.
    """
    vectors = torch.as_tensor(vectors).detach()
    if vectors.is_complex():
        raise ValueError("The item vectors are complex numbers; they must be real. Save them as float32.")
    vectors = vectors.to("cpu", torch.float32)
    if vectors.ndim != 2 or 0 in vectors.shape:
        raise ValueError(f"The shape of item vectors is {tuple(vectors.shape)}; it must be (items, dimensions).")
    if rows is not None and len(vectors) != rows:
        raise ValueError(f"There are {rows} items but {len(vectors)} rows of vectors. Give one row per item.")
    if dim is not None and vectors.shape[1] != dim:
        raise ValueError(f"The vectors have {vectors.shape[1]} columns; they must have {dim}, as in fit().")
    broken = (~vectors.isfinite().all(1)).nonzero().flatten()
    if len(broken):
        raise ValueError(f"{len(broken)} item vectors are not finite, the first in row {broken[0]}. Correct them.")
    return vectors


def load_vectors(path: str | Path, items: Sequence[Item]) -> Tensor:
    """Load vectors `(len(items), D)`, row i for `items[i]`, from `.npy`, or from `.safetensors` with one tensor.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: for a file of another type, a broken file, several tensors, a wrong number of rows, or NaN; the
            message names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of item vectors at {path}. Check the path.")
    if path.suffix == ".npy":
        with reading(path, "an array of numbers in numpy's .npy format"):
            vectors = torch.as_tensor(np.load(path))
    elif path.suffix == ".safetensors":
        tensors = read_tensors(path)
        if len(tensors) != 1:
            raise ValueError(f"{path} has {len(tensors)} tensors ({', '.join(sorted(tensors))}); it must have one.")
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
    """Compute collaborative vectors, in which items taken by the same users are close to each other.

    The matrix of positive pointwise mutual information, max(0, log P(i, j) / (P(i) P(j))) over pairs of different
    items of a user, is factorized as U S V'. The vector of an item is its row of U sqrt(S), scaled to norm 1 (Levy and
    Goldberg, NeurIPS 2014).

    Args:
        train_sequences: `Splits.train_sequences`. They must not contain held-out items; otherwise the ids would leak
            the targets.
        items: the catalog, in the order of the rows.
        dim: maximum dimension; it is always less than the number of items.
        seed: seed of the randomized SVD.

    Returns:
        `(len(items), dim)`. Items that never occur together with another item get a row of zeros, and their number is
        logged.

    Raises:
        ValueError: if an item is given twice or is missing in `items`, or no two items occur together more often than
            by chance.
    """
    from sklearn.decomposition import TruncatedSVD  # slow to import, and rarely needed

    columns, starts = flatten(train_sequences, items)
    ones = np.ones(len(columns), dtype=np.float32)
    taken = sp.csr_matrix((ones, columns, starts), shape=(len(train_sequences), len(items)))
    taken.sum_duplicates()
    taken = taken.sign()
    information = _positive_pmi((taken.T @ taken).tocoo())
    if information.nnz == 0 or len(items) < 3:
        raise ValueError("Collaborative vectors need items that occur together more often than by chance. Use texts.")
    svd = TruncatedSVD(min(dim, len(items) - 1), random_state=seed)
    vectors = torch.from_numpy(svd.fit_transform(information) / np.sqrt(svd.singular_values_.clip(1e-12))).float()
    isolated = np.flatnonzero(np.diff(information.indptr) == 0)
    vectors[isolated] = 0
    if len(isolated):
        logger.warning(
            "%d of %d items, the first is %r, occur with no other item in training; their vectors are zero.",
            len(isolated), len(items), items[isolated[0]],
        )  # fmt: skip
    return F.normalize(vectors)


def combine_vectors(text: Tensor, collaborative: Tensor, weight: float = 0.5) -> Tensor:
    """Concatenate text and collaborative vectors, `(N, D1 + D2)`.

    Rows are scaled to norm 1 first; rows of zeros stay zero. A squared distance is then the weighted sum of the
    squared distances of the two parts, with weights 1 - weight and weight.

    Raises:
        ValueError: if the numbers of rows differ, or weight is not between 0 and 1.
    """
    check_number("weight", weight, SHARE)
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
