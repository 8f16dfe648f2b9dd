"""The page of a comparison: its text, and how a browser shows it."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest
from conftest import quick
from run_folders import BRANCH

from w2s_train.compare import charts
from w2s_train.compare.comparison import Point
from w2s_train.compare.numbers import Interval


class Page(HTMLParser):
    """Collects the elements, their attributes and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


EVIL = '<img src=x onerror="alert(1)"></svg><script>alert(2)</script>$title & {{ 7 * 7 }} |'


def test_nothing_of_a_run_becomes_markup(make, arms, compare, tmp_path: Path):
    compare(*arms)
    plain = Page((tmp_path / "out" / "comparison.html").read_text())
    bad = {"sampler": EVIL, "git_commit": EVIL}
    for seed in (2, 3):
        make(f"<b>bold&amp;-{seed}", seed, segments=BRANCH, entry={"git_commit": EVIL}, note=EVIL)
    make("heun-4", 4, segments=BRANCH, entry=bad)
    compare(arms[0].parent / "*")
    page = Page((tmp_path / "out" / "comparison.html").read_text())
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in plain.elements} | {"ul", "li"}
    assert not any(key.startswith("on") for _, attrs in page.elements for key in attrs)
    assert "<b>bold&amp;" in page.text and f"sampler={EVIL}" in page.text
    assert page.text.count(EVIL) >= 2
    markdown = (tmp_path / "out" / "comparison.md").read_text()
    assert "<script>" in markdown and "$title & {{ 7 * 7 }} \\|" in markdown


def test_nothing_of_a_score_becomes_markup(arms, compare, tmp_path: Path):
    """Metric, weights and guidance stand in headings and at charts; fonts need not have letters."""
    texts = {"metric": f"fid {EVIL} 得点 \u202e\ud800$x^2$", "weights": EVIL, "guidance": EVIL}
    same = {key: texts[key] for key in ("weights", "guidance")}
    for path in arms:
        scores = json.loads((path / "scores.json").read_text())
        new = [s | texts | {"protocol": s["protocol"] | same} for s in scores]
        (path / "scores.json").write_text(json.dumps(new))
    compare(*arms, "--weights", EVIL, "--guidance", EVIL)
    page = Page((tmp_path / "out" / "comparison.html").read_text())
    assert "script" not in {tag for tag, _ in page.elements}
    assert not any(key.startswith("on") for _, attrs in page.elements for key in attrs)
    shown = texts["metric"].replace("\ud800", "\\ud800")
    assert page.text.count(f"{shown} (log scale)") == 3
    assert f"{shown}, lower is better" in page.text and f"guidance {EVIL}" in page.text
    images = [attrs["aria-label"] for tag, attrs in page.elements if attrs.get("role") == "img"]
    assert f"{shown} against images seen: none, branch" in images


def test_the_page_needs_nothing_else(arms, compare, tmp_path: Path):
    compare(*arms)
    page = Page((tmp_path / "out" / "comparison.html").read_text())
    tags = [tag for tag, _ in page.elements]
    assert not {"script", "link", "iframe", "object"} & set(tags)
    sources = [value for _, attrs in page.elements for key, value in attrs.items() if key == "src"]
    assert len(sources) == 2 and all(s.startswith("data:image/png;base64,") for s in sources)
    assert all(attrs.get("alt") for tag, attrs in page.elements if tag == "img")
    assert dict(page.elements)["html"]["lang"] == "en" and "title" in tags
    charts_ = [attrs["aria-label"] for tag, attrs in page.elements if attrs.get("role") == "img"]
    assert tags.count("svg") == 3 + 2 * 2  # charts; an arm's look in the table and in the legend
    assert charts_ == [
        f"fd_digits against {x}: none, branch"
        for x in ("optimizer steps", "images seen", "training time, seconds")
    ]
    assert "step 300, training seed 0" in page.text
    for words in ("better", "inconclusive", "gap −75 %", "model.objective.segments.0.scale"):
        assert words in page.text


def test_the_table_in_markdown(arms, compare, tmp_path: Path):
    compare(*arms)
    lines = (tmp_path / "out" / "comparison.md").read_text().splitlines()
    assert "| none | 0, 1 | 2.010 ± 0.014 | 1.000 | baseline | 0.1 s | 1.000 |" in lines
    assert "| branch | 0, 1 | 0.5100 ± 0.0141 | 0.254 | better | 0.2 s | 2.000 |" in lines
    assert "| reference.dataset | digits |" in lines


def test_ticks_are_short():
    numbers = [charts.number(x) for x in (0.05, 1500, 40000, 2.5e6, 0)]
    assert numbers == ["0.05", "1,500", "40K", "2.5M", "0"]


def test_styles_differ():
    looks = [charts.style(i) for i in range(140)]
    assert len({str(look) for look in looks}) == 140


def drawn(*values: float, last: int = 300, share: float | None = 0.1) -> str:
    """The chart of one arm, whose scores are equally far apart and whose last step is given."""
    points = []
    for i, value in enumerate(values, 1):
        ends = None if share is None else Interval(value - share * abs(value), value * (1 + share))
        points.append(Point(last * i // len(values), 0.0, None, value, None, ends))
    curve = charts.Curve(charts.style(0), [(float(point.step), point) for point in points])
    return charts.chart([curve], "optimizer steps", log=charts.is_log(points))


def labels(svg: str) -> list[str]:
    """The texts of a chart: x ticks, what x is, y ticks."""
    return re.findall("<text[^>]*>([^<]*)</text>", svg)


def test_axes():
    x = ["0", "100", "200", "300", "optimizer steps"]
    assert labels(drawn(8.0, 4.0, 2.0)) == [*x, "2", "4", "6", "8"]
    assert labels(drawn(43.0, 9.0, 1.2)) == [*x, "1", "2", "5", "10", "20", "50"]
    assert labels(drawn(5e4, 3.0, 1.2)) == [*x, "1", "10", "100", "1,000", "10K"]
    assert labels(drawn(0.0, 50.0, 100.0)) == [*x, "0", "25", "50", "75", "100"]
    assert labels(drawn(12.0, 50.0, 90.0)) == [*x, "20", "40", "60", "80", "100"]


ODD = [(0.0,), (2.0,), (5.0, 5.0), (-3.0, 1.0), (1e-300, 1e100), (-1e100, 1e100), (1.0, 1 + 1e-7)]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("values", quick(ODD))
def test_odd_numbers_are_drawn(values: tuple[float, ...]):
    """One point, none but 0, equal ones, far apart ones; with a band or none, at step 0."""
    for last in (0, 1, 10**15):
        for share in (0.1, None):
            svg = drawn(*values, last=last, share=share)
            assert svg.count("fill-opacity: 0.16") == (share is not None)
            assert len(labels(svg)) >= 5 and not re.search("nan|inf", svg)
            assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"


def test_the_same_chart_is_the_same_text_whatever_the_user_prefers():
    plain = drawn(8.0, 4.0, 2.0)
    with matplotlib.rc_context({"text.usetex": True, "savefig.bbox": "tight", "font.size": 40}):
        assert drawn(8.0, 4.0, 2.0) == plain


# ---- in a browser ----------------------------------------------------------------------------

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
# Runs in the page: what sticks out, what overlaps, and images without a picture.
PROBE = """
<script>
addEventListener("load", () => {
  const wide = innerWidth, bad = [];
  for (const e of document.body.querySelectorAll("*")) {
    if (wide < 1000 && e.closest(".wide")) continue; // tables scroll there
    const box = e.getBoundingClientRect();
    if (box.right > wide + 1 || box.left < -1) bad.push(`outside: ${e.tagName} ${e.textContent}`);
    const box_like = e instanceof HTMLElement && e.clientWidth;
    if (box_like && e.scrollWidth > e.clientWidth + 1) bad.push(`cut: ${e.className}`);
  }
  for (const svg of document.querySelectorAll(".chart svg")) {
    const frame = svg.getBoundingClientRect(), texts = [...svg.querySelectorAll("text")];
    const boxes = texts.map(t => t.getBoundingClientRect());
    boxes.forEach((a, i) => {
      const inside = a.left >= frame.left - 1 && a.right <= frame.right + 1
        && a.top >= frame.top - 1 && a.bottom <= frame.bottom + 1;
      if (!inside) bad.push(`clipped: ${texts[i].textContent}`);
      boxes.slice(0, i).forEach((b, j) => {
        const beside = a.left >= b.right - 1 || b.left >= a.right - 1;
        if (!beside && a.top < b.bottom - 4 && b.top < a.bottom - 4)
          bad.push(`overlap: ${texts[i].textContent} and ${texts[j].textContent}`);
      });
    });
  }
  const images = [...document.images].map(i => [i.complete, i.naturalWidth, i.naturalHeight]);
  const size = Math.min(...[...document.querySelectorAll(".chart text")].map(
    t => t.getBoundingClientRect().height));
  const found = document.createElement("pre");
  found.id = "found";
  found.textContent = JSON.stringify({bad, images, size, wide});
  document.body.append(found);
});
</script>
"""


def browse(*options: str) -> subprocess.CompletedProcess[str]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    always = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command = [CHROMIUM, *always, "--enable-logging=stderr", *options]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)


@pytest.fixture(params=[1.0, 0.0001, 300.0])
def many(make, arms, compare, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The page of ten arms, one of them with a long name, and with refused runs.

    The scores also lie between 1,000 and 9,999, and below 0.001, which makes long labels.
    """
    for i in range(8):
        for seed in (0, 1):
            values = tuple(value * (1 + 0.02 * i + 0.1 * seed) for value in (30.0, 9.0, 2.1))
            name = f"arm{i}" if i else "a_recipe_with_quite_a_long_name"
            make(f"{name}-{seed}", seed, values, 0.15, BRANCH, grid=20 * i, number=i + 1)
    make("heun-9", 9, segments=BRANCH, entry={"sampler": "Heun"}, number=99)
    for path in arms[0].parent.glob("*/scores.json"):
        scores = json.loads(path.read_text())
        for score in scores:
            # The large ones far above 0, on a linear axis.
            score["value"] = score["value"] * request.param + (1000 if request.param > 1 else 0)
        path.write_text(json.dumps(scores))
    found, _ = compare(arms[0].parent / "*")
    assert len(found["arms"]) == 10 and len(found["refused"]) == 1
    return tmp_path / "out" / "comparison.html"


@pytest.mark.slow
@pytest.mark.parametrize("width", [1366, 1920, 800])
def test_a_browser_shows_everything(many: Path, width: int):
    probed = many.with_name("probed.html")
    probed.write_text(many.read_text().replace("</body>", f"{PROBE}</body>"))
    done = browse(f"--window-size={width},768", "--dump-dom", probed.as_uri())
    found = json.loads(re.search('<pre id="found">(.*?)</pre>', done.stdout).group(1))
    assert found["wide"] == width
    assert found["bad"] == []
    assert found["images"] == [[True, 60, 40]] * 10
    assert found["size"] >= 11  # pixels of the lowest text in a chart
    assert "CONSOLE" not in done.stderr, done.stderr


@pytest.mark.slow
def test_the_probe_sees_faults(many: Path):
    """What the test above relies on: text that is too wide, broken images and errors are found."""
    text = many.read_text().replace('<h2 id="results">', '<h2 style="width:3000px">', 1)
    text = re.sub('(src="data:image/png;base64,.{40})[^"]*', r"\1", text, count=1)
    probed = many.with_name("probed.html")
    probed.write_text(text.replace("</body>", f"<script>missing()</script>{PROBE}</body>"))
    done = browse("--window-size=1366,768", "--dump-dom", probed.as_uri())
    found = json.loads(re.search('<pre id="found">(.*?)</pre>', done.stdout).group(1))
    assert "outside: H2 Results" in found["bad"]
    assert found["images"][0] != [True, 60, 40]
    assert "CONSOLE" in done.stderr


@pytest.mark.slow
def test_it_prints_on_paper(many: Path):
    """On A4, landscape; charts shrink to the page and break over none."""
    paper = many.with_name("page.pdf")
    browse("--no-pdf-header-footer", f"--print-to-pdf={paper}", many.as_uri())
    content = paper.read_bytes()
    sizes = re.findall(rb"/MediaBox\s*\[\s*0 0 ([\d.]+) ([\d.]+)\s*\]", content)
    assert 1 <= len(sizes) <= 6
    assert {(round(float(w)), round(float(h))) for w, h in sizes} == {(842, 595)}
