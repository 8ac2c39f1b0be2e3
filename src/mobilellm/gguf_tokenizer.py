"""The tokenizer in a GGUF file, as llama.cpp has it: pieces with their scores and kinds; a chat template."""

from __future__ import annotations

from typing import Any

import numpy as np

from mobilellm.gguf import GGUF, shown
from mobilellm.sentencepiece_model import LAYOUT_HEAD, SPECIAL_PIECES
from mobilellm.texts import Texts
from mobilellm.tokenizer import BOS_ID, EOS_ID, PAD_ID, UNK_ID, Tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # ggml's kinds of token
_LONGEST_PIECE = 256


def add_tokenizer(writer: Any, tokenizer: Tokenizer, vocab_size: int, template: str | None) -> None:
    """Its metadata, to a `gguf.GGUFWriter`; a row of the embedding that no piece uses gets a piece, too."""
    scores = tokenizer.scores()
    spare = range(tokenizer.vocab_size, vocab_size)
    kinds = [_UNKNOWN, _CONTROL, _CONTROL] + [_BYTE] * (len(LAYOUT_HEAD) - len(SPECIAL_PIECES))
    kinds += [_NORMAL] * (tokenizer.vocab_size - len(kinds)) + [_CONTROL] * len(spare)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*tokenizer.pieces, *map(_padding, spare)])
    writer.add_token_scores([*scores, *(0.0 for _ in spare)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(BOS_ID)
    writer.add_eos_token_id(EOS_ID)
    writer.add_unk_token_id(UNK_ID)
    writer.add_pad_token_id(PAD_ID)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)
    if template is not None:
        writer.add_chat_template(template)


def read_tokenizer(file: GGUF) -> Tokenizer:
    """The tokenizer inside. Raises ValueError for one that is not Llama's SentencePiece."""
    metadata, path = file.metadata, file.path
    kind = metadata.get("tokenizer.ggml.model")
    if not isinstance(kind, str) or kind != "llama":
        raise ValueError(f"{path}: its tokenizer is {shown(kind)}; only 'llama' (SentencePiece BPE) is read")
    pieces, scores = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.scores")
    if not isinstance(pieces, Texts) or not isinstance(scores, np.ndarray) or len(scores) != len(pieces):
        raise ValueError(f"{path}: the tokenizer's tokens and scores are missing or not equally many")
    used = len(pieces)
    while used > len(LAYOUT_HEAD) and pieces[used - 1] == _padding(used - 1):
        used -= 1  # rows of the embedding that no piece uses
    pieces = pieces.first(used)
    falling = np.argsort(-scores[len(LAYOUT_HEAD) : used].astype(np.float64), kind="stable")
    ranked = (len(LAYOUT_HEAD) + falling).astype(np.int32)  # of equal scores, the lower id
    embedding = file.tensors.get("token_embd.weight")
    if embedding is not None and len(pieces) > embedding.shape[0]:
        raise ValueError(
            f"{path}: its tokenizer has {len(pieces):,} pieces and its embedding {embedding.shape[0]:,} rows"
        )
    longest = max(map(len, pieces.of_more_than(_LONGEST_PIECE)), default=0)
    if longest > _LONGEST_PIECE:  # every way to cut a piece in two is looked at
        raise ValueError(f"{path}: a piece has {longest:,} characters, of {_LONGEST_PIECE} at most")
    try:
        return Tokenizer(pieces, ranked=ranked)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_chat_template(file: GGUF) -> str | None:
    """Of a model to talk to. None of a base model."""
    template = file.metadata.get("tokenizer.chat_template")
    return template if isinstance(template, str) else None


def _padding(index: int) -> str:
    return f"[PAD{index}]"
