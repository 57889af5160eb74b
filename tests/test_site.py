"""The site: every public name has its entry in the reference, and links that leave docs/ lead somewhere."""

import ast
import importlib
import re
import zlib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
pytest.importorskip("mkdocs", reason="the site's extra is not installed: pip install 'decaf-lora[docs]'")

ROOMS = ("algorithms", "graphs", "partition", "tasks", "engines", "integrations", "adapters", "records", "runs", "tune")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Names in the inventory of the built site."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    site = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(site)))
    inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    return {line.split(" ")[0] for line in zlib.decompress(inventory).decode().splitlines()}


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_is_in_the_reference(room, built):
    public = importlib.import_module(f"decaf_lora.{room}").__all__
    assert {name for name in public if f"decaf_lora.{room}.{name}" not in built} == set()


def test_what_the_package_itself_offers_is_in_the_reference(built):
    import decaf_lora

    known = {name.rpartition(".")[2] for name in built}
    assert {name for name in decaf_lora.__all__ if name[0].isupper()} - known == set()
    for module in ("config", "lowrank", "exchange", "errors", "run"):
        found = importlib.import_module(f"decaf_lora.{module}")
        own = {n for n, v in vars(found).items() if getattr(v, "__module__", "") == found.__name__ and n[0] != "_"}
        assert {name for name in own if f"decaf_lora.{module}.{name}" not in built} == set()


def test_links_out_of_the_pages_become_absolute(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import site_links

    home = site_links.repository()
    assert re.fullmatch(r"https://\S+[^/]", home)
    link = site_links.outward("see [the model](../model/README.md#why) and [data](own-data.md)", "mesh.md")
    assert link == f"see [the model]({home}/blob/main/model/README.md#why) and [data](own-data.md)"
    assert (
        site_links.outward("[a](../mesh.md) [b](https://x.org)", "results/a.md") == "[a](../mesh.md) [b](https://x.org)"
    )
    with pytest.raises(ValueError, match=r"docs/a\.md: there is no nowhere\.md"):
        site_links.outward("[a](../nowhere.md)", "a.md")


def test_no_docstring_has_what_a_browser_would_take_for_a_tag():
    """`<X, Y>` outside of backquotes vanishes from the page."""
    for path in (ROOT / "src" / "decaf_lora").rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (said := ast.get_docstring(node)):
                prose = re.sub(r"``?[^`]*``?|^(    | *\S+>>>).*$", "", said, flags=re.M)
                assert not re.search(r"<[A-Za-z][^<>\n]*>", prose), f"{path.name}: {node}: {prose}"


def test_no_page_asks_another_host_for_fonts_or_scripts():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert settings["theme"]["font"] is False
    assert "extra_javascript" not in settings
