"use strict";
// The two panes of the graph section: what they show, their scale and place, and which modules are open.

const FIRST_VIEW = 24; // boxes that a graph opens to, if its modules allow

// `diffs` and `factsOf` come from the document (see startGraph); `state.diff` is the tree of the graph that is shown.
let diffs = [];
let factsOf = null;
const built = new Map();
const state = { index: -1, diff: null, show: "both", selected: null, step: -1 };
const panes = { before: createPane("before"), after: createPane("after") };

const other = (side) => (side === "before" ? "after" : "before");
const sideOf = (name) => state.diff.sides[name];
const eachPane = (action) => Object.values(panes).forEach(action);

function createPane(name) {
  const world = h("div", { class: "world", role: "tree", "aria-label": `Graph ${name}`, tabindex: "0" });
  const sizer = h("div", { class: "sizer" }, world);
  const scroller = h("div", { class: "scroller" }, sizer);
  const count = h("span", { class: "muted" });
  const element = h(
    "div",
    { class: "pane", "data-side": name },
    h("h3", {}, name === "before" ? "Before " : "After ", count),
    scroller,
  );
  document.querySelector(".panes").append(element);
  return { name, world, sizer, scroller, count, element, zoom: 1, shown: new WeakMap() };
}

// --- drawing ---

function show(index) {
  if (index === state.index) return;
  if (!built.has(index)) {
    const diff = buildDiff(diffs[index]);
    openFirst(diff);
    built.set(index, diff);
  }
  Object.assign(state, { index, diff: built.get(index), selected: null, step: -1 });
  $("stage").value = String(index);
  drawLegend();
  drawSides();
  drawDetails();
  eachPane(fit);
  showStep();
}

/** Opens containers from the outside in, while the boxes on each side stay few. */
function openFirst({ sides, open }) {
  const sizeOf = (key) => Math.max(...Object.values(sides).map((side) => side.containers.get(key)?.items.length ?? 0));
  for (const { root } of Object.values(sides)) {
    const queue = [root];
    let count = 0;
    while (queue.length) {
      const box = queue.shift();
      const size = sizeOf(box.key);
      if (box.kind !== "root" && size > 1 && count + size > FIRST_VIEW) continue;
      count += size - 1;
      if (box.kind !== "root") open.add(box.key);
      queue.push(...box.items.filter((item) => !["node", "fold", "calm"].includes(item.kind)));
    }
  }
}

function drawSides() {
  for (const pane of Object.values(panes)) {
    const { root } = sideOf(pane.name);
    layout(root, state.diff.open);
    pane.world.replaceChildren(draw(root, state.diff.open, pane));
    pane.count.textContent = plural(diffs[state.index][pane.name].nodes.length, "node");
    applyZoom(pane);
  }
  paintSelection();
}

function drawLegend() {
  const { counts } = diffs[state.index];
  const items = Object.keys(STATUSES).map((status) => {
    const isMeant = (id, side) => sideOf(side).byId.get(id).status === status;
    const jump = () => stepTo(isMeant);
    const canStep = state.diff.changes.some(([side, id]) => isMeant(id, side));
    const content = [glyph(status), ` ${integer(counts[status])} ${status}`];
    const title = `${STATUSES[status].meaning}${canStep ? "; click for the next one" : ""}`;
    return h(
      canStep ? "button" : "span",
      { class: `badge s-${status}`, type: canStep && "button", "data-count": status, title, click: canStep && jump },
      content,
    );
  });
  $("legend").replaceChildren(
    ...items,
    h("span", { class: "chip legend" }, "W weight"),
    h("span", { class: "muted" }, "shown in the node that reads it"),
  );
}

// --- zoom and scroll ---

function applyZoom(pane) {
  const { w, h: height } = sideOf(pane.name).root;
  pane.world.style.transform = `scale(${pane.zoom})`;
  pane.world.style.width = `${w}px`;
  pane.world.style.height = `${height}px`;
  pane.sizer.style.width = `${w * pane.zoom}px`;
  pane.sizer.style.height = `${height * pane.zoom}px`;
}

function zoomTo(pane, zoom, at = [pane.scroller.clientWidth / 2, pane.scroller.clientHeight / 2]) {
  const { scroller, sizer } = pane;
  const point = [scroller.scrollLeft + at[0] - sizer.offsetLeft, scroller.scrollTop + at[1] - sizer.offsetTop].map(
    (each) => each / pane.zoom,
  );
  pane.zoom = clamp(zoom, 0.15, 2);
  applyZoom(pane);
  scroller.scrollLeft = point[0] * pane.zoom - at[0] + sizer.offsetLeft;
  scroller.scrollTop = point[1] * pane.zoom - at[1] + sizer.offsetTop;
}

/** As large as the pane's width allows, but readable. */
function fit(pane) {
  if (!pane.scroller.clientWidth) return;
  const { w } = sideOf(pane.name).root;
  pane.zoom = clamp((pane.scroller.clientWidth - 16) / w, 0.7, 1);
  applyZoom(pane);
  pane.scroller.scrollLeft = (w * pane.zoom - pane.scroller.clientWidth) / 2;
  pane.scroller.scrollTop = 0;
}

function bringIntoView(pane, box) {
  const { scroller, sizer, zoom } = pane;
  const place = placeOf(box);
  const along = (start, size, from, length) => {
    const isInside = start >= from + 8 && start + size <= from + length - 8;
    return isInside ? from : start - Math.max(16, (length - size) / 2);
  };
  scroller.scrollTo({
    left: along(sizer.offsetLeft + place.x * zoom, place.w * zoom, scroller.scrollLeft, scroller.clientWidth),
    top: along(sizer.offsetTop + place.y * zoom, place.h * zoom, scroller.scrollTop, scroller.clientHeight),
  });
}

// --- opening and closing ---

/** Opens or closes a module on both sides; what was clicked stays where it is on the screen. */
function toggle(box) {
  performance.mark("toggle");
  const { open } = state.diff;
  if (!open.delete(box.key)) open.add(box.key);
  const anchors = Object.values(panes).map((pane) => {
    const same = sideOf(pane.name).containers.get(box.key);
    const old = same?.element?.isConnected && placeOf(same);
    if (same) invalidate(same);
    return { pane, same, old };
  });
  drawSides();
  for (const { pane, same, old } of anchors) {
    if (!old) continue;
    const place = placeOf(same);
    pane.scroller.scrollLeft += (place.x + place.w / 2 - old.x - old.w / 2) * pane.zoom;
    pane.scroller.scrollTop += (place.y - old.y) * pane.zoom;
  }
  performance.measure("slcompile-toggle", "toggle");
}

/** Opens everything around a box. */
function reveal(box) {
  const { open } = state.diff;
  let isChanged = false;
  for (let each = box?.parent; each?.parent; each = each.parent) {
    if (open.has(each.key)) continue;
    open.add(each.key);
    isChanged = true;
    for (const { containers } of Object.values(state.diff.sides)) {
      if (containers.has(each.key)) invalidate(containers.get(each.key));
    }
  }
  if (isChanged) drawSides();
}

/** The graph as it was when it was first shown. */
function startOver() {
  const { index } = state;
  built.delete(index);
  state.index = -1;
  show(index);
}
