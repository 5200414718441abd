"""What code means, apart from how it is written and where it lies: the ground of a stage's manifest.

Top-level definitions are followed from a start, by what each refers to, and written down without comments, docstrings,
annotations of functions and layout. A reference to another definition of the package stands there as a reference,
whatever it was imported as and from where: a definition that moves to another module means the same.

What it cannot see: an import by a name made at run time (the caller gives those as a start), a file that is opened by
such a name, the version of a dependency or of the compiler. A decorator or an assignment at module level with an effect
elsewhere is not looked for; a bare statement at module level is (it counts as soon as the module is loaded).
"""

import ast
import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
COMPOUND = (ast.If, ast.With, ast.Try, ast.For, ast.While, ast.Match)
LAYOUT = {"ctx", "kind", "type_comment", "type_ignores", "returns"}  # fields of a tree that change nothing at run time
MARK = "\0"  # around the number of a reference, where a unit's text has one
CPP_TOKEN = re.compile(
    r"""//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|\\\n|\n"""
    r"""|\#[ \t]*define[ \t]+\w+\(?"""  # whether a macro takes arguments is a matter of a space
    r"""|<<=|>>=|<=>|\.\.\.|->\*|::|\+\+|--|->|<<|>>|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|\#\#|\w+|[^\s\w]""",
    re.DOTALL,
)


@dataclass(frozen=True, eq=False)
class Unit:
    """A top-level statement, a whole script, or a file that is no Python: the smallest thing that a manifest names.

    Attributes:
        module: where it stands.
        names: what it binds there; none for a statement that only does something.
        node: its tree; None for a file that is no Python.
        content: of a file that is no Python.
    """

    module: "Module"
    names: tuple[str, ...]
    node: ast.AST | None
    content: str = ""

    @property
    def title(self) -> str:
        """What a manifest calls it: without its module, for it may move."""
        return ", ".join(self.names) or "at import"

    @cached_property
    def written(self) -> "Written":
        """Its text and what it refers to."""
        return Written(self.content) if self.node is None else Writer(self).write()

    @cached_property
    def digest(self) -> str:
        """12 hex digits of the SHA-256 of its own text, in which references are names."""
        text = self.written.with_references([reference.title for reference in self.written.references])
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Reference:
    """What a unit refers to in the package: `title` as it is called, `units` that it may be, `loads` for a module."""

    title: str
    units: tuple[Unit, ...] = ()
    loads: "Module | None" = None


@dataclass(frozen=True)
class Written:
    """A unit's text, with MARK number MARK for each of its references; and the modules that its imports load."""

    text: str
    references: tuple[Reference, ...] = ()
    loading: tuple["Module", ...] = ()

    def with_references(self, titles: list[str]) -> str:
        """The text with these in place of its references."""
        return re.sub(f"{MARK}(\\d+){MARK}", lambda found: f"@{titles[int(found[1])]}", self.text)


@dataclass(eq=False)
class Package:
    """The modules of a package below a folder, parsed when they are asked for.

    Args:
        root: the folder in which the package's own folder is.
        name: of the package.
        stops: dotted names of modules that are referred to and not followed.
        beside: suffixes of files that are no Python and count where a module of their folder names them.
    """

    root: Path
    name: str
    stops: frozenset[str] = frozenset()
    beside: tuple[str, ...] = (".cpp", ".j2", ".npz")
    modules: dict[str, "Module | None"] = field(default_factory=dict)

    def holding(self, dotted: str) -> "Module | None":
        """The module in which a dotted name is: the longest beginning of it that is a module."""
        while dotted and self.module(dotted) is None:
            dotted = dotted.rpartition(".")[0]
        return self.module(dotted) if dotted else None

    def module(self, name: str) -> "Module | None":
        """The module of this dotted name, or None when the package has none."""
        if name not in self.modules:
            path = self.root.joinpath(*name.split("."))
            files = [path / "__init__.py", path.with_suffix(".py")]  # a package goes before a module
            found = next((file for file in files if file.is_file()), None)
            inside = name == self.name or name.startswith(f"{self.name}.")
            self.modules[name] = Module(self, name, found) if inside and found else None
        return self.modules[name]

    def at(self, file: Path) -> "Module":
        """The module of a file: of the package, or a script elsewhere."""
        if file.is_relative_to(self.root / self.name):
            parts = file.relative_to(self.root).with_suffix("").parts
            module = self.module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
            assert module is not None
            return module
        return Module(self, file.stem, file)

    def resolve(self, dotted: str) -> "Reference | None":
        """What a dotted name means: a module, definitions of one, or None outside the package or where it is not there.

        A name that a module only imported is followed to where it is defined.
        """
        before, _, last = dotted.rpartition(".")
        around = self.module(before) if before else None
        module = self.module(dotted)
        if module is not None:
            assert around is None or around.imports is not None  # which refuses another thing of that name
            return Reference(last, loads=module)
        if (module := around) is None:
            return None
        units = tuple(unit for unit in module.units if last in unit.names)
        if units:
            return Reference(last, units=units)
        target = module.imports.get(last)
        return self.resolve(target) if target else None

    def stopped(self, reference: Reference) -> bool:
        """Whether a reference is into a module that is not followed."""
        modules = {unit.module for unit in reference.units} | ({reference.loads} if reference.loads else set())
        return any(module.name in self.stops for module in modules)


@dataclass(eq=False)
class Module:
    """A parsed module: what it imports, and its units."""

    package: Package
    name: str
    file: Path

    @cached_property
    def tree(self) -> ast.Module:
        """Its tree. Raises SyntaxError, which names the file."""
        return ast.parse(self.file.read_text(), str(self.file))

    @property
    def folder(self) -> str:
        """The dotted name that its relative imports start from."""
        return self.name if self.file.name == "__init__.py" else self.name.rpartition(".")[0]

    @cached_property
    def imports(self) -> dict[str, str]:
        """{local name: dotted name} of its own import statements, those in functions left out.

        Raises ValueError for what nothing here follows: `import *`, and a name that is also a file's of the folder.
        """
        found = imports(self.tree.body, self.folder)
        if "*" in found:
            raise ValueError(f"{self.file}: import * is not followed; name what is imported")
        if self.file.name == "__init__.py":
            for name, dotted in found.items():
                if dotted != f"{self.name}.{name}" and self.package.module(f"{self.name}.{name}") is not None:
                    raise ValueError(f"{self.file}: {name} is imported, and a file has that name, too; rename one")
        return found

    @cached_property
    def imported(self) -> list[str]:
        """The dotted names that its own import statements load, and definitions of those."""
        nodes = [
            node for node in _outside_definitions(self.tree.body) if isinstance(node, (ast.Import, ast.ImportFrom))
        ]
        return [dotted for node in nodes for dotted in targets(node, self.folder).values()]

    @cached_property
    def units(self) -> list[Unit]:
        """Its statements but for imports, docstrings and what only a script would do."""
        return [
            Unit(self, tuple(bound(statement)), statement)
            for statement in self.tree.body
            if not (isinstance(statement, (ast.Import, ast.ImportFrom)) or is_text(statement) or for_scripts(statement))
        ]

    @cached_property
    def whole(self) -> Unit:
        """All of it as one unit: a script."""
        return Unit(self, (self.file.name,), self.tree)

    @cached_property
    def beside(self) -> dict[str, Unit]:
        """Files in its folder that it may name: templates, kernels."""
        found = [path for path in self.file.parent.iterdir() if path.suffix in self.package.beside]
        return {path.name: Unit(self, (path.name,), None, without_layout(path)) for path in found}

    def at_import(self) -> Iterator[Unit]:
        """What loading it does beside binding names: its own bare statements, and those with others inside."""
        yield from (unit for unit in self.units if not unit.names or isinstance(unit.node, COMPOUND))

    def loaded(self) -> Iterator["Module"]:
        """The modules that loading it loads: those of the packages around it, and what it imports."""
        around = self.name.split(".")[:-1]
        names = (
            [".".join(around[: n + 1]) for n in range(len(around))] if self.name.startswith(self.package.name) else []
        )
        for dotted in [*names, *self.imported]:
            while dotted:
                module = self.package.module(dotted)
                if module is not None:
                    yield module
                    break
                dotted = dotted.rpartition(".")[0]


def imports(statements: Iterable[ast.stmt], folder: str) -> dict[str, str]:
    """{local name: dotted name} of import statements, also those inside `if`, `try` and `with`."""
    found: dict[str, str] = {}
    for node in _outside_definitions(statements):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            found |= targets(node, folder)
    return found


def targets(node: ast.Import | ast.ImportFrom, folder: str) -> dict[str, str]:
    """{local name, or the dotted one where it binds a part of that: dotted name} of one import statement."""
    if isinstance(node, ast.Import):
        return {alias.asname or alias.name: alias.name for alias in node.names}
    base = ".".join([*folder.split(".")[: len(folder.split(".")) - node.level + 1]]) if node.level else ""
    before = ".".join(part for part in (base, node.module or "") if part)
    return {alias.asname or alias.name: f"{before}.{alias.name}" for alias in node.names}


def _outside_definitions(statements: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """The nodes of statements, but for what is inside a function or class."""
    todo = list(statements)
    while todo:
        node = todo.pop(0)
        yield node
        if not isinstance(node, (*FUNCTIONS, *COMPREHENSIONS, ast.ClassDef)):
            todo[:0] = ast.iter_child_nodes(node)


def bound(statement: ast.AST) -> list[str]:
    """Names that a statement binds where it stands, imports included, in order."""
    names = []
    for node in _outside_definitions([statement]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.append(node.id)
        elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
            names.append(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names += [alias.asname or alias.name.split(".")[0] for alias in node.names]
    return [*dict.fromkeys(names)]


def is_text(statement: ast.stmt) -> bool:
    """Whether a statement is a docstring, or another constant that nobody reads."""
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def for_scripts(statement: ast.stmt) -> bool:
    """Whether a statement is `if __name__ == "__main__"`, or imports for type checkers, and has no `else`."""
    test = ast.unparse(statement.test) if isinstance(statement, ast.If) and not statement.orelse else ""
    return test.replace('"', "'") == "__name__ == '__main__'" or test in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def without_layout(path: Path) -> str:
    """The content of a file that is no Python; of C++, its tokens without comments and white space."""
    content = path.read_bytes()
    if path.suffix not in (".cpp", ".h", ".cu"):
        return hashlib.sha256(content).hexdigest()
    text, directive = [], False
    for token in CPP_TOKEN.findall(content.decode()):
        if token == "\n":  # ends a directive, and nothing else
            text += ["\n"] if directive else []
            directive = False
        elif token != "\\\n" and not token.startswith(("//", "/*")):
            if token.startswith('"') and text[-2:] == ["#", "include"]:
                raise ValueError(f"{path}: #include of {token} is not followed; write it into this file")
            directive = directive or token.startswith("#")
            token = " ".join(token.split()) if token.startswith("#") else token
            text.append(token)
    return " ".join(text)


class Writer:
    """Writes a unit's tree as text, with references for what it means in the package."""

    def __init__(self, unit: Unit):
        self.unit, self.package = unit, unit.module.package
        self.references: list[Reference] = []
        self.loading: list[Module] = []
        self.scopes: list[tuple[bool, set[str]]] = []  # (of a class, its own names), innermost last
        assert unit.node is not None
        # of all functions in it: a name that several of them import otherwise may be any of these
        self.own_imports: dict[str, list[str]] = {}
        for inner in ast.walk(unit.node):
            if isinstance(inner, (ast.Import, ast.ImportFrom)):
                for name, dotted in imports([inner], unit.module.folder).items():
                    self.own_imports.setdefault(name, []).append(dotted)

    def write(self) -> Written:
        """The text and the references."""
        node = self.unit.node
        assert node is not None
        text = self.block(node.body) if isinstance(node, ast.Module) else self.text(node)
        return Written(text, tuple(self.references), tuple(self.loading))

    def block(self, statements: Iterable[ast.stmt]) -> str:
        """Statements without those that do nothing."""
        written = (self.text(s) for s in statements if not (is_text(s) or isinstance(s, ast.Pass)))
        return f"[{','.join(text for text in written if text)}]"

    def text(self, node: ast.AST) -> str:
        """A node and all below it."""
        if isinstance(node, (ast.Name, ast.Attribute)):
            return self.reference(node)
        if isinstance(node, ast.Constant):
            if isinstance(node.value, str) and node.value in self.unit.module.beside:
                return self.refer(Reference(node.value, units=(self.unit.module.beside[node.value],)))
            return f"{type(node.value).__name__}:{node.value!r}"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            return self.load(node)
        if isinstance(node, FUNCTIONS):
            return self.function(node)
        if isinstance(node, ast.ClassDef):
            head = self.all([*node.decorator_list, *node.bases, *node.keywords])
            return self.inside(f"class {node.name}({head})", [node.body], bound_by(node.body), of_class=True)
        if isinstance(node, COMPREHENSIONS):
            names = set(bound(ast.Tuple([generator.target for generator in node.generators], ast.Store())))
            first = self.text(node.generators[0].iter)  # is looked up outside
            self.scopes.append((False, names))
            text = self.fields(node)
            self.scopes.pop()
            return f"{first}:{text}"
        if isinstance(node, ast.arg):
            return node.arg
        if isinstance(node, ast.AnnAssign):
            said = (
                ast.unparse(node.annotation) if self.scopes and self.scopes[-1][0] else ""
            )  # a dataclass reads its own
            if not (node.value or said):
                return ""
            plain = ast.Assign([node.target], node.value or ast.Constant(...))
            return self.fields(plain) + said
        return self.fields(node)

    def fields(self, node: ast.AST) -> str:
        """A node of which nothing special is known: its fields, without those that are empty."""
        parts = []
        for name, value in ast.iter_fields(node):
            if name in LAYOUT or value is None or value == []:
                continue
            if name in ("body", "orelse", "finalbody") and isinstance(value, list):
                shown = self.block(value)
                if shown == "[]" and name != "body":
                    continue
            elif isinstance(value, list):
                shown = f"[{self.all(value)}]"
            else:
                shown = self.text(value) if isinstance(value, ast.AST) else repr(value)
            parts.append(f"{name}={shown}")
        return f"{type(node).__name__}({','.join(parts)})"

    def all(self, nodes: Iterable[ast.AST | None]) -> str:
        """Nodes in their order."""
        return ",".join("None" if node is None else self.text(node) if isinstance(node, ast.AST) else repr(node)
                        for node in nodes)  # fmt: skip

    def function(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> str:
        """A function; decorators and defaults belong to what is around it."""
        given = node.args
        names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg) if a]
        shape = [
            len(given.posonlyargs),
            len(given.kwonlyargs),
            given.vararg and given.vararg.arg,
            given.kwarg and given.kwarg.arg,
        ]
        defaults = self.all([*given.defaults, *given.kw_defaults])
        if isinstance(node, ast.Lambda):
            return self.inside(f"lambda{names}{shape}({defaults})", [node.body], set(names))
        head = f"{type(node).__name__} {node.name}{names}{shape}({defaults})({self.all(node.decorator_list)})"
        return self.inside(head, [node.body], {*names, *bound_by(node.body)})

    def inside(
        self, head: str, bodies: list[list[ast.stmt] | ast.expr], names: set[str], of_class: bool = False
    ) -> str:
        """A body with names of its own."""
        self.scopes.append((of_class, names))
        text = "".join(self.text(body) if isinstance(body, ast.AST) else self.block(body) for body in bodies)
        self.scopes.pop()
        return head + text

    def load(self, node: ast.Import | ast.ImportFrom) -> str:
        """An import inside a function, a class or an `if`: what it names, and the modules that it loads.

        A module that it names is written where something of it is used.
        """
        found = []
        for target in targets(node, self.unit.module.folder).values():
            reference = self.package.resolve(target)
            if reference is None:
                found.append(f"!{target}")
                continue
            self.loading.append(reference.loads or reference.units[0].module)
            if (named := self.package.holding(target)) not in (None, self.loading[-1]):  # it is passed on there
                self.loading.append(named)
            found += [self.refer(reference)] if reference.loads is None else []
        return f"import({','.join(found)})" if found else ""

    def reference(self, node: ast.Name | ast.Attribute) -> str:
        """A name, or attributes of one: a reference where it means something of the package."""
        attributes: list[str] = []
        root: ast.expr = node
        while isinstance(root, ast.Attribute):
            attributes.insert(0, root.attr)
            root = root.value
        if not isinstance(root, ast.Name):
            assert isinstance(node, ast.Attribute)
            return f"{self.text(node.value)}.{node.attr}"
        rest = "".join(f".{attribute}" for attribute in attributes)
        if self.is_local(root.id):
            return root.id + rest
        meant = [self.imported(target, attributes) for target in self.own_imports.get(root.id, [])]
        units: tuple[Unit, ...] = ()
        if not isinstance(self.unit.node, ast.Module):
            units = tuple(unit for unit in self.unit.module.units if root.id in unit.names)
            if units and self.unit not in units:  # others of its module
                meant.append(self.refer(Reference(root.id, units=units)) + rest)
        if (not units or self.unit in units) and (target := self.unit.module.imports.get(root.id)):
            meant.append(self.imported(target, attributes))  # also where it is made anew of what was imported
        return "|".join(dict.fromkeys(meant)) or root.id + rest

    def imported(self, target: str, attributes: list[str]) -> str:
        """Attributes of what was imported: the longest that means something is a reference."""
        rest = "".join(f".{attribute}" for attribute in attributes)
        for used in range(len(attributes), -1, -1):
            reference = self.package.resolve(".".join([target, *attributes[:used]]))
            if reference is not None:
                return self.refer(reference) + "".join(f".{attribute}" for attribute in attributes[used:])
        return f"!{target}{rest}"

    def is_local(self, name: str) -> bool:
        """Whether a name is bound by a function around the place, or by the class whose body it is in and by nobody
        outside: a class may make something of its own of what has the same name there."""
        outside = name in self.unit.module.imports or any(name in unit.names for unit in self.unit.module.units)
        return any(
            name in names and not (of_class and outside)
            for n, (of_class, names) in enumerate(reversed(self.scopes)) if n == 0 or not of_class
        )  # fmt: skip

    def refer(self, reference: Reference) -> str:
        """The mark of a reference; of one that is not followed, its name."""
        if self.package.stopped(reference):
            return f"~{reference.title}"
        if reference.loads is not None:  # the module itself, which may be asked for anything
            imported = [self.package.resolve(dotted) for dotted in reference.loads.imports.values()]
            passed_on = [one for one in imported if one and not self.package.stopped(one)]
            units = [*reference.loads.units, *(unit for one in passed_on for unit in one.units)]
            reference = Reference(reference.title, units=tuple(dict.fromkeys(units)), loads=reference.loads)
        self.references.append(reference)
        return f"{MARK}{len(self.references) - 1}{MARK}"


def bound_by(body: Iterable[ast.stmt]) -> set[str]:
    """The names that a body binds, but for those that it imports or declares to be of the module."""
    elsewhere = {
        name
        for node in _outside_definitions(body)
        if isinstance(node, (ast.Global, ast.Nonlocal))
        for name in node.names
    }
    names = {name for statement in body for name in bound(statement)}
    return names - elsewhere - imports(body, "").keys()


def reached(start: Iterable[Unit]) -> list[Unit]:
    """The units of `start` and all that they refer to, in the order of their first mention; with what loading does."""
    order: dict[Unit, None] = dict.fromkeys(start)
    todo, seen = list(order), set()

    def add(units: Iterable[Unit]) -> None:
        new = [unit for unit in units if unit not in order]
        order.update(dict.fromkeys(new))
        todo.extend(new)

    while todo:
        unit = todo.pop(0)
        for reference in unit.written.references:
            add(reference.units)
        modules = [unit.module, *unit.written.loading]
        while modules:  # loading one loads others
            module = modules.pop()
            if module in seen or module.name in module.package.stops:
                continue
            seen.add(module)
            add(module.at_import())
            modules.extend(module.loaded())
    return list(order)


def program(units: list[Unit]) -> str:
    """The SHA-256 of reached units as one program: their texts in order, references as numbers of that order."""
    place = {unit: number for number, unit in enumerate(units)}
    texts = (
        unit.written.with_references(
            [
                " ".join([*(str(place[one]) for one in reference.units), "" if reference.loads else reference.title])
                for reference in unit.written.references
            ]
        )
        for unit in units
    )
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()
