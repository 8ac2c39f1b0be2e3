"""What the parser of the command line complains of, in one line, with what was likely meant.

tyro draws a box: a first paragraph says what is wrong, further ones what it has found beside it, the last
which help to read. Flags stand four columns in, what they are for eight.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

_FLAG_COLUMN = 4
_KINDS = {"int()": "a whole number", "float": "a number"}
_KINDS_OR_NONE = {
    "INT": "a whole number",
    "FLOAT": "a number",
    "{[INT [INT ...]]}": "whole numbers",
    "{[FLOAT [FLOAT ...]]}": "numbers",
}


def complaint(box: str, verb: str, typed: Sequence[str], help_text: Callable[[], str] = str) -> str:
    """The box that tyro drew about what was typed after `mobilellm VERB`, in one line.

    `help_text` is asked where the box does not tell which flags there are.
    """
    said, *others = _paragraphs(box)
    text = " ".join(line.strip() for line in said)
    program = next(iter(re.findall(r"\(applied to (mobilellm [^)]+)\)", text)), None) or _helped(others, verb)
    # Other versions of tyro may draw another box, without flags where they are looked for.
    if text.startswith("Missing from ") and _at_the_flags(said):
        what = _missing(said, others)
    elif text.startswith("Unrecognized"):
        what = _unknown(said, others, typed, program)
    elif found := re.match(r"Missing value for argument '([^-].*)'\. Expected 1 values\.", text):
        what = _flag_in_place_of(found[1], typed, flags_with_kinds(help_text()), program)
    else:
        what = _in_our_words(text)
    return _told(what, program)


def misused_flag(typed: Sequence[str], help_text: str) -> str:
    """Of what was typed, a value given to a flag that takes none, or an empty path; in words, or "".

    The parser would take that value for the next argument (`export --verify=no MODEL`), and an empty path, as
    of `--out=$UNSET`, for the folder one stands in.
    """
    program = next(iter(re.findall(r"usage: (mobilellm .*?) \[-h\]", help_text)), "mobilellm")
    kinds = flags_with_kinds(help_text)
    for number, word in enumerate(typed):
        flag, attached, value = word.partition("=")
        if attached and kinds.get(flag) == "":
            said = f"{flag} {value!r}: it takes no value; {_instead(flag, kinds)}"
            return _told(said, program)
        is_empty = value == "" if attached else list(typed[number + 1 : number + 2]) == [""]
        if is_empty and re.search("PATH|^OUT", kinds.get(flag, "")):
            return _told(f"{flag} '' must be a path", program)
    return ""


def flags_with_kinds(help_text: str) -> dict[str, str]:
    """The flags of a help, each with what has to follow it: PATH, {None}|INT, {a,b}, or "" for nothing."""
    heads = [line.rstrip(" │")[2:].partition("  ")[0] for line in help_text.splitlines()]
    named = [each.partition(" ") for head in heads if re.match("--?[a-z]", head) for each in head.split(", ")]
    return {flag: kind for flag, _, kind in named}


def perhaps(typed: str, known: Iterable[str]) -> str:
    """Where one of the known is like what was typed, by its beginning or as a whole: ", did you mean X?"."""
    known = [each for each in known if each != typed]
    begun = [each for each in known if len(typed) > 2 and each.casefold().startswith(typed.casefold())]
    close = begun[:1] or difflib.get_close_matches(typed, known, n=1, cutoff=0.65)
    return f", did you mean {close[0]}?" if close else ""


def _instead(flag: str, kinds: Mapping[str, str]) -> str:
    table, dot, name = flag[2:].rpartition(".")
    plain = name.removeprefix("no-")
    pair = [f"--{table}{dot}{plain}", f"--{table}{dot}no-{plain}"]
    are_both = all(kinds.get(each) == "" for each in pair)
    return f"type {' or '.join(pair)}" if are_both else f"type {flag} or leave it out"


def _told(what: str, program: str) -> str:
    return f"{program.removeprefix('mobilellm ')}: {what} ({program} --help tells the arguments)"


def _paragraphs(box: str) -> list[list[str]]:
    """The lines between the rules, without the frame, or the margin of a terminal that cannot draw one."""
    paragraphs: list[list[str]] = [[]]
    for line in box.splitlines()[1:]:
        inside = line.rstrip(" │")[2:]
        if line.startswith("╰") or (inside and not inside.strip("─- ")):
            paragraphs.append([])
        elif inside:
            paragraphs[-1].append(inside)
    return [each for each in paragraphs if each] or [[box]]


def _helped(others: Sequence[Sequence[str]], verb: str) -> str:
    text = " ".join(line.strip() for line in others[-1]) if others else ""
    found = re.search(r"(mobilellm .*?) --help", text)
    return found[1] if found else f"mobilellm {verb}"


def _missing(said: Sequence[str], others: Sequence[Sequence[str]]) -> str:
    names = _at_the_flags(said)
    needed = f"needs {_listed(names, 'and')}"
    unknown = [each for each in others if each[0].startswith("Unrecognized")]
    flags = [token for each in unknown for token in _at_the_flags(each) if token.startswith("-")]
    if not flags:
        return needed
    return f"{needed}; {flags[0]} is not known{perhaps(flags[0], [each.split()[0] for each in names])}"


def _unknown(said: Sequence[str], others: Sequence[Sequence[str]], typed: Sequence[str], program: str) -> str:
    applied = [found[1] for line in said if (found := re.match(r" *(\S+) \(applied to ", line))]
    text = " ".join(line.strip() for line in said)
    tokens = applied or text.partition(": ")[2].split(", ")
    others_said = [" ".join(line.strip() for line in each) for each in others]
    for each in others_said:
        if each.startswith("Available subcommands: ") and not tokens[0].startswith("-"):
            names = each.partition(": ")[2].split(", ")
            meant = perhaps(tokens[0], names) or f"; name one first: {program} {names[0]} {tokens[0]}"
            return f"{tokens[0]!r} is not one of {', '.join(names)}{meant}"
    flags = [token for token in tokens if token.startswith("-")]
    if not flags:
        are = "is" if len(tokens) == 1 else "are"
        before = typed[typed.index(tokens[0]) - 1] if tokens[0] in typed[1:] else ""
        why = f"; {before} takes no value" if before.startswith("--") and "=" not in before else ""
        return f"{_listed([repr(token) for token in tokens], 'and')} {are} too many{why}"
    names = [flag.partition("=")[0] for flag in flags]
    return "; ".join(f"{name} is not known{_likeliest(name, others)}" for name in names).replace("?;", "?")


def _likeliest(flag: str, others: Sequence[Sequence[str]]) -> str:
    heads = ("Perhaps you meant:", f"Arguments similar to {flag}:")
    similar = [
        name.split()[0].rstrip(",") for each in others if each[0] in heads for name in _at_the_flags(each)
    ]
    others_than_it = [each for each in similar if each != flag]
    return perhaps(flag, others_than_it) or (f", did you mean {others_than_it[0]}?" if others_than_it else "")


def _flag_in_place_of(name: str, typed: Sequence[str], known: Mapping[str, str], program: str) -> str:
    """A flag that there is not, where what has no flag was looked for."""
    flags = [word.partition("=")[0] for word in typed if word.startswith("-")]
    unknown = next((flag for flag in flags if flag not in known), None)
    if unknown is None or unknown.lstrip("-") == name:
        return f"{name.upper()} goes without a flag: {program} {name.upper()}"
    return f"{unknown} is not known{perhaps(unknown, known)}"


def _in_our_words(text: str) -> str:
    of_a_number = (
        r"Error parsing (\S+): (?:invalid literal for (int\(\))|could not convert string to (float))"
    )
    if found := re.match(of_a_number + "[^:]*: (.*)", text):
        return f"{found[1]} {found[4]} must be {_KINDS[found[2] or found[3]]}"
    of_none_or_more = (
        r"Error parsing (\S+): no type matching \{None\}\|(.*) could be instantiated from \[(.*?)\]\. "
    )
    if (found := re.match(of_none_or_more, text)) and found[2] in _KINDS_OR_NONE:
        return f"{found[1]} {found[3].replace(', ', ' ')} must be {_KINDS_OR_NONE[found[2]]}"
    if found := re.match(r"invalid choice '(.*)' for argument '(.*)'\. Expected one of \((.*)\)\.", text):
        # tyro keeps them in a set; None stands for leaving the flag out.
        choices = sorted(each for each in re.findall(r"'([^']*)'", found[3]) if each != "None")
        return f"{found[2]} {found[1]!r} must be {_listed(choices, 'or')}{perhaps(found[1], choices)}"
    if found := re.match(r"Missing value for argument '(.*)'\. Expected 1 values\.", text):
        return f"{found[1]} needs a value"
    if found := re.match(r"Expected one of \{(.*)\}\.", text):
        return f"needs one of {found[1]}"
    return text


def _at_the_flags(lines: Iterable[str]) -> list[str]:
    return [line.strip() for line in lines if len(line) - len(line.lstrip()) == _FLAG_COLUMN]


def _listed(names: Sequence[str], word: str) -> str:
    return f"{', '.join(names[:-1])} {word} {names[-1]}" if len(names) > 1 else names[0]
