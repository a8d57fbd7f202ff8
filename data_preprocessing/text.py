"""A plain text -> tokens for pre-training: no template, the end token behind it, every token trained."""

from pathlib import Path
from typing import Any

import numpy as np

from toolkits.foundation.errors import DataError, UsageError

from .control_text import ControlText
from .encoders import EncoderName, Flat, choose_encoder
from .records import Document
from .rendered import Rendered, RenderedRows
from .samples import SampleEncoder, Samples
from .tokenizer import LoadedTokenizer, load_tokenizer

# What published vocabularies separate documents with in pre-training. A chat model's eos_token is often the end
# of a turn instead (<|im_end|>, <|eot_id|>), and its generation config lists both without saying which is which.
DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<eos>", "</s>")


class TextEncoder(SampleEncoder):
    """A tokenizer folder's encoder for documents; `end_token` overrides the token behind each of them.

    Raises UsageError for an end token that the tokenizer lacks, DataError when it has none at all.
    """

    def __init__(self, folder: Path, *, encoder: EncoderName = "auto", end_token: str | None = None) -> None:
        tokenizer = load_tokenizer(folder)
        self.end_token, self.end_id, self.end_reason = _end_token(tokenizer, end_token)
        super().__init__(tokenizer, choose_encoder(tokenizer, encoder), ControlText(tokenizer))

    def render(self, document: Document) -> Rendered:
        """Return the text with its control text hidden, which stays text."""
        text, found = self._control.hide(document.text)
        return Rendered(text, ((0, len(text)),), 0, found)

    def samples(self, rows: RenderedRows, flat: Flat) -> Samples:
        found = super().samples(rows, flat)
        whole = found.lengths > 0
        ends = np.cumsum(found.lengths)[whole]
        tokens, mask = np.insert(found.tokens, ends, self.end_id), np.insert(found.mask, ends, 1)
        return Samples(tokens, mask, found.lengths + whole, found.errors)

    def about(self) -> dict[str, Any]:
        """Return what the manifest says of the encoding."""
        return {"kind": "text", "end_token": {"text": self.end_token, "id": self.end_id, "reason": self.end_reason}}


def _end_token(tokenizer: LoadedTokenizer, said: str | None) -> tuple[str, int, str]:
    """Return the token that ends a document, its id, and why it is that one."""
    if said is not None:
        token = tokenizer.ids.get(said, tokenizer.encoder.token_to_id(said))
        if token is None:
            raise UsageError(f"--end-token {said}: {tokenizer.folder} has no such token")
        return said, token, "--end-token"
    eos = tokenizer.named.get("eos_token")
    if eos in DOCUMENT_ENDS:
        return eos, tokenizer.ids[eos], "the tokenizer's eos_token"
    known = next((token for token in DOCUMENT_ENDS if token in tokenizer.control), None)
    if known is not None:
        why = "what this vocabulary separates documents with" + f", eos_token is {eos}" * (eos is not None)
        return known, tokenizer.ids[known], why
    if eos is None:
        raise DataError(f"{tokenizer.folder} names no token that ends a document; say which with --end-token")
    return eos, tokenizer.ids[eos], "the tokenizer's eos_token"
