"""Text in place of bytes, as subprocess's text mode makes it."""

from __future__ import annotations

import codecs
import io

__all__ = ["TextCodec"]

# For a warning that no encoding was named: text_encoding(), here, run_process(), who called it.
_STACK_LEVEL = 3


class TextCodec:
    """An encoding with its error handler and universal newlines, as io.TextIOWrapper has them.

    Raises:
        LookupError, TypeError: as io.TextIOWrapper.
    """

    def __init__(self, encoding: str | None, errors: str | None) -> None:
        named = io.text_encoding(encoding, _STACK_LEVEL)
        wrapper = io.TextIOWrapper(io.BytesIO(), encoding=named, errors=errors)
        self._encoding, self._errors = wrapper.encoding, wrapper.errors or "strict"
        codecs.lookup_error(self._errors)

    def encode(self, text: str) -> bytes:
        """The bytes of `text`."""
        return text.encode(self._encoding, self._errors)

    def decode(self, output: bytes, *, cut: bool = False) -> str:
        """The text of `output`; one that was `cut` off is decoded as far as that goes."""
        try:
            text = output.decode(self._encoding, self._errors)
        except UnicodeError:
            if not cut:
                raise
            text = output.decode(self._encoding, "replace")
        return text.replace("\r\n", "\n").replace("\r", "\n")

    def decoder(self) -> io.IncrementalNewlineDecoder:
        """The same for output that comes in pieces."""
        decoder = codecs.getincrementaldecoder(self._encoding)(self._errors)
        return io.IncrementalNewlineDecoder(decoder, translate=True)
