"""What is said twice agrees: dependencies in pyproject.toml, in constraints.txt and in the documentation."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from source import ROOT, modules

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
CORE = [Requirement(line) for line in PROJECT["dependencies"]]
ALL = [*CORE, *(Requirement(line) for lines in EXTRAS.values() for line in lines)]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.mark.parametrize("requirement", ALL, ids=str)
def test_every_dependency_is_pinned_within_its_bounds_and_explained(requirement: Requirement) -> None:
    name = canonicalize_name(requirement.name)
    assert pins()[name] in requirement.specifier
    page = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    [row] = [line for line in page.splitlines() if line.startswith(f"| {name} |")]
    assert set(str(requirement.specifier).split(",")) == set(row.split("|")[2].strip(" `").split(","))


def test_every_import_is_declared() -> None:
    names = ("bench", "data", "fast", "onnx", "report")
    extras = [Requirement(line) for name in names for line in EXTRAS.get(name, [])]
    runtime = {canonicalize_name(r.name) for r in [*CORE, *extras]}
    called = {"yaml": "pyyaml"}
    imported = {
        canonicalize_name(called.get(name, name)) for module in modules() for name in module.foreign()
    }
    assert imported - runtime == {"tokenizers"} & imported  # comes with transformers, whose bounds fit it


def test_the_licence_is_the_one_declared() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in text
    assert "Version 2.0" in text


def documents() -> list[Path]:
    return [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def test_every_page_is_in_the_navigation() -> None:
    """The builder checks links and anchors, but neither this nor images."""
    navigation = re.findall(
        r"^ +- (?:.+: )?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M
    )
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(navigation) == sorted(pages)


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_page_points_to_exists(path: Path) -> None:
    text = re.sub(r"<!--.*?-->|```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    missing = [t for t in targets if t and "://" not in t and not (path.parent / t).exists()]
    assert missing == []


def test_the_readme_shows_the_whole_house() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.findall(r"^  (\w+)(?:/|\.py) ", readme.split("src/kvferry/\n")[1], re.M)
    assert {module.room for module in modules()} - {"", "__main__"} <= set(tree)
