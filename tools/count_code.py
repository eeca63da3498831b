"""Count lines of code without docstrings, comments and blank lines. Needs only the standard library.

python tools/count_code.py gflowtrl            # each package, and the total with and without data/formats
python tools/count_code.py gflowtrl --check    # also fail if a file or a function is too long
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
SEPARATE = "data/formats"  # the total is printed with and without it
_LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DOCUMENTED = (ast.Module, ast.ClassDef, *FUNCTIONS)


def code_lines(source: str) -> set[int]:
    """Return the numbers of the lines with code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node):
            lines.difference_update(line_range(node.body[0]))
    return lines


def line_range(node: ast.AST) -> range:
    """Return the line numbers of a node."""
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def long_functions(source: str, lines: set[int]) -> list[tuple[str, int]]:
    """Return the functions with more than `MAX_FUNCTION_LINES` lines of code, with these numbers."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, FUNCTIONS)]
    lengths = [(function.name, len(lines.intersection(line_range(function)))) for function in functions]
    return [(name, length) for name, length in lengths if length > MAX_FUNCTION_LINES]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--check", action="store_true", help="fail if a file or a function is too long")
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    problems = []
    for file in sorted(options.folder.rglob("*.py")):
        source = file.read_text(encoding="utf-8")
        lines = code_lines(source)
        parent = file.relative_to(options.folder).parent.as_posix()
        counts[parent if parent.startswith(SEPARATE) else parent.split("/")[0]] += len(lines)
        if (length := source.count("\n")) > MAX_FILE_LINES:
            problems.append(f"{file} has {length} lines, more than {MAX_FILE_LINES}")
        problems += [
            f"{file}: {name} has {n} lines of code, more than {MAX_FUNCTION_LINES}"
            for name, n in long_functions(source, lines)
        ]
    for name, count in sorted(counts.items()):
        print(f"{name:24} {count:6}")
    print(f"{'total':24} {counts.total():6}\n{'without ' + SEPARATE:24} {counts.total() - counts[SEPARATE]:6}")
    print(*problems, sep="\n")
    return 1 if options.check and problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
