"use strict";
// Keys, buttons and the pointer; at the end, the start of the graph section.

/** Where an arrow key leads from a box, or undefined. */
function neighbour(side, box, key) {
  const { open } = state.diff;
  const { boxes, users } = sideOf(side);
  const { items, edges } = box.parent;
  if (key === "ArrowLeft" || key === "ArrowRight") {
    const sign = key === "ArrowRight" ? 1 : -1;
    const beside = items.filter(
      (item) => item !== box && sign * (item.x - box.x) > 0 && item.y < box.y + box.h && box.y < item.y + item.h,
    );
    return beside.sort((a, b) => sign * (a.x - b.x))[0];
  }
  const isDown = key === "ArrowDown";
  if (isDown && isOpen(box, open)) return [...box.items].sort((a, b) => a.y - b.y || a.x - b.x)[0];
  const ends = [...edges.values()]
    .filter((edge) => edge[isDown ? 0 : 1] === box.index)
    .map((edge) => items[edge[isDown ? 1 : 0]]);
  if (ends.length)
    return ends.sort(
      (a, b) => Math.abs(a.x + a.w / 2 - box.x - box.w / 2) - Math.abs(b.x + b.w / 2 - box.x - box.w / 2),
    )[0];
  const ids = box.kind === "node" ? (isDown ? users.get(box.key) : box.node.inputs) : [];
  const away = ids.map((id) => boxes.get(id)).find(Boolean);
  if (away) return visible(away, open);
  return !isDown && box.parent.parent ? box.parent : undefined;
}

function paneKey(event, pane) {
  const box = pane.shown.get(event.target.closest(".box"));
  if (event.key.startsWith("Arrow")) {
    const target = box ? neighbour(pane.name, box, event.key) : sideOf(pane.name).root.items[0];
    if (target) goTo(pane.name, target);
  } else if (event.key === "Enter" && box) {
    if (box.kind !== "node") toggleSelected(pane.name, box);
    else jump(pane.name);
  } else if (event.key === "o" && box) jump(pane.name);
  else return;
  event.preventDefault();
}

const goTo = (side, box) => (box.kind === "node" ? selectNode(side, box.key) : select(side, box));

function toggleSelected(side, box) {
  toggle(box);
  select(side, box);
}

/** From the selection to its counterpart. */
function jump(side) {
  const { box, id } = state.selected ?? {};
  const [twin] = id ? counterparts(side, id) : [];
  const same = box && sideOf(other(side)).containers.get(box.key);
  if (twin) selectNode(other(side), twin);
  else if (!id && same) select(other(side), same);
}

const next = () => stepTo();
const previous = () => stepTo(undefined, -1);
const zoomIn = () => eachPane((pane) => zoomTo(pane, pane.zoom * 1.25));
const zoomOut = () => eachPane((pane) => zoomTo(pane, pane.zoom * 0.8));

function pageKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, dialog[open]")) return;
  const keys = {
    "/": () => ($("search").focus(), $("search").select()),
    "?": () => $("help").showModal(),
    n: next,
    p: previous,
    "+": zoomIn,
    "=": zoomIn,
    "-": zoomOut,
    0: () => eachPane(fit),
    Escape: () => (state.selected ? clearSelection() : setFull(false)),
  };
  if (!(event.key in keys)) return;
  event.preventDefault();
  keys[event.key]();
}

// --- controls ---

function setShow(show) {
  state.show = show;
  document.querySelector(".panes").dataset.show = show;
  for (const button of document.querySelectorAll("[data-show]"))
    button.setAttribute("aria-pressed", String(button.dataset.show === show));
  if (state.diff) eachPane(fit);
}

function setFull(isFull) {
  $("graph-section").classList.toggle("full", isFull);
  $("full").setAttribute("aria-pressed", String(isFull));
}

/** Panning by dragging; a click that did not move is a click. */
function dragToScroll({ scroller }) {
  scroller.addEventListener("pointerdown", (down) => {
    if (down.button !== 0 || down.pointerType === "touch") return;
    const start = [scroller.scrollLeft, scroller.scrollTop];
    const move = (event) => {
      scroller.scrollLeft = start[0] - event.clientX + down.clientX;
      scroller.scrollTop = start[1] - event.clientY + down.clientY;
      scroller.dataset.dragged =
        Math.hypot(event.clientX - down.clientX, event.clientY - down.clientY) > 4 ? "yes" : "";
    };
    scroller.dataset.dragged = "";
    addEventListener("pointermove", move);
    addEventListener("pointerup", () => removeEventListener("pointermove", move), { once: true });
  });
}

/** Starts the section for a document's diffs; `facts(index, side, id)` are lines about a node from elsewhere in it. */
function startGraph(documentDiffs, facts) {
  diffs = documentDiffs;
  factsOf = facts;
  for (const pane of Object.values(panes)) {
    dragToScroll(pane);
    pane.scroller.addEventListener("click", (event) => {
      if (pane.scroller.dataset.dragged) return;
      const box = pane.shown.get(event.target.closest(".box"));
      const chip = event.target.closest(".chip[data-id]");
      if (chip) selectNode(pane.name, chip.dataset.id);
      else if (box?.kind === "node") selectNode(pane.name, box.key);
      else if (box && (event.target.closest(".top") || box.element.classList.contains("closed")))
        toggleSelected(pane.name, box);
    });
    pane.world.addEventListener("keydown", (event) => paneKey(event, pane));
    pane.scroller.addEventListener(
      "wheel",
      (event) => {
        if (!event.ctrlKey) return;
        event.preventDefault();
        const { left, top } = pane.scroller.getBoundingClientRect();
        zoomTo(pane, pane.zoom * Math.exp(-event.deltaY / 300), [event.clientX - left, event.clientY - top]);
      },
      { passive: false },
    );
  }
  $("stage").append(...diffs.map((diff, index) => h("option", { value: index }, diff.name)));
  $("stage").addEventListener("change", () => {
    show(Number($("stage").value));
    writeAddress(`#graph=${state.index}`);
  });
  $("search").addEventListener("input", search);
  $("search").addEventListener("focus", search);
  $("search").addEventListener("blur", () => setResults(false));
  $("search").addEventListener("keydown", searchKey);
  $("next").addEventListener("click", next);
  $("previous").addEventListener("click", previous);
  $("collapse").addEventListener("click", startOver);
  $("zoom-in").addEventListener("click", zoomIn);
  $("zoom-out").addEventListener("click", zoomOut);
  $("fit").addEventListener("click", () => eachPane(fit));
  $("full").addEventListener("click", () => setFull($("full").getAttribute("aria-pressed") !== "true"));
  for (const button of document.querySelectorAll("[data-show]"))
    button.addEventListener("click", () => setShow(button.dataset.show));
  document.addEventListener("keydown", pageKey);
  setShow("both");
  show(0);
}
