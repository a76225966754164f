"""Folds for cross-validation that keep texts which are all but the same together.

A text in training and its near copy in the held-out fold would be remembered, not judged. Copies
are found by MinHash (Broder 1997) over character 5-grams and then compared exactly.
"""

import collections
import itertools
from collections.abc import Sequence

import numpy as np

SHINGLE = 5  # characters
BANDS, ROWS = 24, 4  # of hash functions; a pair of similarity 0.7 is missed once in 600


def shingles(text: str) -> frozenset[str]:
  """Character 5-grams, letter case and spacing aside."""
  plain = " ".join(text.casefold().split())
  return frozenset(plain[i : i + SHINGLE] for i in range(max(len(plain) - SHINGLE + 1, 1)))


def groups(texts: Sequence[str], similarity: float) -> np.ndarray:
  """The group [n] of each text: those of at least this Jaccard similarity, and theirs, share one.

  Groups are numbered by their first text.
  """
  sets = [shingles(text) for text in texts]
  parent = list(range(len(texts)))

  def root(i: int) -> int:
    while parent[i] != i:
      parent[i] = i = parent[parent[i]]
    return i

  buckets = collections.defaultdict(list)
  for i, signature in enumerate(_signatures(sets)):
    for band in range(BANDS):
      buckets[band, signature[band * ROWS : (band + 1) * ROWS].tobytes()].append(i)
  for members in buckets.values():
    for i, j in itertools.combinations(members, 2):
      a, b = root(i), root(j)
      if a != b and len(sets[i] & sets[j]) >= similarity * len(sets[i] | sets[j]):
        parent[max(a, b)] = min(a, b)
  return np.array([root(i) for i in range(len(texts))])


def assign(groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
  """The fold [n] of each text: whole groups, in a random order, each to the smallest fold."""
  members = collections.Counter(groups.tolist())
  names = sorted(members)
  fold_of, sizes = {}, np.zeros(folds)
  for i in np.random.default_rng(seed).permutation(len(names)):
    smallest = int(np.argmin(sizes))
    fold_of[names[i]] = smallest
    sizes[smallest] += members[names[i]]
  return np.array([fold_of[group] for group in groups.tolist()])


def _signatures(sets: Sequence[frozenset[str]]) -> np.ndarray:
  """MinHash signatures [n, BANDS * ROWS]."""
  rng, full = np.random.default_rng(0), dict(high=1 << 64, size=BANDS * ROWS, dtype=np.uint64)
  multiply, add = rng.integers(0, **full) | np.uint64(1), rng.integers(0, **full)
  names: dict[str, int] = {}
  signatures = np.zeros((len(sets), BANDS * ROWS), np.uint64)
  for i, some in enumerate(sets):
    ids = np.array([names.setdefault(s, len(names) + 1) for s in sorted(some)], np.uint64)
    ids = ids * np.uint64(0x9E3779B97F4A7C15)  # numbers in a row, scattered over 64 bits
    ids ^= ids >> np.uint64(32)
    # Multiply-shift: overflow is the modulus, and the upper half of the bits is the hash.
    hashes = (ids[:, None] * multiply[None] + add[None]) >> np.uint64(32)
    signatures[i] = np.min(hashes, axis=0)
  return signatures
