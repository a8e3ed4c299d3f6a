"use strict";
// Layout and elements of the boxes of one side. Both are kept until something inside a box opens or closes.

const LINE = 17;
const HEADER = 28;
const PADDING = 14;
const MAX_CHIPS = 4;
const WIDTHS = { node: [128, 264], closed: [168, 300] };

let charWidth = 7.3; // of the monospaced font; measured when the page starts

function measureFont() {
  const probe = h("span", { class: "probe" }, "0".repeat(100));
  document.body.append(probe);
  charWidth = probe.getBoundingClientRect().width / 100;
  probe.remove();
}

// --- what a box says ---

const shortName = (target) =>
  target
    .replace(/^torch\.(ops\.|nn\.functional\.|_C\._nn\.)?/, "")
    .replace(/\.default$/, "")
    .replace(/^(aten|prims)\./, "");
const shortType = (dtype) =>
  dtype
    .replace(/^torch\./, "")
    .replace(/^float/, "f")
    .replace(/^bfloat/, "bf")
    .replace(/^u?int/, (name) => name[0]);

const opOf = (node) => (CALLS.includes(node.op) ? shortName(node.target) : node.op);

const resultOf = (node) => [node.shape, shortType(node.dtype)].filter(Boolean).join(" ");

function chipText(node) {
  return node.weight ? node.weight.split(".").slice(-2).join(".") : node.id;
}

function statusCounts(box) {
  return Object.entries(box.statuses).filter(([status, count]) => count && status !== "kept");
}

const isOpen = (box, open) => box.kind === "root" || (box.kind !== "node" && open.has(box.key));

// --- layout ---

/** Sets w and h of a box, and x and y of what is in it, if that is not known yet. */
function layout(box, open) {
  if (!isOpen(box, open)) {
    [box.w, box.h] = box.kind === "node" ? nodeSize(box) : closedSize(box);
    return;
  }
  if (box.lines) return;
  const graph = new dagre.graphlib.Graph();
  graph.setGraph({ rankdir: "TB", nodesep: 18, ranksep: 30, edgesep: 12, marginx: 0, marginy: 0 });
  for (const item of box.items) {
    layout(item, open);
    graph.setNode(item.index, { width: item.w, height: item.h });
  }
  for (const [from, to] of box.edges.values()) graph.setEdge(from, to, {});
  dagre.layout(graph);
  const isRoot = box.kind === "root";
  const [left, top] = isRoot ? [PADDING, PADDING] : [PADDING, HEADER + PADDING];
  const least = isRoot ? 0 : charWidth * (headerText(box).length + 4) + 40;
  const { width, height } = box.items.length ? graph.graph() : { width: 0, height: 0 };
  const shift = Math.max(0, (least - width) / 2);
  const place = isMirrored(box, graph)
    ? ({ x, y }) => [left + shift + width - x, top + y]
    : ({ x, y }) => [left + shift + x, top + y];
  for (const item of box.items) {
    const [x, y] = place(graph.node(item.index));
    item.x = x - item.w / 2;
    item.y = y - item.h / 2;
  }
  box.lines = graph.edges().map((edge) => {
    const points = graph.edge(edge).points.map(place);
    return [
      atEnd(box.items[edge.v], points[1], points.at(-1)),
      ...points.slice(1, -1),
      atEnd(box.items[edge.w], points.at(-2), points[0]),
    ];
  });
  box.w = Math.max(width, least) + 2 * PADDING;
  box.h = height + top + PADDING;
}

/** Where a line meets a box: on its lower or upper side, towards the line's next point. */
function atEnd(item, [x], [, otherEnd]) {
  const inset = Math.min(12, item.w / 4);
  return [clamp(x, item.x + inset, item.x + item.w - inset), otherEnd > item.y + item.h / 2 ? item.y + item.h : item.y];
}

/** Whether most boxes stand right of those that follow them in the graph: q, k, v should not be drawn as v, k, q. */
function isMirrored({ items }, graph) {
  const sorted = [...items].sort((a, b) => (a.order ?? a.index) - (b.order ?? b.index));
  let balance = 0;
  sorted.forEach((first, index) => {
    const a = graph.node(first.index);
    for (const second of sorted.slice(index + 1)) {
      const b = graph.node(second.index);
      if (Math.abs(a.y - b.y) < (first.h + second.h) / 2) balance += Math.sign(b.x - a.x);
    }
  });
  return balance < 0;
}

function nodeSize({ node, chips }) {
  const detail = resultOf(node);
  const lengths = [
    opOf(node).length + node.status.length + 4,
    node.id.length,
    detail.length,
    ...chips.slice(0, MAX_CHIPS).map((chip) => chipText(chip).length + 3),
  ];
  const lines = 2 + Number(detail !== "") + Math.min(chips.length, MAX_CHIPS + 1) * 1.24;
  return [clamp(Math.max(...lengths) * charWidth + 32, ...WIDTHS.node), lines * LINE + 13];
}

function closedSize(box) {
  const counts = statusCounts(box).map(([status, count]) => `${count} ${status}`.length + 3);
  const width =
    Math.max(
      headerText(box).length + 4,
      counts.reduce((sum, length) => sum + length, 0),
    ) *
      charWidth +
    26;
  return [clamp(width, ...WIDTHS.closed), (counts.length ? 3 : 2) * LINE + 15];
}

const headerText = (box) =>
  [box.label, box.kind === "fold" && `×${box.items.length}`, box.type].filter(Boolean).join(" ");

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

/** Forgets the layout and elements of a box and of all around it. */
function invalidate(box) {
  for (; box; box = box.parent) box.lines = box.element = null;
}

// --- elements ---

/** The element of a box at its place in its container; `side` keeps which box an element shows. */
function draw(box, open, side) {
  if (!box.element) {
    const opened = isOpen(box, open);
    if (box.kind === "node") box.element = drawNode(box);
    else box.element = opened ? drawOpen(box, open, side) : drawClosed(box);
    if (box.kind !== "root") {
      box.element.setAttribute("role", "treeitem");
      box.element.setAttribute("aria-level", box.depth);
      box.element.setAttribute("aria-label", describe(box));
      box.element.setAttribute("tabindex", "-1");
      if (box.kind !== "node") box.element.setAttribute("aria-expanded", String(opened));
    }
    side.shown.set(box.element, box);
  }
  if (box.kind !== "root") box.element.style.transform = `translate(${box.x}px, ${box.y}px)`;
  box.element.style.width = `${box.w}px`;
  box.element.style.height = `${box.h}px`;
  return box.element;
}

function drawNode({ node, chips, hasHiddenInput, hasHiddenReader }) {
  const detail = resultOf(node);
  const more = chips.length - MAX_CHIPS;
  return h(
    "div",
    { class: `box node s-${node.status}` },
    hiddenEdges(hasHiddenInput, hasHiddenReader),
    h(
      "div",
      { class: "top" },
      glyph(node.status),
      h("b", { title: node.target }, opOf(node)),
      h("span", { class: "word" }, node.status),
    ),
    h("div", { class: "id" }, node.id),
    detail && h("div", { class: "shape" }, detail),
    chips.slice(0, MAX_CHIPS).map((chip) => drawChip(chip)),
    more > 0 && h("div", { class: "chip more" }, `and ${more} more`),
  );
}

function drawChip(node) {
  const mark =
    node.status === "kept" ? h("span", { "aria-hidden": "true" }, node.weight ? "W" : "→") : glyph(node.status);
  const title = [node.weight || node.id, node.shape, node.dtype, node.status].filter(Boolean).join(", ");
  return h("div", { class: `chip s-${node.status}`, title, "data-id": node.id }, mark, " ", chipText(node));
}

// Edges that would leave the container, or would be too many: drawn when the box is selected, hinted at before.
function hiddenEdges(above, below) {
  return [
    above && h("i", { class: "stub above", title: "reads more: select to see" }),
    below && h("i", { class: "stub below", title: "is read elsewhere: select to see" }),
  ];
}

function drawClosed(box) {
  const counts = statusCounts(box).map(([status, count]) =>
    h("span", { class: `s-${status}` }, glyph(status), ` ${integer(count)} ${status}`),
  );
  const layers = box.kind === "fold" && `${plural(box.items.length, "identical layer")}, `;
  return h(
    "div",
    { class: `box module closed ${box.kind}` },
    hiddenEdges(box.hasHiddenInput, box.hasHiddenReader),
    drawHeader(box, "▸"),
    h("div", { class: "id" }, layers, plural(box.count, "node"), box.kind === "calm" && ", unchanged"),
    counts.length > 0 && h("div", { class: "counts" }, counts),
  );
}

function drawHeader(box, arrow) {
  const times = box.kind === "fold" && h("span", { class: "times" }, `×${box.items.length}`);
  return h(
    "div",
    { class: "top" },
    h("span", { class: "arrow", "aria-hidden": "true" }, arrow),
    h("b", { title: box.path }, box.label),
    times,
    box.type && h("span", { class: "type" }, box.type),
  );
}

function drawOpen(box, open, side) {
  const items = box.items.map((item) => draw(item, open, side));
  const edges = drawEdges(box);
  if (box.kind === "root") return h("div", { class: "root" }, edges, items);
  const parity = box.depth % 2 ? "odd" : "even";
  return h(
    "div",
    { class: `box module open ${parity} ${box.kind}` },
    hiddenEdges(box.hasHiddenInput, box.hasHiddenReader),
    drawHeader(box, "▾"),
    edges,
    h("div", { role: "group" }, items),
  );
}

function drawEdges(box) {
  const lines = box.lines.map(curve).join("");
  const heads = box.lines.map(([...points]) => arrowHead(points.at(-2), points.at(-1))).join("");
  return svg(
    "svg",
    { class: "edges", width: box.w, height: box.h, "aria-hidden": "true" },
    svg("path", { class: "line", d: lines }),
    svg("path", { class: "head", d: heads }),
  );
}

/** Curves that leave and enter boxes upright. */
function curve(points) {
  let [x, y] = points[0];
  let path = `M${round(x)},${round(y)}`;
  for (const [nextX, nextY] of points.slice(1)) {
    const middle = round((y + nextY) / 2);
    path += `C${round(x)},${middle} ${round(nextX)},${middle} ${round(nextX)},${round(nextY)}`;
    [x, y] = [nextX, nextY];
  }
  return path;
}

function arrowHead([, fromY], [x, y]) {
  const back = y < fromY ? 7 : -7;
  return `M${round(x)},${round(y)}l-3,${back}h6Z`;
}

const round = (value) => Math.round(10 * value) / 10;

/** A box in words, for those who do not see it. */
function describe(box) {
  if (box.kind === "node") {
    const { node, chips } = box;
    const reads = chips.map((chip) => chip.weight || chip.id).slice(0, MAX_CHIPS);
    return [opOf(node), node.id, node.status, node.shape, node.dtype, reads.length && `reads ${reads.join(", ")}`]
      .filter(Boolean)
      .join(", ");
  }
  const counts = statusCounts(box).map(([status, count]) => `${count} ${status}`);
  const layers = box.kind === "fold" && `${box.items.length} identical layers`;
  return [box.label, box.type, layers, plural(box.count, "node"), ...counts].filter(Boolean).join(", ");
}

// --- where boxes are ---

/** Left and top of a box in its side, and its size. */
function placeOf(box) {
  let [x, y] = [0, 0];
  for (let each = box; each.parent; each = each.parent) {
    x += each.x;
    y += each.y;
  }
  return { x, y, w: box.w, h: box.h };
}

/** The box that shows a node or module: itself, or the outermost closed one around it. */
function visible(box, open) {
  let found = box;
  for (let each = box.parent; each; each = each.parent) if (!isOpen(each, open)) found = each;
  return found;
}
