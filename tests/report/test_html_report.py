"""The HTML report: self-contained, escaped, the loss above everything, the figures true to the document."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import sample_documents as samples
from hypothesis import given
from hypothesis import strategies as st

from rlquant.errors import InputError
from rlquant.report import render_report
from rlquant.report.figures import pareto_front

EVIL = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">'{{7*7}}"
)


class Page(HTMLParser):
    """Elements as (tag, attributes) and, apart, the text of scripts and the visible text."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.scripts, self.text, self.banners = [], [], "", []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.cdata_elem == "script":
            self.scripts[-1] += data
        elif self.cdata_elem is None:
            self.text += data

    def classes(self):
        return [attributes.get("class", "") or "" for _, attributes in self.elements]

    def figures(self):
        return json.loads(self.scripts[0])


@pytest.fixture(scope="module")
def pages():
    return {make.__name__: Page(render_report(make())) for make in samples.ALL}


def test_nothing_is_loaded_from_elsewhere(pages):
    for page in pages.values():
        for tag, attributes in page.elements:
            assert tag not in {"link", "iframe", "object", "embed", "img", "base"}
            assert not {"src", "href", "action"} & set(attributes)


def test_the_security_policy_admits_the_two_scripts_and_no_network(pages):
    page = pages["cartpole"]
    data, plotly, drawing = page.scripts
    (policy,) = (a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; ")
    allowed = set(re.findall(r"'(sha256-[^']+)'", policy))
    assert allowed == {
        f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"
        for script in (plotly, drawing)
    }
    assert "unsafe-eval" not in policy
    assert "plotly.js v" in plotly[:300]
    assert json.loads(data)


def test_a_loss_stands_above_everything(pages):
    page = pages["heavy_loss"]
    order = [c for c in page.classes() if c.startswith("banner")]
    assert order == ["banner lost", "banner undecided"]
    tags = [tag for tag, _ in page.elements]
    assert page.classes().index("banner lost") < tags.index("h1")
    assert "int8 LOSES 92.6% of the reward" in page.text
    assert page.text.index("LOSES") < page.text.index("DQN on CartPole-v1", page.text.index("LOSES"))


def test_without_a_loss_there_is_no_red(pages):
    for name in ("bad_reference", "reference_only"):
        assert not [c for c in pages[name].classes() if c.split()[-1:] == ["lost"]]
    assert "nothing to compare" in pages["reference_only"].text


def test_every_row_has_its_verdict_in_the_table(pages):
    for make in samples.ALL:
        document, page = make(), pages[make.__name__]
        chips = [c.split()[1] for c in page.classes() if c.startswith("chip")]
        assert chips == ["reference", *(row["retention"]["verdict"] for row in document["rows"][1:])]


def test_the_retention_figure_shows_the_document(pages):
    for make in samples.ALL:
        document, figure = make(), pages[make.__name__].figures()["retention"]
        known = [row for row in document["rows"] if row["retention"]["value"] is not None]
        drawn = [trace for trace in figure["data"] if trace["mode"] == "markers"]
        assert [trace["x"] for trace in drawn] == [[row["retention"]["value"]] for row in known]
        assert [trace["y"] for trace in drawn] == [[row["precision"]] for row in known]
        lines = [shape["x0"] for shape in figure["layout"]["shapes"]]
        assert lines == [1.0, 1 - document["settings"]["margin"]]


def test_every_episode_is_drawn_and_seeds_keep_their_place(pages):
    document, figure = samples.heavy_loss(), pages["heavy_loss"].figures()["episodes"]
    points = [trace for trace in figure["data"] if trace.get("mode") == "markers"]
    assert [trace["y"] for trace in points] == [row["score"]["episodes"] for row in document["rows"]]
    offsets = [[round(x - i, 9) for x in trace["x"]] for i, trace in enumerate(points)]
    assert all(row == offsets[0] for row in offsets)


def test_many_episodes_are_drawn_as_boxes_alone():
    document = samples.heavy_loss()
    for row in document["rows"]:
        row["score"]["episodes"] *= 100
    figure = Page(render_report(document)).figures()["episodes"]
    assert {trace["type"] for trace in figure["data"]} == {"box"}


def test_simulated_latencies_are_hollow_and_not_in_the_front(pages):
    figure = pages["cartpole"].figures()["latency"]
    front, *points = figure["data"]
    assert len(front["x"]) == 1  # only fp32 was really timed
    symbols = {trace["text"][0]: trace["marker"]["symbol"] for trace in points}
    assert symbols["fp32"] == "square"
    assert all(symbol.endswith("-open") for name, symbol in symbols.items() if name != "fp32")


def test_what_was_not_measured_is_left_out(pages):
    page = pages["language"]
    assert "latency" not in page.figures()
    assert page.figures()["weights"] == {}
    identifiers = {attributes.get("id") for _, attributes in page.elements}
    assert not {"figure-latency", "figure-weights"} & identifiers
    assert "Latency" not in page.text
    assert "reward" not in page.text.lower()
    assert "64 windows" in page.text


def test_weights_have_one_histogram_per_layer(pages):
    weights = pages["cartpole"].figures()["weights"]
    assert list(weights) == ["int8", "w8a8", "int4", "w4a8"]
    titles = [figure["layout"]["title"]["text"].split(" ")[0] for figure in weights["int4"]]
    assert titles == ["actor.0", "actor.2", "actor.4"]


def evil_document():
    document = samples.heavy_loss()
    document["subject"] |= {"algorithm": EVIL, "env": EVIL, "source": EVIL, "sha256": EVIL}
    document["machine"][EVIL] = EVIL
    document["settings"]["nested"] = {EVIL: [EVIL]}
    row = document["rows"][2]
    row |= {"precision": EVIL, "method": EVIL, "runtime": EVIL}
    row["retention"]["reason"] = EVIL
    row["weights"][0]["layer"] = EVIL
    return document


def test_text_of_the_document_cannot_become_markup():
    page = Page(render_report(evil_document()))
    plain = Page(render_report(samples.heavy_loss()))
    assert sorted(tag for tag, _ in page.elements if tag not in {"dt", "dd"}) == sorted(
        tag for tag, _ in plain.elements if tag not in {"dt", "dd"}
    )
    assert len(page.scripts) == 3
    assert not [a for _, attributes in page.elements for a in attributes if a.startswith("on")]
    assert EVIL in page.text
    assert not set("<>&") & set(page.scripts[0])
    labels = json.dumps(page.figures()["retention"])
    assert "<img" not in labels
    assert "&lt;img" in labels  # Plotly reads markup in labels, so they arrive escaped


def test_optional_parts_may_be_missing():
    document = samples.heavy_loss()
    for key in ("algorithm", "env", "parameters", "sha256"):
        del document["subject"][key]
    for row in document["rows"]:
        del row["weights"], row["score"]["worst_decile"], row["agreement"]["q_gap"]
        del row["retention"]["more_episodes"], row["retention"]["reason"]
    document["reference"]["random_score"] = None
    assert "zoo/dqn/CartPole-v1_1" in Page(render_report(document)).text


def test_the_same_document_gives_the_same_page():
    assert render_report(samples.language()) == render_report(samples.language())


def test_a_document_that_does_not_fit_is_refused():
    with pytest.raises(InputError, match="not a results document"):
        render_report({})


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=12))
def test_the_pareto_front_is_what_no_point_beats(points):
    costs, scores = [c for c, _ in points], [s for _, s in points]
    beaten = {
        p for p in points for q in points if q != p and q[0] <= p[0] and q[1] >= p[1]
    }  # q at least as good in both, and not the same point
    front = [points[i] for i in pareto_front(costs, scores)]
    assert sorted(front) == front
    assert set(front) == set(points) - beaten
    assert len(front) == len(set(front))


def test_importing_the_report_loads_nothing_heavy():
    program = (
        "import sys, rlquant.report; print(*sorted({'plotly', 'jinja2', 'rich', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True)
    assert done.stdout.strip() == ""


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium to open the page in")
def test_a_browser_draws_every_figure_and_runs_nothing_foreign(tmp_path):
    page = tmp_path / "report.html"
    page.write_text(render_report(evil_document()), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [CHROMIUM, *flags, "--virtual-time-budget=8000", "--dump-dom", page.as_uri()],
        capture_output=True,
        check=True,
        text=True,
        timeout=120,
    )
    dom = Page(done.stdout)
    drawn = [a["id"] for _, a in dom.elements if "js-plotly-plot" in (a.get("class") or "") and "id" in a]
    assert drawn == ["figure-retention", "figure-size", "figure-latency", "figure-episodes"]
    assert dom.classes().count("js-plotly-plot") == 4 + len(samples.LAYERS)
    assert not re.search(r"<title>owned", done.stdout)
