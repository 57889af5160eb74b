"""What the package says of itself agrees: version, addresses, and where the README's links lead on an index."""

import re
import tomllib
from pathlib import Path

import yaml

import decaf_lora

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_version_is_written_once():
    assert "version" not in PROJECT["project"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "src/decaf_lora/__init__.py"
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == decaf_lora.__version__
    versions = re.findall(r"^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert versions[0] == decaf_lora.__version__


def test_the_readmes_links_lead_to_the_repository_on_an_index():
    home = PROJECT["project"]["urls"]["Repository"]
    text = (ROOT / "README.md").read_text()
    for rule in PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert targets
    for target in targets:
        assert target.startswith(("https://", "#")), target
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert pictures
    assert all(picture.startswith(f"{home}/raw/main/docs/images/") for picture in pictures)
    assert any(target.startswith(f"{home}/blob/main/docs/") for target in targets)


def test_the_source_package_leaves_out_what_only_ci_and_studies_need():
    left_out = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["exclude"]
    assert {"/.ci", "/.github", "/benchmarks/*.json", "/benchmarks/*.jsonl"} <= set(left_out)
