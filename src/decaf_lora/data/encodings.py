"""Which encoding is a text file in? UTF-8 if it can be; else another one, if it is the only one that makes sense.

A wrong guess changes letters without a word. So every guess is told, with words from the file as a sample. Where no
encoding makes sense, or several do, the user has to choose.
"""

from __future__ import annotations

import codecs
import re
import unicodedata

from decaf_lora.errors import UserError

_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Byte order marks, the longer ones first."""

_NAMES = {"cp1252": "Windows-1252", "utf-16-le": "UTF-16", "utf-16-be": "UTF-16 (big-endian)"}
_WITHIN_WORDS = "’·´"
"""Signs above ASCII that stand between two letters in western languages."""
_BESIDE_WORDS = "\N{NO-BREAK SPACE}“”„‘’‚«»‹›…–—"
"""Signs above ASCII that stand beside letters with accents."""


def encoding_of(raw: bytes, name: str, given: str | None = None) -> tuple[str, str | None]:
    """Finds the encoding of a text file.

    Args:
        raw: content of the file.
        name: of the file, for messages.
        given: the encoding that the user gives, which is only checked; None: find it.

    Returns:
        The encoding as Python calls it, and a warning for the user if it was guessed.

    Raises:
        UserError: the bytes do not fit the given encoding, or no single encoding makes sense.
    """
    if given is not None:
        try:
            text = raw.decode(given)
        except (LookupError, TypeError) as error:
            raise UserError(f"task.encoding: {given!r} is no text encoding that Python knows; try utf-8.") from error
        except ValueError as error:
            raise UserError(f"task.encoding: {name} is not {given}: {_reason(raw, error)}.") from error
        if "\0" in text:
            raise UserError(
                f"task.encoding: {name} is not {given}, or it would hold zero characters; try utf-16, or leave "
                "task.encoding out."
            )
        return given, None
    for mark, encoding in _MARKS.items():
        if raw.startswith(mark):
            return _checked(raw, encoding, name), None
    if b"\0" not in raw:
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError as error:
            broken = _reason(raw, error)
        else:
            return "utf-8", None
    else:
        broken = "it holds zero bytes"
    fitting = [encoding for encoding in _NAMES if _makes_sense(raw, encoding)]
    if len(fitting) == 1:
        words = [w for w in re.findall(r"\w+", raw.decode(fitting[0])) if not w.isascii()]
        shown = f" ({', '.join(dict.fromkeys(words[:3]))})" if words else ""
        return fitting[0], (
            f"task.encoding: {name} is not UTF-8 and is read as {_NAMES[fitting[0]]}{shown}; set task.encoding if that "
            "is wrong."
        )
    raise UserError(
        f"task.encoding: {name} is not UTF-8 ({broken}), and no single other encoding makes sense; set task.encoding "
        "(such as cp1252, cp1251, utf-16, shift_jis), or save the file as UTF-8."
    )


def _checked(raw: bytes, encoding: str, name: str) -> str:
    try:
        raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(
            f"task.encoding: {name} begins as {encoding.upper()} but is not: {_reason(raw, error)}; save it as UTF-8."
        ) from error
    return encoding


def _reason(raw: bytes, error: ValueError) -> str:
    if not isinstance(error, UnicodeDecodeError):
        return str(error)
    line = raw.count(b"\n", 0, error.start) + 1
    return f"byte 0x{raw[error.start]:02x} in line {line}"


def _makes_sense(raw: bytes, encoding: str) -> bool:
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError:
        return False
    if encoding.startswith("utf-16"):
        # Bytes of any other encoding, read in pairs, hardly ever give a line's end.
        return not _strange(text) and ("\n" in text or "\r" in text)
    return not _strange(text) and all(map(_is_western, re.findall(r"\S*[^\x00-\x7f]\S*", text)))


def _is_western(word: str) -> bool:
    """Whether the letters and signs above ASCII in `word` stand where western languages have them.

    Text of another encoding, read as Windows-1252, has runs of such letters, capitals within words, and signs beside or
    within words.
    """
    run = 0
    for before, sign, after in zip(" " + word, word, word[1:] + " ", strict=False):
        run = run + 1 if sign.isalpha() and not sign.isascii() else 0
        if run >= 3 or (run and sign.isupper() and before.islower()):
            return False
        if sign.isascii() or sign.isalpha():
            continue
        beside = [c for c in (before, after) if c.isalpha()]
        if len(beside) == 2 and sign not in _WITHIN_WORDS:
            return False
        if sign in "„‚" and not before.isascii():  # these only open
            return False
        if sign not in _WITHIN_WORDS + _BESIDE_WORDS and any(not c.isascii() for c in beside):
            return False
    return True


def _strange(text: str) -> bool:
    """Whether `text` has characters that real text has not: control characters, or code points without a meaning."""
    return any(c not in "\t\r\n\f" and unicodedata.category(c) in ("Cc", "Cn", "Co", "Cs") for c in set(text))
