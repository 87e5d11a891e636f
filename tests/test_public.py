"""What the package promises to the outside: its names, its folders, its version."""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path

import pytest

import sparsekit

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def test_the_public_names_are_these() -> None:
    assert sparsekit.__all__ == [
        "MODELS",
        "PRUNERS",
        "Artifact",
        "Budget",
        "ChannelGraph",
        "PruningPlan",
        "Recipe",
        "SparsekitError",
        "Task",
        "accelerate",
        "certify",
        "compact",
        "compress",
        "export_onnx",
        "fit",
        "load",
        "mask",
        "measure_latency",
        "tidy",
        "trace",
    ]
    assert len(sparsekit.__all__) <= 20


@pytest.mark.parametrize("name", sparsekit.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert vars(sparsekit)[name] is not None


def test_every_package_on_disk_is_shipped_and_no_other() -> None:
    folders = {name: ROOT / folder for name, folder in SETUPTOOLS["package-dir"].items()}
    on_disk = {
        ".".join((name, *init.parent.relative_to(folder).parts))
        for name, folder in folders.items()
        for init in folder.rglob("__init__.py")
    }
    assert on_disk == set(SETUPTOOLS["packages"])


def test_links_and_package_dir_name_the_same_folders() -> None:
    links = {f"sparsekit.{link.name}": link for link in (ROOT / "sparsekit").iterdir() if link.is_symlink()}
    mapped = {name: folder for name, folder in SETUPTOOLS["package-dir"].items() if name != "sparsekit"}
    assert set(links) == set(mapped)
    for name, link in links.items():
        assert not link.readlink().is_absolute()
        assert link.resolve() == ROOT / mapped[name]


def test_the_installed_version_is_the_projects() -> None:
    try:
        installed = importlib.metadata.version("sparsekit")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("sparsekit runs from its checkout, nothing is installed")
    assert installed == PROJECT["project"]["version"]
