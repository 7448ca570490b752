"""Words from elsewhere, made safe to show: names of files, layers, classes and tensors.

A name may hold escape sequences that clear a terminal, line breaks that forge a line of a log, or
marks that turn the direction of what follows. Names are kept as they are and cleaned where they
are shown, in one place for each way out: lines on the terminal, and JSON.
"""

from __future__ import annotations

import re
import unicodedata

# Joiners that words of Persian, Hindi and many an emoji need; alone they show nothing.
JOINERS = "\u200c\u200d"
# A line on a terminal; longer ones hold a name that is a bomb of its own.
LONGEST_LINE = 2_000
_SUSPECT = re.compile(r"[^\x20-\x7e\xa1-\xac\xae-\u05ff]")


def _hidden(letter: str) -> bool:
    """Whether a letter steers instead of showing: controls, marks of direction, half letters."""
    return letter not in JOINERS and unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def printable(text: str) -> str:
    r"""Return the text with every letter that steers a terminal or a page spelt out.

    Controls (C0, C1 and DEL, line breaks and tabs among them), marks that turn the direction,
    other invisible marks, line and paragraph separators, and lone surrogates (what is left of a
    name that is not UTF-8) become `\x1b`, `\u202e` and the like. Everything else stays.

    >>> printable("a\x1b[2Jb\u202e")
    'a\\x1b[2Jb\\u202e'
    """
    return _SUSPECT.sub(lambda found: _spelt(found[0]), text)


def _spelt(letter: str) -> str:
    if not _hidden(letter):
        return letter
    code = ord(letter)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def as_text(name: str) -> str:
    """Return a name as text that can be written as UTF-8; bytes that are none are spelt out."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def one_line(text: str, *, longest: int = LONGEST_LINE) -> str:
    """Return a message as one printable line; of a longer one the middle is left out.

    Args:
        text: The message; each run of white space becomes one space.
        longest: Letters that are kept. The end of a message says what to do, so that the middle
            goes.
    """
    line = printable(" ".join(text.split()))
    if len(line) <= longest:
        return line
    half = longest // 2
    return f"{line[:half]} [{len(line) - 2 * half:,} letters left out] {line[-half:]}"


def json_text(text: str) -> str:
    """Return JSON text that says the same and steers no terminal.

    JSON writers spell out the controls below a space alone. The others stand inside strings, the
    only place where JSON has them, and are written as escapes there. The line breaks and spaces
    between values stay.
    """
    return _SUSPECT.sub(lambda found: _json_spelt(found[0]), text)


def _json_spelt(letter: str) -> str:
    if letter == "\n" or not _hidden(letter):
        return letter
    units = letter.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))
