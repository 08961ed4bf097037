"""What STYLE asks of the whole tree: the arrows between packages, and documentation that runs."""

import ast
from pathlib import Path

import pytest

from tests.support.commands import COMMANDS
from tests.support.room_tables import ALLOWED_ROOMS, PACKAGES, PAGE, arrow_table, room_table

ROOT = Path(__file__).parents[2]
MOST_MODULES_IN_A_FOLDER = 15


def modules_of(package):
    return sorted((ROOT / package).rglob("*.py"))


def imports_of(path):
    """Full names of everything a module imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


ALL_IMPORTS = [
    (path.relative_to(ROOT), name)
    for package in PACKAGES
    for path in modules_of(package)
    for name in imports_of(path)
]


def room_of(module):
    """The room of a module, or the module itself where it stands in its package."""
    return ".".join(module.split(".")[:2])


def test_packages_import_only_the_rooms_that_they_may():
    for path, name in ALL_IMPORTS:
        package = name.partition(".")[0]
        if package in PACKAGES and package != path.parts[0]:
            allowed = ALLOWED_ROOMS[path.parts[0]].get(package, ())
            assert room_of(name).partition(".")[2] in allowed, f"{path} imports {name}"


def test_the_tour_of_the_code_has_the_tables_of_rooms_and_arrows():
    page = PAGE.read_text()  # python -m tests.support.room_tables writes them
    assert room_table() in page
    assert arrow_table() in page


def first_circle(graph):
    """A circle of a graph {node: nodes it points to}, or None."""
    finished, trail = set(), []

    def visit(node):
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node in finished:
            return None
        trail.append(node)
        found = next(filter(None, map(visit, sorted(graph.get(node, ())))), None)
        trail.pop()
        finished.add(node)
        return found

    return next(filter(None, map(visit, sorted(graph))), None)


def import_graph():
    """{module: modules of the project that it imports when it runs}"""
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in PACKAGES
        for path in modules_of(package)
    }
    graph = {}
    for module, path in modules.items():
        for node in nodes_that_run(path):
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found = {name if name in modules else node.module for name in names}
                graph.setdefault(module, set()).update(found & modules.keys() - {module})
    return graph


def nodes_that_run(path):
    """All nodes of a module but those under `if TYPE_CHECKING`."""
    waiting = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            waiting.extend(ast.iter_child_nodes(node))


def test_a_circle_is_found():
    assert first_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert first_circle({"a": {"b", "c"}, "b": {"c"}}) is None


def test_imports_make_no_circle_of_files_or_rooms():
    files = import_graph()
    assert first_circle(files) is None
    rooms = {}
    for module, imported in files.items():
        others = {room_of(name) for name in imported} - {room_of(module)}
        rooms.setdefault(room_of(module), set()).update(others)
    assert first_circle(rooms) is None


def test_a_folder_holds_few_modules_one_level_below_its_package():
    for package in PACKAGES:
        folders = {}
        for path in modules_of(package):
            assert len(path.relative_to(ROOT).parts) <= 3, path
            if path.name != "__init__.py":
                folders.setdefault(path.parent, []).append(path)
        for folder, modules in folders.items():
            assert len(modules) <= MOST_MODULES_IN_A_FOLDER, folder


def test_accelerate_and_deepspeed_appear_only_in_the_engine():
    for path, name in ALL_IMPORTS:
        if name.partition(".")[0] in ("accelerate", "deepspeed"):
            assert path.parts[:2] == ("pretrain", "distributed"), f"{path} imports {name}"


def test_nothing_imports_a_command():
    for path, name in ALL_IMPORTS:
        assert name not in COMMANDS, f"{path} imports {name}"


def test_data_prep_starts_without_torch():
    for path, name in ALL_IMPORTS:
        if path.parts[0] == "data_prep":
            assert name.partition(".")[0] not in ("torch", "transformers", "timm"), path


@pytest.mark.parametrize("word", ["utils", "helpers", "common", "misc"])
def test_every_module_has_a_home(word):
    assert not [path for package in PACKAGES for path in modules_of(package) if path.stem == word]


def test_every_module_says_what_it_is_for():
    for package in PACKAGES:
        for path in modules_of(package):
            assert ast.get_docstring(ast.parse(path.read_text())), path


def test_sources_are_plain_ascii():
    for package in (*PACKAGES, "configs", "tests"):
        for path in (ROOT / package).rglob("*"):
            if path.suffix in (".py", ".yaml", ".json"):
                path.read_text(encoding="ascii")
