"""Check the English of the repository with regular expressions. Needs only the standard library.

python tools/check_prose.py                               # everything; prints file:line: phrase -> remedy
python tools/check_prose.py docs/data.md gflowtrl/data    # single files or folders

It checks Markdown, the comments and strings of Python files, and the comments of YAML files, except code in backticks.
"""

from __future__ import annotations

import argparse
import io
import re
import tokenize
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
MAX_LINE = 120  # characters of a line of Markdown; tables and code may be wider
MAX_README_WORDS, MAX_README_LINES = 900, 120  # words outside code; lines of the whole file
SKIPPED = re.compile(r"(^|/)([._](?!_init_|_main_)|build/|dist/|outputs/)|check_prose\.py$")

_COUNTED = (
    "bytes? beams? dots? epochs? files? hours? items? leaf leaves lines? minutes? nodes? pages? prompts? rows? "
    "seconds? steps? times tokens? trajectory trajectories users? vectors?"
)
_UNITS = "epoch id item leaf level line method minute process prompt row second seed shop step target trajectory user"
#: Regular expressions and what to write instead. A space also matches a line break; case does not matter.
PHRASES = {
    rf"\b(?:{_COUNTED.replace(' ', '|')}) an? (?:{_UNITS.replace(' ', '|')})\b": "per",
    r"(?<!there\s)\b(?:is|are|was|were) no (?!longer\b|more\b|less\b|different\b|one\b)[a-z]+": "is not a",
    r"\bthere (?:is|are|was|were) none\b": "say what does not exist",
    r"\b(?:is|are) there(?=[.,;:)])": "exists",
    r"\b(?:is|are|be|been|was|were) told\b": "gets, receives",
    r"\b(?:stands?|stood|standing|lies|lie|lay|lying) (?:in|on|at|beside|behind|under|below|above|next|there)\b": "is",
    r"\bstands? (?:once|twice|alone)\b": "occurs, is",
    r"\bbeside\b": "next to, together with",
    r"\bbehind (?!(?:a|an|the|another) (?:\w+ )?prox)": "after",
    r"\bof one's own\b": "your own, custom",
    r"\bin the place of\b": "instead of",
    r"(?:, say|\bsay,)(?=[\s,.;:)])": "for example",
    r"\b(?:anew|afresh)\b": "again",
    r"\bgo(?:es)? on (?:from|with)\b": "continue",
    r"\bto be had\b": "available",
    r"\bthe house\b|\bhouse's\b": "the project",
    r"\brooms?\b(?! (?:for|left|to)\b)": "package, module",
    r"\b(?:bears|to bear|borne|whence|thence|thereof|therein|wherein|upon|amidst?|naught)\b": "a plainer word",
    r"catalogue": "catalog",
    r"(?:col|behavi|neighb|fav|hon|lab)our": "-or",
    r"\b(?:licence|grey|artefact|programmes?\b|centre|analyse[dr]?\b|defence|whilst|learnt|spelt)": "US spelling",
    r"\b(?:normal|token|summar|optim|initial|general|factor|penal|organ|recogn|quant|serial|visual|real|util|random"
    r"|regular|special|memor|categor|synchron|parallel|vector|discret|emphas|minim|maxim)is(?:e|es|ed|er|ers|ing|ation"
    r"|ations)\b": "-ize",
}
GAP = r"(?:[ \t]+|[ \t]*\n[ \t]*)"
RULES = [(re.compile(phrase.replace(" ", GAP), re.IGNORECASE), remedy) for phrase, remedy in PHRASES.items()]
CODE = re.compile(r"(?<!`)(?P<ticks>`+)(?:(?!\n\s*\n)[^`])+(?P=ticks)(?!`)|\]\([^)\s]*\)|https?://\S+")


def blank(text: str, by: str = "\0") -> str:
    """Replace every character except line breaks, so that offsets and line numbers stay the same."""
    return re.sub(r"[^\n]", by, text)


def comment_prose(source: str) -> str:
    """Return only the text after # in each line, of YAML and of code in Markdown."""
    lines = [re.split(r"(?:^|(?<=\s))#+", line, maxsplit=1) for line in source.split("\n")]
    return "\n".join(blank(line[0]) + " " + line[1] if len(line) > 1 else blank(line[0]) for line in lines)


def markdown_prose(source: str) -> str:
    """Return Markdown without the code in code blocks; their comments are kept."""
    parts = re.split(r"^(?=[ \t]*(?:```|~~~))", source, flags=re.MULTILINE)
    prose = "".join(comment_prose(part) if number % 2 else part for number, part in enumerate(parts))
    return re.sub(r"^[ \t]*(?:```|~~~).*", lambda fence: blank(fence[0]), prose, flags=re.MULTILINE)


def python_prose(source: str) -> str:
    """Return comments and strings of a Python file at their positions. A phrase may continue in the next one."""
    starts = [0, *(match.end() for match in re.finditer("\n", source))]
    kinds = (tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1))
    prose, end = "", 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        start, stop = (starts[line - 1] + column for line, column in (token.start, token.end))
        prose += re.sub(r"[^\s]", "\0", source[end:start])
        if token.type == tokenize.COMMENT:
            prose += re.sub("^#+", lambda mark: blank(mark[0], " "), token.string)
        elif token.type in kinds:
            prose += re.sub("^[a-zA-Z]*[\"']+|[\"']+$", lambda mark: blank(mark[0], " "), source[start:stop])
        else:
            prose += blank(source[start:stop])
        end = stop
    return prose


READERS = {".md": markdown_prose, ".py": python_prose, ".yaml": comment_prose, ".yml": comment_prose}


def findings(source: str, suffix: str) -> list[tuple[int, str]]:
    """Return `(line, "phrase -> remedy")` for each phrase to replace and each line of Markdown that is too long."""
    prose = READERS[suffix](source)
    text = CODE.sub(lambda code: blank(code[0]), prose)
    found = [
        (text.count("\n", 0, match.start()) + 1, f"{' '.join(match[0].split())} -> {remedy}")
        for rule, remedy in RULES
        for match in rule.finditer(text)
    ]
    if suffix == ".md":
        found += [
            (number, f"{len(line)} characters -> at most {MAX_LINE}")
            for number, line in enumerate(prose.split("\n"), 1)
            if len(line) > MAX_LINE and "\0" not in line and not line.lstrip().startswith("|")
        ]
    return sorted(found)


def readme_findings(source: str) -> list[tuple[int, str]]:
    """Return a finding if the README has too many words (without code blocks) or lines."""
    words, lines = len(markdown_prose(source).replace("\0", "").split()), source.count("\n")
    return [
        (lines, f"{count} {what} -> at most {most}")
        for count, what, most in ((words, "words", MAX_README_WORDS), (lines, "lines", MAX_README_LINES))
        if count > most
    ]


def files_in(path: Path) -> list[Path]:
    """Return the files in a folder that are checked, or the file itself."""
    if path.is_file():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix in READERS)
    return [file for file in files if not SKIPPED.search(file.relative_to(path).as_posix())]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, nargs="*", default=[ROOT], help="files or folders; the repository")
    paths, count = parser.parse_args().paths, 0
    for path in paths:
        if not path.is_dir() and not (path.is_file() and path.suffix in READERS):
            parser.error(f"{path} is neither a folder nor a file that ends with {', '.join(READERS)}")
    for file in (file for path in paths for file in files_in(path)):
        source = file.read_text(encoding="utf-8")
        found = findings(source, file.suffix)
        if file.resolve() == ROOT / "README.md":
            found += readme_findings(source)
        for line, text in found:
            print(f"{file}:{line}: {text}")
        count += len(found)
    return 1 if count else 0


if __name__ == "__main__":
    raise SystemExit(main())
