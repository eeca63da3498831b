"""Counts lines of code: no docstrings, comments or blank lines. Only the standard library is used.

python tools/count_code.py gflowtrl            # every package, and the total without data/formats
python tools/count_code.py gflowtrl --check    # also fail where a file or a function is too long
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections import Counter
from pathlib import Path


MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 60
APART = "data/formats"  # counted, but kept out of the total
_LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def code_lines(source: str) -> set[int]:
    """The numbers of the lines that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            docstring = node.body[0]
            lines -= set(range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1))
    return lines


def long_functions(source: str, lines: set[int]) -> list[tuple[str, int]]:
    """Functions with more code than fits on a screen, and how many lines they have."""
    functions = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    lengths = [(f.name, len(lines & set(range(f.lineno, (f.end_lineno or f.lineno) + 1)))) for f in functions]
    return [(name, length) for name, length in lengths if length > MAX_FUNCTION_LINES]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--check", action="store_true", help="fail where a file or a function is too long")
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    problems = []
    for file in sorted(options.folder.rglob("*.py")):
        source = file.read_text(encoding="utf-8")
        lines = code_lines(source)
        parent = file.relative_to(options.folder).parent.as_posix()
        counts[parent if parent.startswith(APART) else parent.split("/")[0]] += len(lines)
        if (height := source.count("\n")) > MAX_FILE_LINES:
            problems.append(f"{file} has {height} lines, more than {MAX_FILE_LINES}")
        problems += [
            f"{file}: {name} has {n} lines of code, more than {MAX_FUNCTION_LINES}"
            for name, n in long_functions(source, lines)
        ]
    for name, count in sorted(counts.items()):
        print(f"{name:24} {count:6}")
    print(f"{'total':24} {counts.total():6}\n{'without ' + APART:24} {counts.total() - counts[APART]:6}")
    print(*problems, sep="\n")
    return 1 if options.check and problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
