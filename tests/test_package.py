"""The whole package: fast to import, layered, with complete requirements and without unpickling."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import gflowtrl
from gflowtrl import compat


PACKAGE = Path(gflowtrl.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}

#: Files that exports contain -> the libraries that they may import.
STANDALONE = {
    "onnx_recommender.py": {"numpy", "onnxruntime"},
    "gflowtrl_tree.py": {"numpy", "torch"},
    "gflowtrl_vllm.py": {"gflowtrl_tree", "torch", "vllm"},
    "example.py": {"gflowtrl_tree", "gflowtrl_vllm"},
}

# A package may import from its own layer and from earlier ones.
LAYERS = (
    {"checks", "compat", "configuration", "files", "finite", "hub", "lazy", "trunks"},
    {"catalog"},
    {"data", "policy", "semantic_ids", "teachers"},
    {"rewards", "samplers", "losses", "metrics"},
    {"trainer", "recommender", "recommendation", "ensemble", "request", "catalog_change", "new_tokens"},
    {"pipeline", "serving", "export", "demo"},
    {"cli", "__main__"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
TRAINING_PACKAGES = {"trainer", "pipeline", "cli"}  # may import trl


def package_of(path: Path) -> str:
    """Return the first part of a module's path in gflowtrl: the name of its package, or of a single module."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path: Path) -> list[str]:
    """Return the absolute dotted names of all imports of a module, including those in functions and TYPE_CHECKING."""
    package = ["gflowtrl", *path.relative_to(PACKAGE).parent.parts]
    names = []
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


def test_importing_the_package_loads_no_library_and_opens_no_connection():
    code = (
        "import socket, sys\n"
        "def refuse(*_, **__): raise AssertionError('a connection was opened')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "import gflowtrl; dir(gflowtrl); gflowtrl.__version__\n"
        "heavy = {'torch', 'trl', 'transformers', 'numpy', 'datasets', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_losses_depend_on_tensors_only():
    for path in MODULES:
        if package_of(path) == "losses":
            allowed = ("gflowtrl.losses", "gflowtrl.checks")
            others = [n for n in imports_of(path) if n.startswith("gflowtrl.") and not n.startswith(allowed)]
            assert not others, f"{path} imports {others}"


@pytest.mark.parametrize("name", [name for name in gflowtrl.__all__ if name != "__version__"])
def test_every_public_name_exists_and_is_documented(name):
    assert getattr(gflowtrl, name).__doc__


def test_an_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        _ = gflowtrl.Trainer


def test_imports_go_in_one_direction():
    graph: dict[str, set[str]] = {}
    for path in MODULES:
        package = package_of(path)
        if package == "__init__":
            continue
        assert package in LEVEL, f"{path} is not in a layer; add {package} to LAYERS"
        for name in imports_of(path):
            parts = name.split(".")
            if parts[0] != "gflowtrl" or len(parts) == 1 or parts[1] == package:
                continue
            imported = parts[1]
            assert imported in LEVEL, f"{path} imports {name} from gflowtrl; import it from its own package"
            assert LEVEL[imported] <= LEVEL[package], f"{path} imports {name}, whose layer comes later in LAYERS"
            graph.setdefault(package, set()).add(imported)
    TopologicalSorter(graph).prepare()  # packages of one layer may import each other, but not in a cycle


def test_no_import_cycles_between_files():
    """Imports in functions and for annotations count too."""
    files = {".".join(["gflowtrl", *path.relative_to(PACKAGE).with_suffix("").parts]): path for path in MODULES}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    graph: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        for used in imports_of(path):
            while used not in files and "." in used:  # `gflowtrl.losses.get_loss` is read from `gflowtrl.losses`
                used = used.rpartition(".")[0]
            if used in files:
                graph[name].add(used)
    TopologicalSorter(graph).prepare()


def test_trl_is_imported_by_training_code_only():
    of_trl = {f"gflowtrl.compat.{name}" for name, (module, _) in compat.NAMES.items() if module.startswith("trl.")}
    for path in MODULES:
        if package_of(path) not in TRAINING_PACKAGES | {"compat"}:  # compat imports it on the use of such a name
            assert not [n for n in imports_of(path) if n.split(".")[0] == "trl" or n in of_trl], path


def test_importing_the_package_changes_no_logger():
    code = (
        "import logging\n"
        "def refuse(*_): raise AssertionError('a logger was changed')\n"
        "logging.Logger.setLevel = logging.Logger.addHandler = logging.Logger.addFilter = refuse\n"
        "logging.disable = logging.basicConfig = refuse\n"
        "import gflowtrl, gflowtrl.compat, gflowtrl.cli; dir(gflowtrl)\n"
        "named = [name for name in logging.root.manager.loggerDict if not name.startswith('gflowtrl')]\n"
        "assert not named, named\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_type_checkers_see_every_public_name():
    (branch,) = (node for node in TREES[PACKAGE / "__init__.py"].body if isinstance(node, ast.If))
    imported = {alias.name: node.module for node in branch.body for alias in node.names}
    assert imported == gflowtrl._HOMES
    assert gflowtrl.__all__ == sorted(gflowtrl.__all__) and set(gflowtrl.__all__) == {"__version__", *imported}
    assert (PACKAGE / "py.typed").is_file()


def test_imported_libraries_are_required():
    setup = configparser.ConfigParser()
    setup.read(PACKAGE.parent / "setup.cfg")
    if "options" not in setup:
        pytest.skip("setup.cfg does not exist: an installed copy is tested")
    required = {re.split(r"[<>=!]", line)[0].lower() for line in setup["options"]["install_requires"].split()}
    renamed = {"pyyaml": "yaml", "huggingface-hub": "huggingface_hub", "scikit-learn": "sklearn"}
    required = {renamed.get(name, name) for name in required}
    used = {name.split(".")[0] for path in MODULES for name in imports_of(path) if path.name not in STANDALONE}
    extras = setup["options.extras_require"]
    (extra,), serving, demo = (
        {re.split(r"[<>=!]", line)[0] for line in extras[name].split()} for name in ("deepspeed", "serve", "demo")
    )
    assert used - set(sys.stdlib_module_names) - {"gflowtrl"} <= required | serving | demo | {extra}
    for path in MODULES:  # libraries of the server and of the page are imported in their packages only
        names = {name.split(".")[0] for name in imports_of(path)}
        assert package_of(path) == "serving" or not serving & names, path
        assert package_of(path) == "demo" or not demo & names, path
    for tree in TREES.values():  # the library of an extra is imported in functions, not with the module
        names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.module}
        assert extra not in {name.split(".")[0] for name in names}


def test_files_of_exports_need_no_other_library():
    folder = PACKAGE / "export" / "standalone"
    assert {path.name for path in folder.glob("*.py")} == {"__init__.py", *STANDALONE}
    for name, libraries in STANDALONE.items():
        used = {imported.split(".")[0] for imported in imports_of(folder / name)}
        assert used - set(sys.stdlib_module_names) == libraries, name


def test_nothing_is_unpickled():
    for path in MODULES:
        names = {name.split(".")[0] for name in imports_of(path)}
        assert not names & {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}, path
        for node in ast.walk(TREES[path]):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            where = f"{path}:{node.lineno}"
            assert not called.endswith("read_pickle"), where
            assert called != "torch.load" or options.get("weights_only") == "True", where
            assert options.get("allow_pickle", "False") == "False", where
