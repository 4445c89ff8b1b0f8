"""`.ci/house.py` says which of the house's figures is over its limit, and in which file."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).parent.parent / ".ci" / "house.py"
REASON = "# a reason\n"
GOOD = {
    "__init__.py": '"""A package."""\n',
    "_rule.py": f"{REASON}class Rule:\n    pass\n\n\nclass Exact(Rule):\n    pass\n",
    "lab/command.py": "def run(first, second):\n    first, second = second, first\n",
}
DENSE = "x = [[i * j + k for k in range(9) if k % 2 == 0] for i, j in enumerate(range(9)) if i]\n"
OVER = {
    "density of a file of the core": {"dense.py": REASON + DENSE},
    "density of the core": {"dense.py": REASON + DENSE, "denser.py": REASON + DENSE},
    "comments in the core, % of lines, at least": {
        "silent.py": "x = 1  # noqa\n" * 200
    },
    "packed assignments in the core, %": {
        "packed.py": REASON + "a, b = 1, 2\nb, a = a, b\n"
    },
    "columns of a line": {"models/wide.py": f"x = '{'-' * 96}'\n"},
    "lines of a function": {"lab/long.py": "def f():\n" + "    x = 1\n" * 70},
    "lines of a file": {"large.py": REASON * 451},
    "nodes of the lab": {f"lab/part_{i}.py": "x = [1, 2]\n" * 450 for i in range(13)},
    "nodes of lab/finetune": {
        f"lab/finetune/part_{i}.py": "x = [1, 2]\n" * 450 for i in range(4)
    },
    "lines with num_consts outside _programs": {
        "scans.py": REASON + "num_consts = 1\n" * 5,
        "_programs/scans.py": REASON + "num_consts = 1\n" * 5,
    },
    "isinstance on the class of a rule or of tangents": {
        "asking.py": REASON + "isinstance(1, (int, fx.Exact))\n" * 5,
    },
    "class names declared twice": {"lab/again.py": "class _Exact:\n    pass\n"},
}


def check(root: Path, files: dict[str, str]) -> tuple[int, str]:
    """The status of `house.py --check` in a small tree, and what it printed."""
    (root / ".ci").mkdir()
    shutil.copy(HOUSE, root / ".ci")
    for name, text in files.items():
        path = root / "src" / "forwax" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    command = [sys.executable, root / ".ci" / "house.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.stderr
    return done.returncode, done.stdout


def test_a_small_tree_passes(tmp_path):
    status, printed = check(tmp_path, GOOD)
    assert status == 0
    assert "over" not in printed


@pytest.mark.parametrize(("figure", "files"), OVER.items(), ids=OVER)
def test_a_figure_over_its_limit_is_named_with_the_file(tmp_path, figure, files):
    status, printed = check(tmp_path, GOOD | files)
    _, *sections = printed.split("\nover: ")
    over = dict(section.split("\n", 1) for section in sections)
    assert status == 1
    assert figure in over
    assert f"src/forwax/{next(iter(files))}:" in over[figure]


def test_lines_alone_do_not_break_the_limit_of_the_lab(tmp_path):
    status, printed = check(
        tmp_path, GOOD | {f"lab/part_{i}.py": "\n" * 450 for i in range(13)}
    )
    assert status == 0
    assert "over" not in printed
