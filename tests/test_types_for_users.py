"""The types of the installed package, as `mypy --strict` sees them in a user's program.

The user has the wheel and what it requires, but none of the stubs that we check
our own code with (grpcio brings no types, and needs types-grpcio for that).
"""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import client
import client.testing

pytestmark = pytest.mark.timeout(300)  # mypy reads NumPy's types; 10 s where nothing else runs

ROOT = Path(__file__).parents[1]
PACKAGES = ("protos", "digits", "client", "server", "trainer")
REQUIRED = ("grpc", "numpy", "PIL", "google/protobuf", "typing_extensions.py")
"""What the base install brings along."""
OF_PYTEST = ("pytest", "_pytest", "pluggy", "iniconfig", "packaging")
HARMLESS = re.compile(
    r"tuple\[Any, \.\.\.\](?=, numpy\.dtype)"  # an array of any shape
    r"|numpy\.(dtype|floating)\[Any\]"  # or of any numbers
    r"|Coroutine\[Any, Any(?=, )"  # of an `async def`, beside what is awaited
)


def run(*command: str | Path, cwd: Path) -> str:
    outside = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    done = subprocess.run(command, cwd=cwd, env=outside, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built of the files that stand here, with the setuptools that is here."""
    source = tmp_path_factory.mktemp("source")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "-q", "-w", "dist", ".", cwd=source)
    [wheel] = source.glob("dist/*.whl")
    return wheel


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds the wheel, what it requires, and pytest."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, symlinks=True)
    python = place / "bin" / "python"
    ours, theirs = (
        Path(sysconfig.get_path("purelib")),
        place / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}",
    )
    for name in (*REQUIRED, *OF_PYTEST):
        link = theirs / "site-packages" / name
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(ours / name)
    zipfile.ZipFile(wheel).extractall(theirs / "site-packages")  # all that installing does with this wheel
    return python


def check(python: Path, folder: Path, *files: str) -> str:
    """What mypy says, of whose settings only `--strict` differs from the default."""
    cache = python.parents[1] / "cache"
    mypy = (sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir", cache)
    return run(*mypy, "--python-executable", python, *files, cwd=folder)


def test_a_users_program_passes_mypy_strict_and_nothing_is_any(python: Path, tmp_path: Path) -> None:
    shutil.copy(ROOT / "tests" / "consumer" / "service.py", tmp_path)
    revealed = public_expressions()
    (tmp_path / "reveal.py").write_text(
        "\n".join(
            [
                "import client, client.testing",
                "def reveal(",
                *(f"    a_{name}: client.{name}," for name in CLASSES),
                *(f"    a_{name}: client.testing.{name}," for name in TESTING_CLASSES),
                ") -> None:",
                *(f"    reveal_type({expression})" for expression in revealed),
            ]
        )
        + "\n"
    )
    said = check(python, tmp_path, "service.py", "reveal.py")
    assert said.rstrip().endswith("Success: no issues found in 2 source files")
    types = re.findall(r"note: Revealed type is \"(.*)\"", said)
    assert len(types) == len(revealed) > 50
    for expression, type_ in zip(revealed, types, strict=True):
        assert not re.search(r"\bAny\b", HARMLESS.sub("", type_)), f"{expression}: {type_}"


def test_the_tests_of_the_page_on_testing_pass_mypy_strict(python: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", page, re.DOTALL))
    del blocks["test_fastapi_service.py"]  # this environment has no FastAPI
    for name, code in blocks.items():
        (tmp_path / name).write_text(code, encoding="utf-8")
    assert "Success: no issues found in 5 source files" in check(python, tmp_path, *blocks)


def test_what_is_installed_holds_all_that_it_needs(python: Path, tmp_path: Path) -> None:
    script = """
import client
from client.testing import FakeServer, digit_png

with FakeServer() as server, client.Client(server.target) as digits:
    print(client.__file__, digits.classify(digit_png(7)).digit)
"""
    place, digit = run(python, "-c", script, cwd=tmp_path).split()
    assert python.parents[1] in Path(place).parents
    assert digit == "7"


def test_the_types_ship(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    generated = {name for name in names if re.search(r"_pb2(_grpc)?\.py$", name)}
    assert len(generated) >= 6
    assert {f"{name}i" for name in generated} <= names


CLASSES = [name for name in client.__all__ if inspect.isclass(getattr(client, name))]
TESTING_CLASSES = [name for name in client.testing.__all__ if inspect.isclass(getattr(client.testing, name))]


def public_expressions() -> list[str]:
    """All functions of the public modules, and all attributes of instances of their classes."""
    expressions = []
    for module, classes in ((client, CLASSES), (client.testing, TESTING_CLASSES)):
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isfunction(thing):
                expressions.append(f"{module.__name__}.{name}")
            if name in classes:
                attributes = {*dir(thing), *inspect.get_annotations(thing)}
                own = sorted(x for x in attributes if not x.startswith("_") and x not in dir(TimeoutError))
                expressions += [f"a_{name}.{attribute}" for attribute in own]
    return expressions
