"""Words of a row of tokens, read from the tokens' text: which tokens belong to one word."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from data.tokenizer.base import Tokenizer


class WordEdges(NamedTuple):
    """White space at the edges of each token's text, and the special tokens: three bools of (V,).

    A token of spaces alone ends no word: they are those in front of the next word.
    """

    begins_V: np.ndarray
    ends_V: np.ndarray
    is_special_V: np.ndarray


def word_edges(tokenizer: "Tokenizer") -> WordEdges:
    """Read the edges of a tokenizer's tokens from `token_bytes`.

    A space begins the tokens that begin a word: byte-level BPE's "Ġthe" and SentencePiece's "▁the" are " the", and so is
    WordPiece's "the", whose continuation is "##the".
    """
    texts = [text.decode(errors="replace") for text in tokenizer.token_bytes[: tokenizer.vocab_size]]
    is_special_V = np.zeros(tokenizer.vocab_size, dtype=bool)
    is_special_V[sorted(tokenizer.special_ids)] = True
    begins_V = np.array([text[:1].isspace() for text in texts])
    ends_V = np.array([text[-1:].isspace() and text.strip(" ") != "" for text in texts])
    return WordEdges(begins_V, ends_V, is_special_V)


def begins_word(ids_BT: np.ndarray, edges: WordEdges) -> np.ndarray:
    """Return True where a token is the first of its word, bool of (B, T).

        begins[t]   t = 0, or white space begins the text of ids[t] or ends that of ids[t - 1], or one of the two is special

    A special token is a word of its own, and a row begins a word. Spaces belong to the word behind them, and punctuation to
    the word that it touches, as in transformers' DataCollatorForLanguageModeling(whole_word_mask=True), which compares
    character offsets. Three differences: WordPiece marks no space in front of punctuation, so a mark is a word of its own, as
    in Google's BERT; a line break ends a word, where transformers has both of its sides in one, since byte-level offsets leave
    out spaces alone; and the bytes of one character stay together, which transformers has in words of their own.

    >>> edges = WordEdges(*(np.array(bits, dtype=bool) for bits in ((0, 1, 0, 0), (0, 0, 0, 1), (1, 0, 0, 0))))
    >>> begins_word(np.array([[2, 2, 0, 2, 2, 1, 2, 3, 2]]), edges).tolist()
    [[True, False, True, True, False, True, False, False, True]]
    """
    begins_BT = edges.begins_V[ids_BT] | edges.is_special_V[ids_BT]
    begins_BT[:, 0] = True
    begins_BT[:, 1:] |= edges.ends_V[ids_BT[:, :-1]] | edges.is_special_V[ids_BT[:, :-1]]
    return begins_BT


def first_of_word(ids_BT: np.ndarray, edges: WordEdges) -> np.ndarray:
    """Return the position of the first token of each token's word, int64 of (B, T)."""
    place_T = np.arange(ids_BT.shape[1])
    return np.maximum.accumulate(np.where(begins_word(ids_BT, edges), place_T, 0), axis=1)
