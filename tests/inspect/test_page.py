"""The page in headless Chromium, on documents of a LLaMA-like model of any depth."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slcompile.inspect.page import render
from tests.inspect.documents import HOSTILE, diff_document, explanation, graphs, node, parameter, written

try:
    from playwright.sync_api import sync_playwright
except ImportError:
    sync_playwright = None

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
FLAGS += ["--disable-sync", "--no-first-run"]
MISSING = [
    "playwright (pip install 'slcompile[test]')" if sync_playwright is None else "",
    "chromium on the PATH (apt install chromium)" if CHROMIUM is None else "",
]


def needs_browser(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that is skipped where there is no browser; in CI that is a failure (tests/conftest.py)."""
    test = pytest.mark.skipif(any(MISSING), reason=f"needs {' and '.join(filter(None, MISSING))}")(test)
    return pytest.mark.browser(test)


# The page's typography, by name: linters take these for letters.
TIMES, MINUS, EN_DASH = "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}", "\N{EN DASH}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens a document's page from a file; afterwards there was neither an error nor a request to anything else."""
    seen: list[str] = []
    contexts = []

    def start(document: dict, address: str = "", **context: Any) -> Any:
        path = tmp_path / "page.html"
        path.write_text(render(written(document)), encoding="utf-8")
        contexts.append(browser.new_context(viewport={"width": 1500, "height": 950}, **context))
        contexts[-1].set_default_timeout(30_000)
        page = contexts[-1].new_page()
        page.on("console", lambda message: seen.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith(path.as_uri()) else seen.append(request.url))
        page.goto(path.as_uri() + address)
        page.wait_for_selector("html[data-ready]")
        return page

    yield start
    for context in contexts:
        context.close()
    assert seen == []


def box(page: Any, side: str, name: str) -> Any:
    """The node or module that says this name, in one of the panes."""
    return page.locator(f'.pane[data-side="{side}"] .box', has=page.get_by_text(name, exact=True)).last


def address(page: Any) -> str:
    return page.evaluate("location.hash")


@needs_browser
def test_counts_equal_the_document(visit):
    document = explanation(3)
    page = visit(document)
    text = page.inner_text("#summary")
    for expected in ("15 / 16", "5.26 M → 3.45 M", f"{TIMES} 0.66", "84.2 MB → 55.2 MB", "8.20 GFLOP → 9.10 GFLOP"):
        assert expected in text
    for status, count in written(document)["graphs"][0]["counts"].items():
        assert page.inner_text(f'[data-count="{status}"]').split()[1:] == [str(count), status]
    for side in ("before", "after"):
        nodes = document["graphs"][0][side]["nodes"]
        assert f"{len(nodes)} nodes" in page.inner_text(f'.pane[data-side="{side}"] h3')
        boxes = page.evaluate("(side) => buildDiff(readDocument().graphs[0]).sides[side].root", side)
        shown = [each for each in nodes if not each["weight"]]
        assert boxes["count"] == len(shown)
        assert boxes["statuses"]["kept"] == sum(each["status"] == "kept" for each in shown)


@needs_browser
def test_matmuls_are_folded_filtered_and_sorted(visit):
    page = visit(explanation(24))
    rows = page.locator("table.matmuls tbody tr")
    assert rows.count() == 6
    assert "121 of 121 matmuls" in page.inner_text("#matmuls")
    page.locator(".unfold").first.click()
    assert rows.count() == 6 + 23
    page.locator(".unfold").first.click()

    page.get_by_label("Decision").select_option("left")
    assert rows.count() == 1
    assert "excluded" in rows.inner_text()
    page.get_by_label("Decision").select_option("")
    page.get_by_label("Filter matmuls").fill("layers.7.mlp")
    assert rows.count() == 1
    page.get_by_label("Filter matmuls").fill("no such name")
    assert "No matmul" in rows.inner_text()
    page.get_by_label("Filter matmuls").fill("")

    page.get_by_role("button", name="Bytes").click()
    assert "q_proj" in rows.first.inner_text()
    page.get_by_role("button", name="Bytes").click()
    assert "lm_head" in rows.first.inner_text()
    assert page.locator("th[aria-sort=descending]").inner_text().startswith("Bytes")


@needs_browser
def test_a_matmul_leads_to_its_node(visit):
    page = visit(explanation(24))
    page.locator("tr.link").first.locator("td").nth(1).click()
    assert address(page) == "#graph=0&side=before&node=mm_model_layers_0_self_attn_q_proj"
    assert "rewritten" in page.locator(".box.selected").inner_text()
    assert "replaced" in page.inner_text("#details")
    # Its counterpart on the other side is marked, and in sight.
    linked = page.locator('.pane[data-side="after"] .box.linked')
    assert "mm_model_layers_0_self_attn_q_proj" in linked.inner_text()
    assert linked.evaluate(
        """(each) => {
            const [inner, outer] = [each, each.closest(".scroller")].map((element) => element.getBoundingClientRect());
            return inner.top >= outer.top && inner.bottom <= outer.bottom;
        }"""
    )


@needs_browser
def test_passes_show_their_diffs(visit):
    page = visit(explanation(2))
    assert "1 of 2 passes changed a graph" in page.inner_text("#passes")
    assert "unchanged" in page.locator("#passes li").nth(1).inner_text()
    assert page.locator("#passes pre").count() == 0
    page.locator("summary.pass").click()
    assert page.locator("#passes pre .s-new").inner_text() == "+ compose = slcompile.compose(B, A)"
    assert page.locator("#passes pre .s-removed").inner_text().startswith("- t = ")
    assert "call to print" in page.inner_text("#breaks")


@needs_browser
def test_search_finds_a_weight(visit):
    page = visit(explanation(24))
    page.keyboard.press("/")
    page.keyboard.type("layers.5.self_attn.k_proj.weight")
    assert page.locator("#results [role=option]").first.inner_text().split("\n")[1] == (
        "model.layers.5.self_attn.k_proj.weight"
    )
    page.keyboard.press("Enter")
    assert address(page) == "#graph=0&side=before&node=p_model_layers_5_self_attn_k_proj_weight"
    # A parameter is a chip in the node that reads it.
    assert page.locator(".box.selected .chip.selected").inner_text() == f"{MINUS} k_proj.weight"
    page.keyboard.press("/")
    page.keyboard.type("nowhere")
    assert "Nothing found" in page.inner_text("#results")
    page.keyboard.press("Escape")
    assert page.locator("#results").is_hidden()


@needs_browser
def test_modules_open_and_close_on_both_sides(visit):
    page = visit(explanation(24))
    folded = box(page, "before", f"layers.0{EN_DASH}23")
    assert f"{TIMES}24" in folded.inner_text()
    assert "24 identical layers" in folded.inner_text()
    folded.click()
    for side in ("before", "after"):
        assert page.locator(f'.pane[data-side="{side}"] .box.closed', has_text="LlamaDecoderLayer").count() == 24
    box(page, "after", "layers.3").click()
    assert box(page, "before", "norm_3").count() == 1
    page.locator('.pane[data-side="before"] .top', has_text=f"layers.0{EN_DASH}23").click()
    assert page.locator(".box", has_text="norm_3").count() == 0
    box(page, "before", f"layers.0{EN_DASH}23").click()
    assert box(page, "before", "norm_3").count() == 1  # what was open inside stays open
    page.get_by_role("button", name="Collapse all").click()
    assert page.locator(".box.closed", has_text=f"{TIMES}24").count() == 2


@needs_browser
def test_layers_that_differ_are_not_folded(visit):
    document = explanation(5)
    for shown in document["graphs"][0]["after"]["nodes"]:
        if shown["id"] == "mm_model_layers_2_mlp_up_proj":
            shown["status"] = "kept"
    page = visit(document)
    labels = page.locator('.pane[data-side="before"] .box', has_text="LlamaDecoderLayer").locator("b").all_inner_texts()
    assert [label for label in labels if label.startswith("layers")] == [
        f"layers.0{EN_DASH}1",
        "layers.2",
        f"layers.3{EN_DASH}4",
    ]


@needs_browser
def test_unchanged_nodes_stand_together_where_there_are_many(visit):
    page = visit(explanation(1, elementwise=20))
    calm = page.locator(".box.calm.closed", has_text="mul_0_0 … mul_0_19")
    assert calm.count() == 2
    assert "unchanged" in calm.first.inner_text()
    assert "20 nodes" in calm.first.inner_text()
    page.evaluate("location.hash = 'graph=0&side=after&node=mul_0_7'")
    page.wait_for_selector(".box.linked")
    assert "mul_0_7" in page.locator('.pane[data-side="before"] .box.linked').inner_text()


@needs_browser
def test_links_lead_from_a_rewritten_node_to_its_origin(visit):
    page = visit(explanation(2), "#graph=0&side=after&node=mm_model_layers_1_mlp_up_proj")
    assert "Came from" in page.inner_text("#details")
    page.locator("#details dd", has=page.locator("a")).first.locator("a").click()
    assert address(page) == "#graph=0&side=before&node=mm_model_layers_1_mlp_up_proj"
    assert "Became" in page.inner_text("#details")


@needs_browser
def test_an_address_that_leads_nowhere_says_so(visit):
    page = visit(explanation(1), "#graph=0&side=before&node=mm_99")
    assert page.inner_text("#details") == 'This graph has no node "mm_99" before.'
    assert page.locator(".box.selected").count() == 0


@needs_browser
def test_changes_are_stepped_through_from_the_selection(visit):
    page = visit(explanation(24))
    page.get_by_role("button", name="rewritten").click()
    assert "rewritten" in page.locator(".box.selected").inner_text()
    page.evaluate("location.hash = 'graph=0&side=after&node=mm_model_layers_0_mlp_up_proj'")
    page.wait_for_function("document.getElementById('change').textContent === 'change 20 of 20'")
    page.get_by_role("button", name="Next change").click()
    assert page.inner_text("#change") == "change 1 of 20"  # nodes of the other 23 layers are not visited
    page.locator("#stage").select_option("1")
    assert address(page) == "#graph=1"


@needs_browser
def test_keyboard(visit):
    page = visit(explanation(24))
    page.locator('.pane[data-side="before"] .world').focus()
    page.keyboard.press("ArrowDown")  # the first box, then into the model, down to the folded layers
    assert address(page) == "#graph=0&side=before&node=input_ids"

    def focused() -> str:
        return page.evaluate("document.activeElement.getAttribute('aria-label')")

    visited = [focused()]
    for _ in range(8):
        page.keyboard.press("ArrowDown")
        visited.append(focused())
        if "identical layers" in visited[-1]:
            break
    assert visited[0].startswith("placeholder, input_ids, kept")
    assert visited[-1].startswith(f"layers.0{EN_DASH}23, LlamaDecoderLayer, 24 identical layers")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.getAttribute('aria-expanded')") == "true"
    page.keyboard.press("ArrowDown")
    assert focused().startswith("layers.0, LlamaDecoderLayer")
    page.keyboard.press("ArrowDown")
    assert focused().startswith("layers.1, LlamaDecoderLayer")
    page.keyboard.press("o")
    assert page.evaluate("document.activeElement.closest('.pane').dataset.side") == "after"
    page.keyboard.press("Escape")
    assert page.locator(".box.selected").count() == 0
    page.keyboard.press("n")
    assert page.inner_text("#change") == "change 1 of 20"
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    assert page.locator("#help").is_hidden()


@needs_browser
def test_arrows_go_to_what_stands_beside(visit):
    page = visit(explanation(1), "#graph=0&side=before&node=mm_model_layers_0_self_attn_q_proj")
    page.keyboard.press("ArrowUp")  # the transposed weight, then its module, beside that of k
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("k_proj, Linear")


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(visit, scheme):
    page = visit(explanation(1), color_scheme=scheme)

    def brightness() -> int:
        return sum(map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]))

    assert (brightness() > 600) == (scheme == "light")
    page.get_by_role("button", name="Theme: auto").click()
    assert brightness() > 600
    page.get_by_role("button", name="Theme: light").click()
    assert brightness() < 150


@needs_browser
def test_a_graph_diff_alone(visit):
    page = visit(diff_document(*graphs(2, 1), name="a.onnx, b.onnx"))
    assert page.locator("section:visible h2").all_inner_texts() == ["Graph"]
    assert "a.onnx, b.onnx" in page.title()
    assert page.locator(".pane .box").count() > 4


@needs_browser
def test_the_matmuls_of_a_model_and_its_export_are_linked(visit):
    document = diff_document(*graphs(1, 1), name="model -> a.onnx")
    name = "mm_model_layers_0_mlp_up_proj"
    document["matmuls"] = [
        {"weight": "model.layers.0.mlp.up_proj.weight", "before": name, "after": name},
        {"weight": HOSTILE, "before": "norm_0", "after": ""},
        {"weight": "strange", "before": "", "after": "norm_0"},
    ]
    page = visit(document)
    rows = page.locator("#matmuls tbody tr")
    assert [row.split("\t")[1:] for row in rows.all_inner_texts()] == [
        ["○ only before", "norm_0", "missing"],
        ["○ only after", "missing", "norm_0"],
        ["✓ in both", name, name],
    ]
    rows.last.locator("a").last.click()
    assert address(page) == f"#graph=0&side=after&node={name}"
    assert name in page.locator('.pane[data-side="before"] .box.linked').inner_text()


@needs_browser
def test_an_empty_side_is_shown(visit):
    page = visit(diff_document([], graphs(1, 1)[1]))
    assert "0 nodes" in page.inner_text('.pane[data-side="before"] h3')
    page.keyboard.press("n")
    assert page.locator('.pane[data-side="after"] .box.selected').count() == 1


@needs_browser
def test_a_joint_graph_is_split_into_phases(visit):
    nodes = [
        node("primals_1", "primals_1", [], [], op="placeholder", weight="weight"),
        node("tangents_1", "tangents_1", [], [], op="placeholder"),
        node("x", "x", [], [], op="placeholder"),
        node("t", "aten.t.default", ["primals_1"], [["fc", "Linear"]]),
        node("mm", "aten.mm.default", ["x", "t"], [["fc", "Linear"]]),
        node("t_1", "aten.t.default", ["x"], [["fc", "Linear"]]),
        node("mm_1", "aten.mm.default", ["t_1", "tangents_1"], [["fc", "Linear"]]),
        node("output", "output", ["mm", "mm_1"], [], op="output"),
    ]
    page = visit(diff_document(nodes, copy.deepcopy(nodes), "graph 0, joint"))
    phases = page.locator('.pane[data-side="after"] .box.phase')
    assert phases.count() == 2
    assert phases.locator("> .top b").all_inner_texts() == ["FORWARD", "BACKWARD"]
    assert "t_1" in phases.nth(1).inner_text()  # reads no tangents, but only the backward pass reads it


@needs_browser
def test_nodes_without_a_module_are_drawn_where_they_belong(visit):
    layer = [["layers.0", "Layer"], ["layers.0.fc", "Linear"]]
    before = [
        node("x", "x", [], [], op="placeholder"),
        parameter("layers.0.fc.weight"),
        node("mm", "aten.mm.default", ["x", "p_layers_0_fc_weight"], layer),
        node("loss", "aten.sum.default", ["mm"], []),
    ]
    after = [
        *before[:1],
        parameter("layers.0.fc.weight_sl.B", "new"),
        node("compose", "slcompile.compose.default", ["p_layers_0_fc_weight_sl_B"], [], "new"),
        node("mul", "aten.mul.Tensor", ["compose"], [], "new"),
        node("iota", "prims.iota.default", [], [], "new"),
        node("mm", "aten.mm.default", ["iota", "mul"], layer, "rewritten"),
        before[-1],
    ]
    page = visit(diff_document(before, after))
    places = page.evaluate("Object.fromEntries([...sideOf('after').boxes].map(([id, box]) => [id, box.parent.path]))")
    assert {name for name, place in places.items() if place == "layers.0.fc"} == {"compose", "mul", "iota", "mm"}
    assert places["loss"] == ""


@needs_browser
def test_hostile_names_are_text(visit):
    document = explanation(2)
    document["model"] = HOSTILE
    document["matmuls"][0] |= {"name": HOSTILE, "detail": HOSTILE, "source": HOSTILE}
    document["passes"][0] |= {"name": HOSTILE, "diff": f"+ {HOSTILE}"}
    document["breaks"][0]["reason"] = HOSTILE
    for shown in document["graphs"][0]["before"]["nodes"]:
        shown |= {"target": HOSTILE, "args": HOSTILE, "source": HOSTILE, "shape": HOSTILE}
        shown["module"] = [[path, HOSTILE] for path, _ in shown["module"]]
    page = visit(document)
    page.keyboard.press("n")
    page.locator("summary.pass").click()
    page.keyboard.press("/")
    page.keyboard.type("<img")
    page.keyboard.press("Enter")
    assert HOSTILE in page.inner_text("h1")
    assert HOSTILE in page.inner_text("#details")
    assert page.locator("img").count() == 0
    assert page.evaluate("window.hit") is None


@needs_browser
def test_a_page_in_a_frame_without_an_address(browser, visit, tmp_path):
    page = visit(explanation(2))
    page.evaluate(
        """(text) => new Promise((resolve) => {
            const frame = document.createElement("iframe");
            frame.srcdoc = text;
            frame.onload = resolve;
            document.body.replaceChildren(frame);
        })""",
        render(written(explanation(2))),
    )
    frame = page.frames[-1]
    frame.locator("tr.link a").first.evaluate("(link) => link.click()")
    assert "q_proj" in frame.locator(".box.selected").inner_text()
    assert frame.url == "about:srcdoc"


@needs_browser
@pytest.mark.parametrize(("layers", "elementwise", "is_flat"), [(24, 2, False), (80, 36, False), (80, 36, True)])
def test_large_graphs_open_with_few_boxes(visit, layers, elementwise, is_flat):
    """What is drawn, not what there is, decides how long a page takes."""
    document = explanation(layers, elementwise)
    nodes = [each for side in ("before", "after") for each in document["graphs"][0][side]["nodes"]]
    if is_flat:
        for node in nodes:
            node["module"] = []
    page = visit(document)
    boxes = page.locator(".box")
    assert boxes.count() < 100
    for _ in range(3):
        page.locator(".box.closed").first.evaluate("(element) => element.click()")
    last = f"add_{layers - 1}_1"
    page.evaluate("(id) => { location.hash = `graph=0&side=after&node=${id}`; }", last)
    page.wait_for_selector(".box.selected")
    assert last in page.locator(".box.selected").inner_text()
    assert boxes.count() < 600
    assert len(nodes) > (1_000 if layers == 24 else 10_000)
