"""One direction of imports: a file knows those above it in this list, never one below.

A row names packages or single files; the longest name that fits a file decides its row. Within a
row files may know each other, but never in a circle.
"""

import ast
import subprocess
import sys
from pathlib import Path

import blockdiffusion

ROOT = Path(blockdiffusion.__file__).parent
ROWS = [
    ["errors", "escape", "lazy", "renamed"],
    ["limits", "options", "text", "from_pretrained", "runtime", "evaluate.options"],
    ["reports.numbers"],
    ["reports.tables"],
    ["files"],
    ["diffusion.schedules", "diffusion.losses", "diffusion.estimators", "diffusion.config"],
    ["models.backbone"],
    [
        *("models.masks", "models.cuda_graphs", "models.cache", "models.shifted"),
        "models.attention",
        "models.block_diffusion",
    ],
    ["diffusion"],
    ["models"],
    ["checkpoints"],
    ["sampling"],
    ["data"],
    ["checkpoints.release", "checkpoints.verify"],
    ["train", "estimate.sizes", "estimate.flops"],
    ["evaluate"],
    ["reports"],
    ["serving"],
    ["train.run"],
    ["estimate"],
    ["studies"],
    ["cli"],
    ["__main__"],
]
RANK = {name: rank for rank, names in enumerate(ROWS) for name in names}
PURE = {
    *("diffusion.schedules", "diffusion.losses", "diffusion.estimators", "diffusion.exact"),
    *("diffusion.orders", "models.masks"),
}


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts != ("__init__",):
            yield ".".join(part for part in parts if part != "__init__"), path


FILES = dict(modules())


def imported(path):
    """Names below the package that a file imports, inside functions too, and all other roots.

    Imports for types alone do not count.
    """
    tree = ast.parse(path.read_text())
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
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                is_file = full.removeprefix("blockdiffusion.") in FILES
                yield full if is_file else node.module


def known(path):
    """The files of the package that a file imports."""
    names = (name.removeprefix("blockdiffusion.") for name in imported(path))
    return sorted({name for name in names if name in FILES})


def row(name):
    parts = name.split(".")
    fitting = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((RANK[prefix] for prefix in fitting if prefix in RANK), None)


def test_every_file_has_its_row_and_every_row_a_file():
    assert [name for name in FILES if row(name) is None] == []
    used = {prefix for prefix in RANK if any(f"{name}.".startswith(f"{prefix}.") for name in FILES)}
    assert used == RANK.keys()


def test_no_import_goes_up():
    wrong = [
        f"{name} imports {other}"
        for name, path in FILES.items()
        for other in known(path)
        if row(other) > row(name)
    ]
    assert not wrong


def test_no_file_knows_itself_through_others():
    graph = {name: known(path) for name, path in FILES.items()}
    done, circles = set(), []

    def visit(name, trail):
        if name in trail:
            circles.append(" -> ".join([*trail[trail.index(name) :], name]))
        elif name not in done:
            for other in graph[name]:
                visit(other, [*trail, name])
            done.add(name)

    for name in graph:
        visit(name, [])
    assert not circles


def test_the_mathematics_knows_torch_only():
    allowed = {"torch", "blockdiffusion"} | sys.stdlib_module_names
    for name in PURE:
        roots = {other.split(".")[0] for other in imported(FILES[name])}
        assert roots <= allowed, name


def test_nothing_heavy_is_imported_with_the_package_or_the_command_line():
    code = (
        "import sys, blockdiffusion, blockdiffusion.cli, blockdiffusion.sampling.params; "
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'numpy', 'matplotlib', "
        "'jinja2'} & sys.modules.keys(); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
