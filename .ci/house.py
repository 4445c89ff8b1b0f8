"""The house's figures beside their limits, for the tree that this file lies in.

`python .ci/house.py` prints them, and where those stand that are over; with `--check` it exits with
1 if there are any. Standard library alone.

Nodes are all that `ast.walk` gives. A code line holds a token other than a comment, outside
docstrings and other bare strings. Density is nodes for each code line. The core is `src/forwax`
without `lab` and `models`; `lm` and `adapters` are held to the same limits.
"""

import argparse
import ast
import dataclasses
import io
import sys
import tokenize
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeGuard

COMMENTS = "comments in the core, % of lines, at least"
LAB = ("lines of the lab", "nodes of the lab")
GAINED = "nodes of lab/"

# Limits are only ever tightened. All are upper ones, but for the share of comments.
LIMITS: dict[str, float] = {
    "density of the core": 9.5,
    "density of a file of the core": 12,
    COMMENTS: 2,
    "packed assignments in the core, %": 1,
    "columns of a line": 100,
    "lines of a function": 70,
    "lines of a file": 450,
    # One of the two is enough. With the abilities of 0.1.0 the lab had 35,981 nodes; what its
    # commands have gained since, in files of theirs, is the rest.
    "lines of the lab": 5_800,
    "nodes of the lab": 36_545,
    # Abilities gained since: packages and modules with limits of their own, not counted above.
    f"{GAINED}data/elsewhere": 450,
    f"{GAINED}keeping": 6_000,
    f"{GAINED}commands/completion": 49,
    f"{GAINED}options/completion": 44,
    f"{GAINED}commands/finetune": 140,
    f"{GAINED}options/finetune": 557,
    f"{GAINED}catalogue/menu": 421,
    f"{GAINED}compare/lost": 280,
    f"{GAINED}terminal": 749,
    f"{GAINED}texts": 2_650,
    f"{GAINED}training/divergence": 256,
    f"{GAINED}finetune": 8_316,
    f"{GAINED}distributed": 5_079,
    "lines with num_consts outside _programs": 4,
    "isinstance on the class of a rule or of tangents": 4,
    "class names declared twice": 0,
}

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "forwax"
FOR_A_TOOL = ("noqa", "type:", "pyright", "fmt", "!", "pragma")
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


@dataclasses.dataclass(frozen=True)
class Source:
    """A file of the package, read and counted."""

    path: Path
    lines: list[str]
    nodes: list[ast.AST]
    num_code_lines: int
    num_comments: int

    @property
    def part(self) -> str:
        """The module or package straight under `forwax` in which the file lies."""
        return self.path.relative_to(PACKAGE).parts[0]

    @property
    def density(self) -> float:
        """Nodes for each code line."""
        return len(self.nodes) / max(self.num_code_lines, 1)

    def at(self, line: int = 1) -> str:
        """A place in the file, as editors open it."""
        return f"{self.path.relative_to(ROOT).as_posix()}:{line}"


@dataclasses.dataclass(frozen=True)
class Figure:
    """A name of `LIMITS`, what was counted, and where: the places to look at if that is over."""

    name: str
    value: float
    places: Sequence[str]

    @property
    def is_over(self) -> bool:
        """Whether the value is on the wrong side of its limit."""
        limit = LIMITS[self.name]
        return self.value < limit if self.name == COMMENTS else self.value > limit


def read(path: Path) -> Source:
    """Parse and count one file."""
    text = path.read_text(encoding="utf-8")
    nodes = list(ast.walk(ast.parse(text)))
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    comments = [
        token.string.strip("# ") for token in tokens if token.type == tokenize.COMMENT
    ]
    code = {
        line
        for token in tokens
        if token.type not in NO_CODE
        for line in range(token.start[0], token.end[0] + 1)
    }
    for node in nodes:
        if is_bare_string(node):
            code.difference_update(lines_of(node))
    return Source(
        path=path,
        lines=text.splitlines(),
        nodes=nodes,
        num_code_lines=len(code),
        num_comments=sum(not comment.startswith(FOR_A_TOOL) for comment in comments),
    )


def is_bare_string(node: ast.AST) -> TypeGuard[ast.Expr]:
    """Whether it is a docstring, or another string that nothing reads."""
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
        return False
    return isinstance(node.value.value, str)


def lines_of(statement: ast.stmt) -> range:
    """The numbers of the lines on which a statement stands."""
    return range(statement.lineno, (statement.end_lineno or statement.lineno) + 1)


def all_figures(sources: Sequence[Source]) -> list[Figure]:
    """The figures of `LIMITS`, in their order."""
    core = [source for source in sources if source.part not in ("lab", "models")]
    return [
        density(core),
        greatest("density of a file of the core", [(s.density, s.at()) for s in core]),
        share_of_comments(core),
        share_of_packed_assignments(core),
        longest_line(sources),
        longest_function(sources),
        greatest("lines of a file", [(len(s.lines), s.at()) for s in sources]),
        *size_of_lab(sources),
        scan_layouts(sources),
        class_questions(sources),
        names_declared_twice(sources),
    ]


def density(core: Sequence[Source]) -> Figure:
    """Nodes for each code line of all files together."""
    name = "density of the core"
    num_nodes = sum(len(source.nodes) for source in core)
    num_code_lines = sum(source.num_code_lines for source in core)
    dense = [(s.density, s.at()) for s in core if s.density > LIMITS[name]]
    return Figure(name, num_nodes / max(num_code_lines, 1), worst(dense))


def share_of_comments(core: Sequence[Source]) -> Figure:
    """Comments for readers, not for tools, as a share of lines."""
    share = LIMITS[COMMENTS] / 100
    num_lines = sum(len(source.lines) for source in core)
    num_comments = sum(source.num_comments for source in core)
    missing = [(len(s.lines) * share - s.num_comments, s.at()) for s in core]
    places = worst((number, place) for number, place in missing if number > 0)
    return Figure(COMMENTS, percent(num_comments, num_lines), places)


def share_of_packed_assignments(core: Sequence[Source]) -> Figure:
    """Assignments such as `a, b = c, d`, as a share of all; swaps and unpacking are none."""
    assignments = [
        (s, node) for s in core for node in s.nodes if isinstance(node, ast.Assign)
    ]
    places = [source.at(node.lineno) for source, node in assignments if is_packed(node)]
    share = percent(len(places), len(assignments))
    return Figure("packed assignments in the core, %", share, places)


def is_packed(assignment: ast.Assign) -> bool:
    """Whether names and values stand side by side, and are no swap."""
    several = (ast.Tuple, ast.List)
    if not isinstance(assignment.value, several):
        return False
    values = sorted(ast.unparse(element) for element in assignment.value.elts)
    return any(
        isinstance(target, several)
        and sorted(ast.unparse(element) for element in target.elts) != values
        for target in assignment.targets
    )


def longest_line(sources: Sequence[Source]) -> Figure:
    """Columns of the longest line."""
    widths = [
        (len(line), source.at(number))
        for source in sources
        for number, line in enumerate(source.lines, start=1)
    ]
    return greatest("columns of a line", widths)


def longest_function(sources: Sequence[Source]) -> Figure:
    """Lines of the longest function."""
    lengths = [
        (num_lines(node, source), source.at(node.lineno))
        for source in sources
        for node in source.nodes
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return greatest("lines of a function", lengths)


def num_lines(function: ast.FunctionDef | ast.AsyncFunctionDef, source: Source) -> int:
    """Lines of a function, its docstring and blank lines aside."""
    first = function.body[0]
    docstring = lines_of(first) if is_bare_string(first) else ()
    texts = [
        source.lines[line - 1] for line in lines_of(function) if line not in docstring
    ]
    return sum(bool(text.strip()) for text in texts)


def size_of_lab(sources: Sequence[Source]) -> list[Figure]:
    """Lines and nodes, and nodes of each gained package, the largest files first."""
    packages = [name for name in LIMITS if name.startswith(GAINED)]
    gained = {
        name: [s for s in sources if is_of(s, name.removeprefix(GAINED))]
        for name in packages
    }
    elsewhere = [source for files in gained.values() for source in files]
    lab = [s for s in sources if s.part == "lab" and s not in elsewhere]
    lines = [(len(source.lines), source.at()) for source in lab]
    nodes = [(len(source.nodes), source.at()) for source in lab]
    return [
        Figure(name, sum(size for size, _ in sizes), worst(sizes))
        for name, sizes in zip(LAB, (lines, nodes), strict=True)
    ] + [
        Figure(
            name,
            sum(len(source.nodes) for source in files),
            worst((len(source.nodes), source.at()) for source in files),
        )
        for name, files in gained.items()
    ]


def is_of(source: Source, part: str) -> bool:
    """Whether a file is a module of the lab, or lies in a package of it."""
    path = source.path.relative_to(PACKAGE).as_posix()
    return path == f"lab/{part}.py" or path.startswith(f"lab/{part}/")


def scan_layouts(sources: Sequence[Source]) -> Figure:
    """Lines that reckon with a scan's order of operands, which `_programs` alone should know."""
    places = [
        source.at(number)
        for source in sources
        if source.part != "_programs"
        for number, line in enumerate(source.lines, start=1)
        if "num_consts" in line
    ]
    return Figure("lines with num_consts outside _programs", len(places), places)


def class_questions(sources: Sequence[Source]) -> Figure:
    """Calls that ask for the class of a rule or of tangents, where the value should be asked."""
    classes = derived(sources, {"Rule", "Tangents"})
    calls = [
        (s, node) for s in sources for node in s.nodes if isinstance(node, ast.Call)
    ]
    lines = {
        source.at(call.lineno)
        for source, call in calls
        if last_name(call.func) in ("isinstance", "issubclass")
        and classes.intersection(map(last_name, ast.walk(call.args[1])))
    }
    places = sorted(lines)
    return Figure(
        "isinstance on the class of a rule or of tangents", len(places), places
    )


def derived(sources: Sequence[Source], classes: set[str]) -> set[str]:
    """The names of the given classes and of all that derive from them."""
    more = {
        node.name
        for _, node in declarations(sources)
        if classes.intersection(map(last_name, node.bases))
    }
    return classes if more <= classes else derived(sources, classes | more)


def last_name(expression: ast.AST) -> str:
    """The last of the names of `Rule`, `forwax.Rule` or `Rule[Any]`; nothing for what has none."""
    if isinstance(expression, ast.Subscript):
        return last_name(expression.value)
    if isinstance(expression, ast.Attribute):
        return expression.attr
    return expression.id if isinstance(expression, ast.Name) else ""


def names_declared_twice(sources: Sequence[Source]) -> Figure:
    """Class names that are declared more than once, underscores in front aside."""
    places: dict[str, list[str]] = {}
    for source, node in declarations(sources):
        places.setdefault(node.name.lstrip("_"), []).append(source.at(node.lineno))
    twice = [
        f"{name}: {', '.join(found)}"
        for name, found in places.items()
        if len(found) > 1
    ]
    return Figure("class names declared twice", len(twice), twice)


def declarations(sources: Sequence[Source]) -> list[tuple[Source, ast.ClassDef]]:
    """Every class statement."""
    return [
        (s, node) for s in sources for node in s.nodes if isinstance(node, ast.ClassDef)
    ]


def greatest(name: str, values: Sequence[tuple[float, str]]) -> Figure:
    """The greatest of some values, and the places of all that are over the limit."""
    over = [(value, place) for value, place in values if value > LIMITS[name]]
    return Figure(name, max((value for value, _ in values), default=0), worst(over))


def worst(values: Iterable[tuple[float, str]]) -> list[str]:
    """Places with their values, the greatest first."""
    return [f"{place} ({value:,.4g})" for value, place in sorted(values, reverse=True)]


def percent(part: int, whole: int) -> float:
    """A share in per cent."""
    return 100 * part / max(whole, 1)


def over_limit(figures: Sequence[Figure]) -> list[Figure]:
    """The figures that are over; those of the lab only where both are."""
    over = [figure for figure in figures if figure.is_over]
    names = [figure.name for figure in over]
    if all(name in names for name in LAB):
        return over
    return [figure for figure in over if figure.name not in LAB]


def main() -> int:
    """Print the figures; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 when a figure is over"
    )
    check = parser.parse_args().check
    figures = all_figures([read(path) for path in sorted(PACKAGE.rglob("*.py"))])
    over = over_limit(figures)
    for figure in figures:
        mark = "  over" if figure in over else ""
        print(
            f"{figure.name:<50}{figure.value:>10,.2f}  of {LIMITS[figure.name]:>9,}{mark}"
        )
    for figure in over:
        print(f"\nover: {figure.name}", *figure.places, sep="\n  ")
    return int(check and bool(over))


if __name__ == "__main__":
    sys.exit(main())
