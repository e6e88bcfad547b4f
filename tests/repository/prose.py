"""
Count expressions that make comments hard to read, per 1,000 words of prose.

    python -m tests.repository.prose [--show] [PATH ...]      (from the root of the project)

Prose is the text of comments, docstrings and Markdown. The command prints one line per group of
files; with --show it also prints each sentence that contains a listed expression (a hit). A hit is
only a hint, because some uses of these expressions are plain English.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

GROUPS = (
    "django_tasks_local",
    "django_tasks_local_sse/static",
    "django_tasks_local_sse",
    "tests",
    "benchmarks",
    "stress",
    "example.py",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs",
)

# Regular expressions of words with which a sentence often leaves out its actor, object or time.
EXPRESSIONS = (
    (
        r"(?:who|whoever)(?= (?:reads|begins|has|is|comes|cancels|sees|asks|waits|polls|stays|never"
        r"|listens|may|changes|was|hears|closes)\b)"
    ),
    (
        r"what(?:ever)? (?:is|was|were|comes|came|has|have|had|it|they|a|an|the|you|does|did|can"
        r"|cannot|may|must|runs|reporters|readers|workers|others?|follows|waits)\b"
    ),
    r"(?:tell|tells|told|telling|say|says|said)\b",
    r"(?:hear|hears|heard)\b",
    r"look(?:s|ed)?\b",
    r"(?:just now|meanwhile|in the meantime|in the midst|by then|from here on|very moment)\b",
    r"in mid-\b",
    r"any more\b",
    r"(?:nobody|somebody|everybody|anybody)\b",
    r"so (?:many|long|much)\b",
    r"(?:for ever|for good|round and round|on (?:its|their) way|goes? on|gone|anew)\b",
)
PATTERN = re.compile(rf"\b(?:{'|'.join(EXPRESSIONS)})", re.IGNORECASE)


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class Count:
    """Counts the words of a group; keeps its sentences with hits as (place, sentence, hits)."""

    words: int = 0
    sentences: list[tuple[str, str, int]] = field(default_factory=list)

    @property
    def hits(self) -> int:
        return sum(hits for _, _, hits in self.sentences)

    @property
    def per_thousand(self) -> float:
        return 1000 * self.hits / max(self.words, 1)

    def add(self, place: str, text: str) -> None:
        """Add the words of a text to the count, and keep its sentences that contain hits."""
        for sentence in re.split(r"(?<=[.!?]) ", " ".join(text.split())):
            self.words += len(sentence.split())
            if hits := len(PATTERN.findall(sentence)):
                self.sentences.append((place, sentence, hits))


def python_texts(source: str) -> Iterator[tuple[int, str]]:
    """Yield the docstrings and blocks of comments in Python code, each with its line number."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
            yield node.body[0].lineno, text
    lines = source.splitlines()
    block: list[str] = []
    first, last = 0, -2
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or token.string.startswith(("# noqa", "# type:")):
            continue
        row = token.start[0]
        fills_line = lines[row - 1].lstrip().startswith("#")
        if not (fills_line and row == last + 1):
            if block:
                yield first, " ".join(block)
            block, first = [], row
        block.append(token.string.lstrip("# "))
        last = row if fills_line else -2
    if block:
        yield first, " ".join(block)


def script_texts(source: str) -> Iterator[tuple[int, str]]:
    """Yield the comments in JavaScript or CSS, each with the number of its first line."""
    for match in re.finditer(r"/\*.*?\*/|//[^\n]*", source, re.DOTALL):
        yield source.count("\n", 0, match.start()) + 1, match.group()


def markdown_texts(source: str) -> Iterator[tuple[int, str]]:
    """Yield the paragraphs of Markdown outside of code blocks, each with its line number."""
    text = re.sub(r"```.*?```", lambda match: "\n" * match[0].count("\n"), source, flags=re.DOTALL)
    for match in re.finditer(r"(?:[^\n]+\n?)+", text):
        yield text.count("\n", 0, match.start()) + 1, match[0]


READERS = {
    ".py": python_texts,
    ".js": script_texts,
    ".css": script_texts,
    ".md": markdown_texts,
}


def count_prose(root: Path, paths: Iterable[Path]) -> dict[str, Count]:
    """Count words and hits in the given files and folders, by the group of each file."""
    counts: dict[str, Count] = {}
    for top in paths:
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            if path.suffix not in READERS or not path.is_file() or path.is_symlink():
                continue
            relative = path.relative_to(root)
            count = counts.setdefault(_group(relative), Count())
            for line, text in READERS[path.suffix](path.read_text(encoding="utf-8")):
                count.add(f"{relative}:{line}", text)
    return counts


def _group(path: Path) -> str:
    """Return the first group that contains this path, or the first folder of the path."""
    groups = (group for group in GROUPS if path.is_relative_to(group))
    return next(groups, path.parts[0])


def report(count: Count) -> str:
    """Return the sentences with hits, one per line, each after its file and line number."""
    return "\n".join(f"{place}: {sentence}" for place, sentence, _ in count.sentences)


def main(*arguments: str) -> None:
    """Print the counts of the paths on the command line, or of GROUPS if there are none."""
    root = Path.cwd()
    names = [name for name in arguments if name != "--show"] or GROUPS
    counts = count_prose(root, [root / name for name in names])
    for name, count in counts.items():
        if "--show" in arguments and count.sentences:
            sys.stdout.write(report(count) + "\n")
        line = f"{name:28} {count.words:6} words  {count.per_thousand:5.1f} per 1,000\n"
        sys.stdout.write(line)


if __name__ == "__main__":
    main(*sys.argv[1:])
