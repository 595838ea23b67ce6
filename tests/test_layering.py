"""One direction of imports: a module knows those above it in this list, and nothing below."""

import ast
import sys
from pathlib import Path

import blockdiffusion

ROOT = Path(blockdiffusion.__file__).parent
LAYERS = [
    ["errors", "escape", "recording"],
    ["files"],
    [
        "from_pretrained",
        "limits",
        "records",
        "seeding",
        "ranks",
        "devices",
        "hardware",
        "schedules",
        "masks",
        "objectives",
        "cache",
        "text",
    ],
    ["checksums", "corruption", "attention", "denoiser"],
    ["diffusions", "costs"],
    ["exact", "orders", "variance"],
    ["models"],
    ["sampling"],
    ["data"],
    ["train"],
    ["evaluate"],
    ["release", "verify"],
    ["terminal"],
    ["config"],
    ["account", "reproduce"],
    ["cli"],
    ["__main__"],
]
PURE = {"schedules", "masks", "corruption", "objectives"}
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        relative = path.relative_to(ROOT)
        if relative != Path("__init__.py"):
            yield relative, ast.parse(path.read_text())


def imported(tree):
    """Dotted names that a module imports, inside functions too; type-only imports do not count."""
    type_only = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            type_only.update(id(n) for n in ast.walk(node))
    for node in ast.walk(tree):
        if id(node) in type_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports are absolute"
            if node.module == "blockdiffusion":
                yield from (f"blockdiffusion.{alias.name}" for alias in node.names)
            else:
                yield node.module


def layer(dotted):
    return dotted.split(".")[1] if dotted.startswith("blockdiffusion.") else None


def test_every_module_has_its_place():
    places = {path.parts[0].removesuffix(".py") for path, _ in modules()}
    assert places == RANK.keys()


def test_no_import_goes_up():
    wrong = []
    for path, tree in modules():
        own = path.parts[0].removesuffix(".py")
        for name in imported(tree):
            target = layer(name)
            if target in RANK and target != own and RANK[target] >= RANK[own]:
                wrong.append(f"{path} imports {name}")
    assert not wrong


def test_the_mathematics_knows_torch_only():
    allowed = {"torch", "blockdiffusion"} | sys.stdlib_module_names
    for path, tree in modules():
        if path.stem in PURE and len(path.parts) == 1:
            roots = {name.split(".")[0] for name in imported(tree)}
            assert roots <= allowed, path


def test_nothing_heavy_is_imported_with_the_package_or_the_command_line():
    import subprocess
    import sys

    code = (
        "import sys, blockdiffusion, blockdiffusion.cli; "
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'numpy'} & sys.modules.keys(); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
