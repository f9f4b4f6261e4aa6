"""Imports go down only, and some libraries have exactly one home."""

import ast
from pathlib import Path

import pytest

import harmonict

ROOT = Path(harmonict.__file__).parent
LEVELS = [
    {"core"},
    {"volumes", "physics", "metrics", "scale"},
    {"dicom", "radiomics", "biomarkers", "nn"},
    {"simulate", "data", "combat", "tiles", "patch_fusion"},
    {"abstention"},
    {"train"},
    {"harmonizer", "alternating", "window_training", "fidelity"},
    {"two_way", "sampling", "latent_training"},
    {"methods"},
    {"evaluate"},
    {"report"},
    {"harmonize_cohort"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: n for n, names in enumerate(LEVELS) for name in names}
HOMES = {
    "pydicom": {"dicom"},
    "highdicom": {"dicom"},
    "gdcm": {"dicom"},
    "SimpleITK": {"volumes"},
    "matplotlib": {"report"},
    "dask": {"scale"},
    "lightning": {"train"},
    "lightning_fabric": {"train"},
    "monai": {"nn", "methods", "tiles", "evaluate"},
    "typer": {"cli"},
}
FILES = sorted(ROOT.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, at any depth of its functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path):
    here = room(path)
    if here == "__init__":
        return
    assert here in LEVEL, f"{here} has no place among the layers"
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "harmonict" and len(parts) > 1 and parts[1] in LEVEL and parts[1] != here:
            assert LEVEL[parts[1]] < LEVEL[here], f"{here} imports {name}, which is not below it"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_library_is_imported_in_its_own_room_only(path):
    for name in imported(path):
        homes = HOMES.get(name.split(".")[0])
        assert homes is None or room(path) in homes, f"{path.name} imports {name}; its home is {homes}"


def test_methods_never_import_each_other():
    for path in (ROOT / "methods").glob("*.py"):
        if path.name == "__init__.py":
            continue
        others = {n for n in imported(path) if n.startswith("harmonict.methods")}
        assert not others, f"{path.name} imports {others}"
