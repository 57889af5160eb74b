"""Can the report be read? Contrast and colours by computation; widths of a phone and of paper in a browser."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text

import browser
from decaf_lora import report
from decaf_lora.report import style
from test_report import make_comparison, make_run

TEMPLATE = (Path(report.__file__).parent / "report.html.j2").read_text()


def variables(block: str) -> dict[str, str]:
    return dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", block))


LIGHT, DARK = map(variables, re.findall(r":root \{(.*?)\}", re.sub(r"\{[%{].*?[%}]\}", "", TEMPLATE), re.DOTALL)[:2])


def linear(colour: str) -> np.ndarray:
    """(3,) linear red, green, blue of #rrggbb (sRGB, IEC 61966-2-1)."""
    parts = np.array([int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """Of WCAG 2.2: 1 (none) to 21 (black on white)."""
    low, high = sorted(float(linear(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def test_contrast_of_known_pairs() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("page", [LIGHT, DARK], ids=["light", "dark"])
def test_text_of_the_page(page: dict[str, str]) -> None:
    for text, ground in (("ink", "page"), ("soft", "page"), ("ink", "tint"), ("soft", "best"), ("best-ink", "best")):
        assert contrast(page[text], page[ground]) >= 4.5, (text, ground)


@pytest.mark.parametrize("colour", style.DARK)
def test_lines_and_their_names(colour: str) -> None:
    assert contrast(colour, LIGHT["page"]) >= 4.5
    assert contrast(style.DARK[colour], DARK["page"]) >= 4.5


@pytest.mark.parametrize("page", [LIGHT, DARK], ids=["light", "dark"])
def test_numbers_on_the_fullest_cell_of_a_heat_map(page: dict[str, str]) -> None:
    *cell, alpha = style.HEAT(1.0)
    ground = [int(page["page"][k : k + 2], 16) for k in (1, 3, 5)]
    mixed = [round(255 * alpha * c + (1 - alpha) * g) for c, g in zip(cell, ground, strict=True)]
    assert contrast(page["ink"], "#" + "".join(f"{m:02x}" for m in mixed)) >= 4.5


def test_every_colour_of_a_figure_has_one_for_the_dark_page() -> None:
    looks = [*report.LOOKS.values(), *style.SPARE_LOOKS]
    assert {colour for colour, _ in looks} - {style.INK} == set(style.DARK)
    assert set(style.PHASE_COLOURS) <= set(style.DARK)


# Machado, Oliveira, Fernandes, IEEE TVCG 15 (2009), severity 1, on linear colours.
BLINDNESS = {
    "none": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(rgb: np.ndarray) -> np.ndarray:
    """(3,) CIELAB (D65) of linear red, green, blue."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = (
        v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in to_xyz @ rgb / np.array([0.95047, 1, 1.08883])
    )
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


FIRST = ("decaf", "decaf_tracked", "dlora", "dlora_fa", "fedavg", "local", "centralized")
"""The algorithms that figures show most; the others differ from them and each other by dashes and marker."""


@pytest.mark.parametrize("eye", BLINDNESS)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_colour_blind_readers_tell_algorithms_apart(eye: str, dark: bool) -> None:
    """A difference of 10 in CIELAB is seen at a glance."""
    seen = {}
    for name, (colour, _) in report.LOOKS.items():
        shown = (DARK if dark else LIGHT)["ink"] if colour == style.INK else style.DARK[colour] if dark else colour
        seen[name] = lab(np.clip(np.array(BLINDNESS[eye]) @ linear(shown), 0, 1))
    close = {
        pair: d
        for pair in itertools.combinations(FIRST, 2)
        if (d := np.linalg.norm(seen[pair[0]] - seen[pair[1]])) < 10
    }
    assert close == {}


def test_algorithms_differ_without_any_colour() -> None:
    forms = [(str(style.DASHES.get(name, "-")), marker) for name, (_, marker) in report.LOOKS.items()]
    assert len({dashes for dashes, _ in forms}) == len({marker for _, marker in forms}) == len(report.LOOKS)


class TestNamesAtTheEnds:
    @given(st.lists(st.floats(0, 1), max_size=12), st.floats(0.01, 0.08))
    def test_are_apart_and_in_order(self, heights: list[float], distance: float) -> None:
        given_ = np.array(heights)
        moved = style.apart(given_, distance)
        order = np.argsort(given_, kind="stable")
        assert (np.diff(moved[order]) >= distance - 1e-9).all()
        assert (moved <= 1 + 1e-9).all()

    def test_stay_where_there_is_room(self) -> None:
        assert style.apart(np.array([0.2, 0.9, 0.5]), 0.1) == pytest.approx([0.2, 0.9, 0.5])

    def test_share_the_way_where_there_is_none(self) -> None:
        assert style.apart(np.array([0.5, 0.5, 0.5]), 0.1) == pytest.approx([0.4, 0.5, 0.6])

    def test_curves_that_coincide_are_named_apart(self) -> None:
        figure = style.new_figure()
        axes = figure.add_subplot()
        for name in ("one", "two", "three"):
            axes.plot([0, 1, 2], [0.1, 0.4, 0.5], label=name)
        style.label_ends(axes)
        figure.canvas.draw()
        heights = sorted(text.get_position()[1] * axes.bbox.height for text in axes.texts)
        assert len(heights) == 3
        assert min(np.diff(heights)) >= max(Text.get_window_extent(text).height for text in axes.texts)
        assert all(text.get_position()[0] > 1 for text in axes.texts)
        assert all(text.get_window_extent().x1 <= figure.bbox.x1 for text in axes.texts)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_comparison(tmp_path_factory.mktemp("looks") / "c", seeds=(0, 1), rounds=5)
    make_run(folder / "other", partition="a-partition-with-a-rather-long-name/dirichlet:0.125", rounds=5)
    return report.write_report(folder)


CUT = """
const wide = document.documentElement.clientWidth;
const cut = [...document.querySelectorAll('td, th, dd, p, figcaption, summary, h1, h2, h3')].filter(e =>
    e.checkVisibility() && (e.getBoundingClientRect().right > wide + 1 || e.scrollWidth > e.clientWidth + 1));
const texts = [...document.querySelectorAll('figure:not(.wide) svg text')].map(e => e.getBoundingClientRect().height);
return {page: document.documentElement.scrollWidth - wide, cut: cut.map(e => e.textContent.trim().slice(0, 60)),
        smallest: Math.min(...texts)};
"""


def test_nothing_is_cut_off_at_any_width(page: Path, tmp_path: Path) -> None:
    widths = (360, 500, 820, 1280)
    for width, found in zip(widths, browser.measured(page, CUT, widths, tmp_path), strict=True):
        assert (found["page"], found["cut"]) == (0, []), width
        assert found["smallest"] >= 8, "pixels of the smallest text in a figure"


def test_paper_is_light_and_keeps_its_columns() -> None:
    """Chromium lays out paper by the rules for print: dark colours are for screens alone, and tables stay tables."""
    assert "@media screen and (prefers-color-scheme: dark)" in TEMPLATE
    assert not re.search(r"@media \(prefers-color-scheme", TEMPLATE)
    stacked = TEMPLATE.index(".stack thead { display: none; }")
    assert TEMPLATE.rindex("@media", 0, stacked) == TEMPLATE.index("@media screen and (max-width: 820px)")
