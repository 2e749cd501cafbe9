"""Promises of the package as a whole: imports, arrows, documents, style."""

import ast
import inspect
import pathlib
import pkgutil
import subprocess
import sys

import pytest

import distrain_jax as dj

PACKAGE = pathlib.Path(dj.__file__).parent
ROOT = PACKAGE.parent


def run(*command, **options):
  return subprocess.run(
    command,
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=240,
    check=False,
    **options,
  )


IMPORT_EVERYTHING = """
import importlib, pkgutil, sys, warnings
warnings.simplefilter("error")
import distrain_jax
assert "flax" not in sys.modules, "models are to load on use"
warnings.simplefilter("default")
names = [m.name for m in pkgutil.walk_packages(
  distrain_jax.__path__, "distrain_jax.")]
for name in names:
  importlib.import_module(name)
import jax
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "a JAX backend was started"
assert "tensorflow" not in sys.modules, "TensorFlow was imported"
print(len(names))
"""


def test_importing_touches_no_tensorflow_and_starts_no_backend(tmp_path):
  # A stand-in shows imports that are tried and forgiven where it is absent.
  stand_in = tmp_path / "tensorflow"
  stand_in.mkdir()
  (stand_in / "__init__.py").write_text("__version__ = '2.19.0'\n")
  code = f"import sys; sys.path.append({str(tmp_path)!r})\n{IMPORT_EVERYTHING}"
  done = run(sys.executable, "-c", code)
  assert done.returncode == 0, done.stderr
  assert int(done.stdout) > 20


def imports(path):
  """Modules that a file imports, wherever in it, as dotted names."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: a relative import"
      yield node.module
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_in(module, package):
  return module == package or module.startswith(f"{package}.")


OURS = ("train", "models", "data", "inspect", "methods", "soups", "learned")
ARROWS = {  # part of the package -> parts that it must not know
  "methods": ("train", "models", "data", "inspect", "soups"),
  "models": ("train", "methods", "data", "inspect", "soups"),
  "data": ("train", "methods", "models", "inspect", "soups"),
  "inspect": ("train", "models", "data", "soups"),
  "learned": ("train", "models", "data", "inspect", "methods", "soups"),
  "population": ("train", "models", "data", "inspect", "methods", "soups"),
}


@pytest.mark.parametrize("part", ARROWS)
def test_import_arrows_point_one_way(part):
  for path in sorted((PACKAGE / part).rglob("*.py")):
    for module in imports(path):
      for other in ARROWS[part]:
        assert not is_in(module, f"distrain_jax.{other}"), f"{path}: {module}"


def test_the_core_knows_no_part_that_is_built_on_it():
  files = [p for p in PACKAGE.glob("*.py") if p.name != "__init__.py"]
  assert len(files) > 5
  for path in files:
    for module in imports(path):
      for part in OURS:
        assert not is_in(module, f"distrain_jax.{part}"), f"{path}: {module}"


def test_nothing_in_the_package_knows_launchers_configs_or_tests():
  for path in sorted(PACKAGE.rglob("*.py")):
    for module in imports(path):
      first = module.partition(".")[0]
      assert first not in ("launch", "configs", "tests"), f"{path}: {module}"
      # A pickle is a program: one module reads theirs, and runs none.
      if path.name != "unpickle.py":
        assert first not in ("pickle", "cloudpickle"), f"{path}: {module}"
      assert first not in ("tensorflow", "clu"), f"{path}: {module}"


def test_methods_do_not_know_each_others_internals():
  for path in sorted((PACKAGE / "methods").glob("*.py")):
    if path.name != "__init__.py":
      for module in imports(path):
        private = [x for x in module.split(".")[1:] if x.startswith("_")]
        inside = is_in(module, "distrain_jax.methods")
        assert not (inside and private), f"{path}: {module}"


def public_names():
  for name, value in vars(dj).items():
    if not name.startswith("_") and name != "importlib":
      yield name, value


def test_public_names_are_documented():
  promised = {"ddp", "zero1", "simulate", "distribute", "spmd", "Method"}
  assert promised <= dict(public_names()).keys()
  for name, value in public_names():
    doc = inspect.getdoc(value)
    # NamedTuple writes one for those who have none: `Name(field, ...)`.
    assert doc and not doc.startswith(f"{name}("), name


@pytest.mark.parametrize("name", ["ddp", "zero1"])
def test_factories_share_one_signature_and_explain_their_options(name):
  factory = getattr(dj, name)
  first, second, *options = inspect.signature(factory).parameters.values()
  assert (first.name, second.name) == ("loss_fn", "tx")
  assert all(option.kind == option.KEYWORD_ONLY for option in options)
  for option in options:
    assert f"{option.name}: " in factory.__doc__, option.name
  assert "arxiv.org/abs/" in sys.modules[factory.__module__].__doc__


def test_every_module_says_what_it_is():
  for module in pkgutil.walk_packages([str(PACKAGE)]):
    path = PACKAGE / module.name
    path = path / "__init__.py" if module.ispkg else path.with_suffix(".py")
    assert ast.get_docstring(ast.parse(path.read_text())), path


def test_parts_load_on_use_and_unknown_names_are_attribute_errors():
  assert set(dj._PACKAGES) <= set(dir(dj))
  for part in ("data", "models"):
    assert getattr(dj, part).__name__ == f"distrain_jax.{part}"
  with pytest.raises(AttributeError, match="no attribute 'zero4'"):
    _ = dj.zero4


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff_finds_nothing(command):
  done = run(sys.executable, "-m", "ruff", *command, "--no-cache", ".")
  assert done.returncode == 0, done.stdout + done.stderr
