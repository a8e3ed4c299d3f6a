"use strict";
// Reads the document that the page holds and draws its sections.

/** The document, its diffs in a list, with what nodes share in its place in each. */
function readDocument() {
  const data = JSON.parse($("data").textContent);
  const graphs = data.graphs ?? [data];
  for (const { before, after } of graphs)
    for (const node of [...before.nodes, ...after.nodes]) {
      node.module = data.modules[node.module];
      node.source = data.sources[node.source];
    }
  return { ...data, graphs };
}

{
  const data = readDocument();
  const { graphs } = data;
  const isExplanation = "summary" in data;
  const places = new Map(graphs.map((diff, index) => [diff.name, index]));
  const addressOf = (index, side, id) => `#graph=${index}&side=${side}&node=${encodeURIComponent(id)}`;

  /** A matmul's node is in the captured graph of its number. */
  function addressOfMatmul(row) {
    const index = places.get(`graph ${row.graph}, captured`);
    return index !== undefined && row.node ? addressOf(index, "before", row.node) : null;
  }

  function addressOfPass(pass) {
    const index = places.get(`graph ${pass.graph}, ${pass.stage}`);
    return index === undefined ? null : `#graph=${index}`;
  }

  /** What the table of matmuls says about a node. */
  function factsOfNode(index, side, id) {
    const row =
      side === "before" &&
      isExplanation &&
      data.matmuls.find((each) => addressOfMatmul(each) === addressOf(index, side, id));
    return row ? [["Decision", [decisionCell(row), row.lowering && ` ${row.lowering}`]]] : [];
  }

  function drawSection(name, isShown, drawIt) {
    $(`${name}-section`).hidden = !isShown;
    if (!isShown) return;
    document.querySelector("nav").append(h("a", { href: `#${name}-section` }, $(`${name}-title`).textContent));
    drawIt();
  }

  /** Goes where an address points: #graph=0&side=after&node=mm_3, or a section. */
  function follow(address) {
    const fields = new URLSearchParams(address.slice(1));
    const index = Number(fields.get("graph"));
    if (!fields.has("graph")) goToSection($(address.slice(1)));
    if (!fields.has("graph") || !(index in graphs)) return;
    $("graph-section").scrollIntoView();
    show(index);
    if (fields.has("node")) selectNode(fields.get("side") === "after" ? "after" : "before", fields.get("node"));
    else writeAddress(address);
  }

  function goToSection(section) {
    section?.scrollIntoView();
    section?.focus({ preventScroll: true });
  }

  function setTheme(theme) {
    document.documentElement.dataset.theme = theme;
    $("theme").textContent = `Theme: ${theme}`;
  }

  measureFont();
  setTheme("auto");
  $("theme").addEventListener("click", () => {
    const themes = ["auto", "light", "dark"];
    setTheme(themes[(themes.indexOf(document.documentElement.dataset.theme) + 1) % themes.length]);
  });
  $("help-button").addEventListener("click", () => $("help").showModal());
  if (isExplanation) {
    drawSection("summary", true, () => drawSummary(data));
    drawSection("matmuls", true, () => drawMatmuls(data.matmuls, addressOfMatmul));
    drawSection("breaks", data.breaks.length > 0, () => drawBreaks(data.breaks));
    drawSection("passes", data.passes.length > 0, () => drawPasses(data.passes, addressOfPass));
  }
  const addressOfLink = (side, id) => addressOf(0, side, id);
  if (!isExplanation && data.matmuls) drawSection("matmuls", true, () => drawLinks(data.matmuls, addressOfLink));
  drawSection("graph", graphs.length > 0, () => {
    startGraph(graphs, factsOfNode);
    if (location.hash) follow(location.hash);
    addEventListener("hashchange", () => follow(location.hash));
    // In a notebook's frame such a link would load the notebook into the frame.
    document.addEventListener("click", (event) => {
      const address = event.target.closest("a")?.getAttribute("href");
      if (!address || event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      follow(address);
    });
  });
  // What the tests and the impatient ask: how long after the navigation the page was ready.
  document.documentElement.dataset.ready = Math.round(performance.now());
}
