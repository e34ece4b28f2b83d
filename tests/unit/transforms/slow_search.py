"""Slow twin of the greedy rotation: one block at a time, explicit matrices, numpy float64, written from the method."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Matrix = np.ndarray


@dataclass(frozen=True)
class Found:
    """What a search ends with."""

    product: Matrix
    """The best prefix product, [B, B]."""
    length: int
    """How many steps it holds."""
    margin: float
    """Smallest relative gap of any decision; below float32 accuracy the search is not well posed."""


def base_rotation(size: int) -> Matrix:
    """G_(size-2) ... G_0, then rows and columns 0 and size - 1 exchanged, as E G E."""
    product = np.eye(size)
    for i in range(size - 1):
        givens = np.eye(size)
        givens[i, i] = givens[i + 1, i + 1] = 1 / math.sqrt(i + 2)
        givens[i + 1, i] = math.sqrt(i + 1) / math.sqrt(i + 2)
        givens[i, i + 1] = -givens[i + 1, i]
        product = givens @ product
    return exchange(size, size - 1) @ product @ exchange(size, size - 1)


def exchange(size: int, channel: int) -> Matrix:
    """E_c: the permutation matrix that exchanges channels 0 and c."""
    matrix = np.eye(size)
    matrix[[0, channel]] = matrix[[channel, 0]]
    return matrix


def step_rotation(q: Matrix, channel: int) -> Matrix:
    """R = E_c R~ diag(1, Q) E_c."""
    size = len(q) + 1
    mixed = np.eye(size)
    mixed[1:, 1:] = q
    swap = exchange(size, channel)
    return swap @ base_rotation(size) @ mixed @ swap


def search(x: Matrix, q: list[Matrix], score: Callable[[Matrix], float], pivot: str) -> Found:
    """Rotate x [rows, B] once for each Q, then look for the prefix with the least score; of equals the shortest."""
    size, margin = x.shape[1], math.inf
    prefixes, scores = [np.eye(size)], [score(x)]
    for matrix in q:
        magnitudes = np.abs(x)
        row, channel = np.unravel_index(np.argmax(magnitudes), x.shape)
        second, first = np.unique(magnitudes)[-2:]  # a token sampled twice is no tie
        margin = min(margin, float((first - second) / first))
        rotation = step_rotation(matrix, int(channel if pivot == "channel" else row % size))
        x = x @ rotation
        prefixes.append(prefixes[-1] @ rotation)
        scores.append(score(x))
    length = int(np.argmin(scores))
    others = [abs(s / scores[length] - 1) for i, s in enumerate(scores) if i != length]
    return Found(prefixes[length], length, min(margin, *others))


def largest_rows(x: Matrix, count: int) -> Matrix:
    """The `count` rows of x [rows, B] with the largest max |x|, in the order in which they lie."""
    peaks = np.abs(x).max(axis=1)
    kept = sorted(sorted(range(len(x)), key=lambda i: -peaks[i])[:count])
    return x[kept]
