"""The repository tests itself: imports go one way, every module imports, sizes stay within the budget."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("toolkits", "conversion", "data_preprocessing")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in SOURCES]

# The only rooms in which somebody else's names are replaced, and what they may replace them in.
PATCH_ROOMS = {"toolkits/training/parallel/cpu_backend.py", "toolkits/training/parallel/mcore_patches.py"}


def imports_of(path):
    """Yield (absolute module name, line, whether it stands at the top level) for every import in `path`."""
    package = list(path.relative_to(ROOT).parent.parts)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *((node.module or "").split(".") if node.module else [])])
            yield module, node.lineno, id(node) in top
            for alias in node.names:
                yield f"{module}.{alias.name}", node.lineno, id(node) in top


def violations(folder, forbidden):
    """Return `file:line imports X` for imports under `folder` for which `forbidden(X)` holds."""
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in SOURCES
        if path.relative_to(ROOT).as_posix().startswith(folder)
        for name, line, _ in imports_of(path)
        if forbidden(name)
    ]


def below(name, *packages):
    return any(name == package or name.startswith(package + ".") for package in packages)


def test_the_ground_floor_knows_nothing_of_what_stands_on_it():
    def upstairs(name):
        return below(name, "toolkits") and not below(name, "toolkits.foundation") and name != "toolkits"

    assert violations("conversion/", lambda name: upstairs(name) or below(name, "data_preprocessing")) == []
    assert violations("data_preprocessing/", lambda name: upstairs(name) or below(name, "conversion")) == []


def test_the_cellar_uses_the_standard_library_only():
    def foreign(name):
        return name.split(".")[0] not in (*sys.stdlib_module_names, "toolkits")

    assert violations("toolkits/foundation/", foreign) == []
    assert (
        violations("conversion/families/", lambda name: foreign(name) and not below(name, "conversion.families")) == []
    )


def test_heavy_libraries_stay_where_they_belong():
    assert violations("data_preprocessing/", lambda name: below(name, "torch")) == []
    assert violations("conversion/", lambda name: below(name, "megatron", "transformers")) == []
    outside = [v for v in violations("", lambda name: below(name, "megatron")) if "toolkits/training/" not in v]
    assert outside == []


def test_the_light_modules_pull_nothing_heavy_in():
    light = ["toolkits.cli", "toolkits.training.config", "toolkits.training.layout", "toolkits.launch.rank"]
    light += ["conversion.plan"]
    commands = ("chat", "convert", "data", "data_build", "data_pairs", "data_view", "generate", "pipeline", "train")
    light += [f"toolkits.commands.{name}" for name in commands]
    script = f"import sys, importlib; [importlib.import_module(m) for m in {light}]; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "tokenizers", "megatron", "numpy", "matplotlib"}
    assert heavy & set(loaded.stdout.split()) == set()


def test_every_module_imports():
    script = f"import importlib; [importlib.import_module(m) for m in {[m for m in MODULES if '__main__' not in m]}]"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_imports_inside_a_package_are_relative():
    wrong = []
    for path in SOURCES:
        package = path.relative_to(ROOT).parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and not node.level and below(node.module or "", package):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} from {node.module}")
    assert wrong == []


def test_no_room_outgrows_its_budget():
    problems = []
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > 400:
            problems.append(f"{path.relative_to(ROOT)} is longer than 400 lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 60:
                problems.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} is longer than 60 lines")
    assert problems == []


def test_only_two_rooms_replace_other_peoples_names():
    wrong = []
    for path in SOURCES:
        name = path.relative_to(ROOT).as_posix()
        if name in PATCH_ROOMS:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            targets = node.targets if isinstance(node, ast.Assign) else []
            for target in targets:
                text = ast.unparse(target)
                if text.startswith(("torch.", "megatron.", "parallel_state.", "dist_checkpointing.")):
                    wrong.append(f"{name}:{node.lineno} {text}")
    assert wrong == []


def test_help_is_instant():
    # No time is asserted: the modules that make it slow must not be there.
    script = """
import sys
from toolkits.cli import temper
try:
    temper(["--help"])
except SystemExit:
    print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "rich"} & set(done.stdout.splitlines()[-1].split())
