"""What code means: what an edit changes, what it does not, and that nothing that runs is missed."""

import textwrap
from pathlib import Path

import pytest

from longtail.workflow import meaning

BASE = {
    "a.py": '''
        from longtail import b
        from longtail.b import SCALE as by, helper
        import numpy as np

        LIMIT = 3

        def run(x: int) -> int:
            """What it does."""
            total = 0  # of all
            for one in range(LIMIT):
                total += b.helper(one) * by
            return np.abs(total)

        def unused():
            return b.other()
    ''',
    "b.py": """
        SCALE, OTHER = 2, 5

        def helper(value, *, by=SCALE):
            def inner(run):
                return run + by
            return inner(value)

        def other():
            return Unreached()

        class Unreached:
            pass
    """,
}


def program(folder: Path, files: dict[str, str], start: str = "longtail.a.run", stops: frozenset[str] = frozenset()):
    """(hash of the program from `start`, {definitions reached})."""
    folder = folder / str(len([*folder.iterdir()]))
    for name, text in files.items():
        path = folder / "longtail" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    reference = meaning.Package(folder, "longtail", stops).resolve(start)
    found = meaning.reached(reference.units)
    return meaning.program(found), {name for unit in found for name in unit.names or ["at import"]}


def changed(old: str, new: str, name: str = "a.py") -> dict[str, str]:
    assert old in BASE[name]
    return BASE | {name: BASE[name].replace(old, new)}


def test_only_what_is_reached_counts(tmp_path):
    assert program(tmp_path, BASE)[1] == {"run", "LIMIT", "helper", "SCALE", "OTHER"}


@pytest.mark.parametrize(
    "files",
    [
        changed("  # of all", ""),
        changed('"""What it does."""', '"""Something else."""\n            "and more"'),
        changed("x: int) -> int", "x: float)"),
        changed("total = 0", "total: int = 0"),
        changed("b.helper(one) * by", "(\n                    b.helper(\n                    one,  ) * by)"),
        changed("b.helper(one) * by", "helper(one) * b.SCALE"),
        changed("return b.other()", "return 7"),
        changed("class Unreached:", "class Unreached(int):", "b.py"),
        BASE | {"a.py": BASE["a.py"].replace("import numpy as np", "import numpy").replace("np.abs", "numpy.abs")},
        # other modules, other ways to name them
        BASE | {"a.py": BASE["a.py"].replace("from longtail import b", "from . import b")},
        BASE | {"a.py": BASE["a.py"].replace("from longtail import b\n", "\n").replace(
            "total = 0", "from longtail import b\n            total = 0")},
        BASE | {"a.py": BASE["a.py"].replace("from longtail import b", "import longtail.b").replace(
            "b.helper", "longtail.b.helper").replace("b.other", "longtail.b.other")},
    ],
)  # fmt: skip
def test_how_it_is_written_changes_nothing(tmp_path, files):
    assert program(tmp_path, files) == program(tmp_path, BASE)


@pytest.mark.parametrize(
    "files",
    [
        changed("LIMIT = 3", "LIMIT = 4"),
        changed("LIMIT = 3", "LIMIT = 3.0"),
        changed("total += ", "total -= "),
        changed("total = 0  # of all", "total = 0  # of all\n            b.other()"),
        changed("SCALE, OTHER = 2, 5", "SCALE, OTHER = 3, 5", "b.py"),
        changed("by=SCALE", "by=OTHER", "b.py"),
        changed("run + by", "run - by", "b.py"),
        changed("helper(value, *, by=SCALE)", "helper(value, by=SCALE)", "b.py"),
        changed("import numpy as np", "import torch as np"),
        BASE | {"b.py": BASE["b.py"] + "\n        SCALE = SCALE + 1\n"},
        BASE | {"b.py": BASE["b.py"] + "\n        print('loaded')\n"},
        # what packages around a module do when it is loaded
        BASE | {"__init__.py": "import os\nos.environ['A'] = '1'\n"},
        BASE | {"__init__.py": "from longtail import c\n", "c.py": "assert True\n"},
    ],
)
def test_what_it_does_changes_it(tmp_path, files):
    assert program(tmp_path, files)[0] != program(tmp_path, BASE)[0]


def test_a_definition_that_moves_means_the_same(tmp_path):
    first = BASE["a.py"].replace("from longtail import b", "from longtail.rooms import second as b")
    moved = {
        "rooms/first.py": first.replace("from longtail.b import SCALE as by, helper", "from longtail.rooms import by"),
        "rooms/second.py": BASE["b.py"].replace("SCALE, OTHER = 2, 5", "from longtail.ground import OTHER, SCALE"),
        "ground.py": "SCALE, OTHER = 2, 5",
    }
    moved["rooms/__init__.py"] = "from longtail.ground import SCALE as by"
    assert program(tmp_path, moved, "longtail.rooms.first.run") == program(tmp_path, BASE)


def test_two_of_one_name_are_told_apart(tmp_path):
    """Both are reached either way, and each line is as it was; the program is another."""
    text = "from longtail import b, c\ndef run():\n    b.check()\n    c.check()\n"
    checks = {"b.py": "def check():\n    return 1\n", "c.py": "def check():\n    return 2\n"}
    one = program(tmp_path, {"a.py": text} | checks)
    other = program(
        tmp_path, {"a.py": text.replace("    b.check()\n    c.check()", "    c.check()\n    b.check()")} | checks
    )
    assert one[1] == other[1] and one[0] != other[0]


def test_a_module_handed_on_may_be_asked_for_anything(tmp_path):
    files = {"a.py": "from longtail import b\ndef run(name):\n    return getattr(b, name)\n", "b.py": BASE["b.py"]}
    assert program(tmp_path, files)[1] >= {"helper", "other", "Unreached"}


def test_a_local_name_is_no_module(tmp_path):
    files = {
        "a.py": "from longtail import b\ndef run(b):\n    return b.other(), [b for b in b]\n",
        "b.py": BASE["b.py"],
    }
    assert program(tmp_path, files)[1] == {"run"}


def test_what_is_not_followed_is_named(tmp_path):
    files = {"a.py": "from longtail.b import helper\ndef run():\n    return helper(1)\n", "b.py": BASE["b.py"]}
    stops = frozenset({"longtail.b"})
    was = program(tmp_path, files, stops=stops)
    assert was[1] == {"run"}
    assert program(tmp_path, files | {"b.py": "def helper(value):\n    return 0\n"}, stops=stops) == was
    assert (
        program(tmp_path, files | {"a.py": files["a.py"].replace("helper(1)", "helper(2)")}, stops=stops)[0] != was[0]
    )


def test_files_beside_count_and_the_layout_of_cpp_does_not(tmp_path):
    files = {
        "a.py": "def run():\n    return open('k.cpp'), open('page.j2')\n",
        "k.cpp": '#include <x>\n#define A \\\n  1\nint f() { return "//no" [0] + A; } // why\n',
        "page.j2": "<p>",
    }
    was = program(tmp_path, files)
    assert was[1] == {"run", "k.cpp", "page.j2"}
    other = '#include <x>\n\n/* long\n story */\n#define A 1\nint f()\n{\n  return "//no"[0]+A;\n}\n'
    assert program(tmp_path, files | {"k.cpp": other}) == was
    assert program(tmp_path, files | {"k.cpp": other.replace("//no", "//yes")})[0] != was[0]
    assert program(tmp_path, files | {"k.cpp": other.replace("1\n", "1 ", 1)})[0] != was[0]
    assert program(tmp_path, files | {"page.j2": "<p> "})[0] != was[0]


ONE = "def helper():\n    return {}\n"
USE = "def run():\n    return helper()\n"
EITHER = "try:\n    from longtail.b import helper\nexcept ImportError:\n    from longtail.c import helper\n"
BOTH = """
def run(x):
    if x:
        from longtail.b import helper
    else:
        from longtail.c import helper
    return helper()
"""
METHODS = """
from longtail.b import helper
class run:
    def f(self):
        return helper()
    def g(self):
        from longtail.c import helper
        return helper()
"""
CLASS = """
class run:
    from longtail.b import helper
    def f(self):
        return self.helper()
"""
CHECKED = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    X = 0
else:
    from longtail.b import X
def run():
    return X
"""
EFFECT = "import os\nos.environ['A'] = '{}'\n"


@pytest.mark.parametrize(
    ("text", "name", "content"),
    [  # a module, and what is edited of what it uses: none of these edits was seen once
        (EITHER + USE, "b.py", ONE),
        (EITHER + USE, "c.py", ONE),
        ("from functools import cache\nfrom longtail.b import helper\nhelper = cache(helper)\n" + USE, "b.py", ONE),
        (BOTH, "b.py", ONE),
        (METHODS, "b.py", ONE),
        ("from longtail.b import helper\nclass run:\n    helper = staticmethod(helper)\n", "b.py", ONE),
        (CLASS, "b.py", ONE),
        ("from longtail.b import x\ndef run():\n    return [x for x in x]\n", "b.py", "x = (1, {})\n"),
        ("import longtail.c\ndef run():\n    return 1\n", "c.py", EFFECT),
        ("def run():\n    import longtail.c\n", "c.py", EFFECT),
        ("def run():\n    from longtail import p\n", "p/q.py", EFFECT),
        ("def run():\n    from longtail.r import helper\n", "r.py", EFFECT + "from longtail.b import helper\n"),
        ("from longtail import p\ndef run(n):\n    return getattr(p, n)\n", "p/q.py", ONE),
        ("from longtail import c\n" + USE, "c.py", "import os\nif os:\n    x = 1\n    os.umask({})\n"),
        (CHECKED, "b.py", "X = {}\n"),
        ("from longtail import m\ndef run():\n    return m.helper()\n", "m/__init__.py", ONE),
        ("def run():\n    return open('k.cpp')\n", "k.cpp", "int f(int a, int b) {{ return a {} b; }}\n"),
        ("def run():\n    return open('k.cpp')\n", "k.cpp", "#define A{}(x) +x\n"),
    ],
)
def test_no_way_to_import_hides_an_edit(tmp_path, text, name, content):
    files = {
        "__init__.py": "", "a.py": text, "b.py": ONE.format(1) + "x = (1, 2)\nX = 1\n", "c.py": ONE.format(10),
        "p/__init__.py": "from longtail.p.q import helper\n", "p/q.py": ONE.format(1), "m.py": ONE.format(1),
    }  # fmt: skip
    old, new = ("++ +", "+ ++") if "return a" in content else ("", " ") if "#define" in content else ("1", "2")
    was, now = (program(tmp_path, files | {name: content.format(part)}) for part in (old, new))
    assert was[0] != now[0] and was[1] == now[1]


def test_what_is_written_otherwise_there_is_no_edit(tmp_path):
    loose = "def run(x):\n    if x:\n        return 1\n    else:\n        pass\n"
    tight = "def run(x):\n    if x:\n        return 1\n"
    assert program(tmp_path, {"a.py": loose}) == program(tmp_path, {"a.py": tight})
    files = {"a.py": "def run():\n    return open('k.cpp')\n"}
    spaced, dense = "#define  A(x)   +x\nint f() { return a ++ + b; }  // x", "#define A(x) +x\nint f(){return a++ +b;}"
    assert program(tmp_path, files | {"k.cpp": spaced})[0] == program(tmp_path, files | {"k.cpp": dense})[0]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.py": "from longtail.b import *\n" + USE}, r"a\.py: import \* is not followed; name what is imported"),
        ({"a.py": "from longtail.p import helper\n" + USE, "p/helper.py": "X = 1\n", "p/q.py": ONE,
          "p/__init__.py": "from longtail.p.q import helper\n"}, "helper is imported, and a file has that name, too"),
        ({"a.py": "def run():\n    return open('k.cpp')\n", "k.cpp": '# include "k.h"\n'},
         r'k\.cpp: #include of "k\.h" is not followed; write it into this file'),
    ],
)  # fmt: skip
def test_what_nobody_could_follow_is_refused(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        program(tmp_path, {"__init__.py": "", "b.py": ONE.format(1)} | files)
