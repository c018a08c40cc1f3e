"""Text as numbers without a vocabulary file: words, and parts of words, hashed to buckets (Weinberger et al. 2009)."""

import re
import zlib
from collections.abc import Sequence

import numpy as np


def tokens(texts: Sequence[str], length: int, vocabulary: int) -> np.ndarray:
    """int32 `[n, length]` in 0..vocabulary-1: the words of each text, then their trigrams ("<cat>" gives <ca, cat, at>), cut
    to `length`; 0 is padding. The same on every machine and in every process."""
    found = np.zeros((len(texts), length), np.int32)
    for row, text in zip(found, texts, strict=True):
        words = re.findall(r"\w+", text.lower())
        parts = [f"<{word}>"[i : i + 3] for word in words for i in range(len(word))]
        numbers = [1 + zlib.crc32(piece.encode()) % (vocabulary - 1) for piece in (*words, *parts)][:length]
        row[: len(numbers)] = numbers
    return found
