"""Who may import whom, that `import jax_trustdiff` is light, and that only models/ knows flax.linen."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "jax_trustdiff"

EVERYWHERE = {"types", "pytrees"}
ALLOWED = {
  "types": set(),
  "pytrees": set(),
  "config": {"types"},
  "parallel": {"types"},
  "diffusion": {"types"},
  "attacks": {"types"},
  "cdm": {"types", "diffusion"},
  "watermark": {"types", "diffusion", "attacks"},
  "robustness": {"types", "diffusion", "attacks"},
  "models": {"types"},
  "data": {"types", "parallel"},
  "training": {"types", "parallel", "config"},
  "evaluation": {"types", "models"},
  "interop": {"types", "models"},
}


def imported_modules(file: pathlib.Path) -> set[str]:
  """Every module name that the file imports, anywhere in it."""
  found = set()
  for node in ast.walk(ast.parse(file.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{file}: relative import"
      found |= {f"{node.module}.{alias.name}" for alias in node.names}
  return found


def part_of(file: pathlib.Path) -> str:
  """'attacks' for jax_trustdiff/attacks/pgd.py, 'types' for jax_trustdiff/types.py."""
  return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.floor
def test_import_directions():
  wrong = []
  for file in FILES:
    part = part_of(file)
    if part in ("tasks", "main", "__init__", "__main__"):
      continue
    assert part in ALLOWED, f"{part} is not in the design: say here what it may import"
    for name in imported_modules(file):
      if name.startswith("jax_trustdiff."):
        other = name.split(".")[1]
        if other != part and other not in ALLOWED[part] | EVERYWHERE and other != "__version__":
          wrong.append(f"{file.relative_to(PACKAGE)} imports {name}")
  assert not wrong, wrong


def test_only_models_imports_linen_and_nobody_imports_torch():
  wrong = []
  for file in FILES:
    for name in imported_modules(file):
      linen = name.startswith(("flax.linen", "flax.nnx")) and part_of(file) != "models"
      torch = name.split(".")[0] == "torch" and not file.name.startswith("torch_peer")
      if linen or torch:
        wrong.append(f"{file.relative_to(PACKAGE)} imports {name}")
  assert not wrong, wrong


def test_mechanisms_do_not_jit():
  """Library functions are jitted by their caller."""
  wrong = [
    str(file.relative_to(PACKAGE))
    for file in FILES
    if part_of(file) in ("diffusion", "attacks", "cdm", "watermark", "robustness", "evaluation")
    and file.name != "autoattack.py"
    and "jax.jit" in file.read_text()
  ]
  assert not wrong, wrong


@pytest.mark.floor
def test_import_is_light():
  code = (
    "import sys, jax_trustdiff, jax_trustdiff.tasks.train_classifier; "
    "print(sorted({'tensorflow', 'transformers', 'torch', 'matplotlib', 'sklearn', 'tensorflow_datasets'}"
    " & set(sys.modules)))"
  )
  out = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
  )
  assert out.stdout.strip() == "[]", out.stdout
  code = "import sys, jax_trustdiff.main; print('jax' in sys.modules)"
  out = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
  )
  assert out.stdout.strip() == "False", "main imports jax before it is needed: --help would be slow"
