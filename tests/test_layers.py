"""Imports run one way: a module imports from layers below its own, never from above, and no two import each other."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "patchscore"

LAYERS = (
    {"checks", "files", "native", "version", "windows", "posterior", "pixels", "processes"},
    {"noise", "sources"},
    {"bank", "mixed"},
    {"index"},
    {"engines"},
    {"canvas", "heldout"},
    {"scales"},
    {"denoiser"},
    {"machines", "pooled"},
    {"distributed"},
    {"gaussian", "aggregate", "conditioned", "gradients", "guidance", "networks", "nearest", "receptive", "replicates"},
    {"theories"},
    {"adapters", "sampling"},
    {"classification", "calibrate", "evaluate", "explain", "fidelity", "likelihood"},
    {"draw", "memorisation"},
    {"runs", "synthesis"},
    {"cli", "__init__", "__main__"},
)
"""From the ground up. Modules and subpackages of one layer may import each other, but not in a circle."""

AT = {name: height for height, names in enumerate(LAYERS) for name in names}


def part_of(path):
    """bank.py is part bank, engines/fused.py part engines."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports():
    """(module, its part, module imported, its part) for every import, at the top of a file or in a function."""
    modules = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    for module, path in modules.items():
        package = module.split(".")[:-1]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names if alias.name.startswith("patchscore.")]
                targets = [name.removeprefix("patchscore.") for name in names]
            elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("patchscore")):
                above = package[: len(package) - node.level + 1] if node.level else []
                base = [*above, *(node.module or "").removeprefix("patchscore").strip(".").split(".")]
                base = [name for name in base if name]
                # `from . import checks` names modules, `from .checks import odd` what is in one.
                targets = [".".join([*base, alias.name]) for alias in node.names]
                targets = [
                    name if name in modules or f"{name}.__init__" in modules else ".".join(base) for name in targets
                ]
            else:
                continue
            for target in targets:
                if target and target != "_native":
                    found = target if target in modules else f"{target}.__init__"
                    assert found in modules, f"{module} imports {target}"
                    yield module, part_of(path), found, part_of(modules[found])


def test_every_part_has_a_layer():
    parts = {part_of(path) for path in PACKAGE.rglob("*.py")}
    assert parts == set(AT)


def test_imports_run_downwards():
    wrong = [f"{a} -> {b}" for a, part, b, other in imports() if part != other and AT[other] > AT[part]]
    assert not wrong


def test_nothing_imports_in_a_circle():
    below = {}
    for a, _, b, _ in imports():
        if a != b:
            below.setdefault(a, set()).add(b)

    def visit(module, path):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(below.get(module, ())):
                visit(other, [*path, module])
            done.add(module)

    done = set()
    for module in sorted(below):
        visit(module, [])


def test_the_test_sees_imports():
    found = {(a, b) for a, _, b, _ in imports()}
    assert ("cli.sample", "machines") in found
    assert ("bank", "sources.__init__") in found
    assert ("engines.fused.launch", "engines.fused.kernel") in found  # in a function, from a subpackage
    assert ("denoiser", "engines.__init__") in found


def room(path):
    """Who may know a private name: an engine's package, any other part of the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:2]) if parts[0] == "engines" else parts[0]


def test_no_private_name_leaves_its_room():
    trees = {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
    own = {}
    for path, tree in trees.items():
        names = own.setdefault(
            room(path), {"_make", "_replace", "_asdict", "_fields", "_exit"}
        )  # of namedtuples and os
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Store):
                names.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    used = {
        (path, name)
        for path, tree in trees.items()
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom)
            else [node.attr]
            if isinstance(node, ast.Attribute)
            else []
        )
        if name.startswith("_") and not name.startswith("__")
    }
    assert len(used) > 50  # the test sees private names
    foreign = sorted(f"{path.relative_to(PACKAGE)}: {name}" for path, name in used if name not in own[room(path)])
    assert not foreign
