"""The house keeps its own rules: sizes, rooms, imports, locks, and a README whose commands parse."""

import ast
import importlib
import importlib.metadata
import importlib.util
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("data", "training", "inference", "evaluation", "validation", "service", "utils")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAX_FILES, MAX_MODULE_LINES, MAX_FUNCTION_LINES = 45, 500, 60
# Declarations of the wire, as long as the contract itself; a test sees to it that they stay declarations.
WIRE = ROOT / "service" / "schemas.py"
# Where two modules made one: sources of prices and of headlines; a queue, its jobs and their table.
LONGER = {"data_fetcher.py": 580, "training_service.py": 589}
MODULES_WITH_PARSERS = {
    "run_backtest.py": "run_backtest",
    "app.py": "app",
    "training/train_gbm.py": "training.train_gbm",
}


def sources() -> list[Path]:
    rooms = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    return [ROOT / "app.py", ROOT / "run_backtest.py", *rooms]


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in done.stdout.splitlines()]


def too_long_functions(source: str) -> list[str]:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, functions)]
    return [node.name for node in nodes if (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION_LINES]


def test_the_project_stays_small():
    assert len(sources()) <= MAX_FILES
    assert {
        path.name: n
        for path in sources()
        if (n := len(path.read_text().splitlines())) > LONGER.get(path.name, MAX_MODULE_LINES)
        and path != WIRE
    } == {}
    assert {path.name: names for path in sources() if (names := too_long_functions(path.read_text()))} == {}


def statements_of_logic(source: str) -> int:
    logic = (ast.If, ast.For, ast.While, ast.Try, ast.With, ast.comprehension, ast.Lambda)
    return sum(isinstance(node, logic) for node in ast.walk(ast.parse(source)))


def test_the_wire_declares_and_does_nothing_else():
    # One condition: booleans and text are no integers.
    assert statements_of_logic(WIRE.read_text()) <= 1
    assert statements_of_logic("x = [a for a in b if a]\nif x:\n    pass") == 2


def test_the_function_cap_catches_a_long_function():
    body = "\n".join(f"    x = {i}" for i in range(MAX_FUNCTION_LINES))
    assert too_long_functions(f"def long():\n{body}\n") == ["long"]


def test_no_source_patches_the_path_or_reads_the_environment():
    for path in sources():
        text = path.read_text()
        assert "sys.path" not in text, path
        if path.name != "base.py":
            assert "os.environ" not in text, path
            assert "getenv" not in text, path


def test_types_holds_no_python():
    assert not list((ROOT / "types").rglob("*.py"))


def test_the_packages_are_the_rooms_everywhere():
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == set(ROOMS)
    assert set(PYPROJECT["tool"]["importlinter"]["root_packages"]) == set(ROOMS)


def test_no_installed_distribution_hides_a_room():
    """The rooms are namespace packages: a regular package of the same name would win over them."""
    holders = importlib.metadata.packages_distributions()
    assert {room: set(holders.get(room, ())) - {PYPROJECT["project"]["name"]} for room in ROOMS} == {
        room: set() for room in ROOMS
    }


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-dev.lock"])
def test_locks_pin_with_hashes_and_name_no_address(name: str):
    text = (ROOT / name).read_text()
    # Spelled in pieces, so that this file does not look like what it forbids.
    options = "|".join("--" + name for name in ("index-url", "extra-index-url", "find-links", "trusted-host"))
    assert not re.search(rf"https?://|file:/|{options}", text)
    pins = re.findall(r"^[a-z0-9][\w.-]*==\S+.*(?:\n    .*)*", text, flags=re.MULTILINE)
    assert len(pins) > 50
    assert all("--hash=sha256:" in pin for pin in pins)
    # The service and the boosters never import it; only the network's own trainer and its tests do.
    assert bool(re.search(r"^tensorflow", text, flags=re.MULTILINE)) == (name == "requirements-dev.lock")


def test_the_two_locks_agree():
    def pins(name: str) -> dict[str, str]:
        return dict(re.findall(r"^([a-z0-9][\w.-]*)==(\S+)", (ROOT / name).read_text(), flags=re.MULTILINE))

    base, dev = pins("requirements.lock"), pins("requirements-dev.lock")
    assert {name: dev.get(name) for name in base} == base


def readme_commands() -> list[str]:
    """Return the commands of the README and of the documents that it leads to."""
    texts = [path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
    blocks = [block for text in texts for block in re.findall(r"```(?:sh|bash)\n(.*?)```", text, re.DOTALL)]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [
        line.split(" #")[0].strip() for line in lines if line.strip() and not line.lstrip().startswith("#")
    ]


def test_every_python_command_of_the_readme_parses():
    seen = set()
    for command in readme_commands():
        words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
        if not words or words[0] != "python":
            continue
        if words[1] == "-m":
            module, arguments = words[2], words[3:]
        else:
            module, arguments = MODULES_WITH_PARSERS.get(words[1], ""), words[2:]
        if module.startswith("benchmarks.") or words[1].startswith("benchmarks/"):
            assert (ROOT / words[1]).is_file(), command
            continue
        importlib.import_module(module).build_parser().parse_args(arguments)
        seen.add(module)
    assert {"training.train_gbm", "training.reproduce", "run_backtest", "app"} <= seen


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_every_benchmark_can_be_started(script: Path):
    """What they import moves; nothing but this would notice."""
    names = [
        (node.module, alias.name)
        for node in ast.walk(ast.parse(script.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ROOMS
        for alias in node.names
    ]
    assert names
    lacking = [
        f"{module}.{name}"
        for module, name in names
        if not hasattr(importlib.import_module(module), name)
        and importlib.util.find_spec(f"{module}.{name}") is None
    ]
    assert lacking == []


def test_make_targets_of_the_readme_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {command.split()[1] for command in readme_commands() if command.startswith("make ")}
    assert {"demo", "test"} <= named <= targets


def test_no_tracked_text_names_a_machine_or_a_registry():
    # Spelled in pieces, so that this file does not catch itself.
    forbidden = re.compile("/" + r"(?:work|root|home/\w+)/|" + "pypi" + r"\.org|" + "registry" + r"\.npmjs")
    for path in tracked():
        if path.suffix in {".py", ".md", ".toml", ".lock", ".ts", ".yaml", ".j2"} or path.name == "Makefile":
            assert not forbidden.search(path.read_text()), path


def test_no_module_is_named_like_the_standard_library():
    for path in sources():
        assert path.stem not in {"types", "logging", "typing", "statistics", "calendar"}, path
