"use strict";
// What is selected: marked with its counterpart on the other side, its edges drawn, its facts below the panes.

/** The box of a node; an inlined input is in the first node that reads it. */
function boxOf(side, id) {
  const { boxes, users } = sideOf(side);
  return boxes.get(id) ?? boxes.get(users.get(id)?.find((user) => boxes.has(user)));
}

/** What a node came from or became on the other side. */
function counterparts(side, id) {
  const ids = side === "after" ? sideOf(side).byId.get(id).from : (state.diff.became.get(id) ?? []);
  return ids.filter((each) => sideOf(other(side)).byId.has(each));
}

function selectNode(side, id) {
  const box = boxOf(side, id);
  if (!box) {
    clearSelection();
    $("details").replaceChildren(h("p", {}, `This graph has no node "${id}" ${side}.`));
    return;
  }
  if (state.show === other(side)) setShow(side);
  reveal(box);
  for (const twin of counterparts(side, id)) reveal(boxOf(other(side), twin));
  select(side, box, id);
  showStep();
  writeAddress(`#graph=${state.index}&side=${side}&node=${encodeURIComponent(id)}`);
}

function select(side, box, id = null) {
  state.selected = { side, box, id };
  drawDetails();
  paintSelection();
  bringIntoView(panes[side], box);
  bringIntoView(panes[other(side)], visible(matching(side, box, id), state.diff.open));
  box.element.focus({ preventScroll: true });
}

/** What is to be seen on the other side: the counterpart, or the innermost module that both sides have. */
function matching(side, box, id) {
  const { root, containers } = sideOf(other(side));
  const [twin] = id ? counterparts(side, id) : [];
  if (twin && boxOf(other(side), twin)) return boxOf(other(side), twin);
  for (let each = box; each.parent; each = each.parent) if (containers.has(each.key)) return containers.get(each.key);
  return root;
}

function clearSelection() {
  state.selected = null;
  drawDetails();
  paintSelection();
  writeAddress(`#graph=${state.index}`);
}

function paintSelection() {
  for (const element of document.querySelectorAll(".panes :is(.selected, .linked)")) {
    element.classList.remove("selected", "linked");
    element.removeAttribute("aria-selected");
  }
  for (const element of document.querySelectorAll(".panes .overlay")) element.remove();
  for (const element of document.querySelectorAll('.panes [role="treeitem"][tabindex="0"]')) element.tabIndex = -1;
  for (const pane of Object.values(panes)) pane.world.tabIndex = 0;
  if (!state.selected) return;
  const { side, id } = state.selected;
  const box = visible(state.selected.box, state.diff.open);
  box.element.classList.add("selected");
  box.element.setAttribute("aria-selected", "true");
  box.element.tabIndex = 0;
  panes[side].world.tabIndex = -1;
  if (id) mark(side, id, "selected");
  for (const twin of id ? counterparts(side, id) : []) mark(other(side), twin, "linked");
  if (!id) sideOf(other(side)).containers.get(box.key)?.element?.classList.add("linked");
  if (box.kind === "node") drawOverlay(side, box);
}

function mark(side, id, name) {
  const box = boxOf(side, id);
  if (!box) return;
  const { element } = visible(box, state.diff.open);
  element.classList.add(name);
  for (const chip of element.querySelectorAll(".chip")) if (chip.dataset.id === id) chip.classList.add(name);
}

/** All edges of the selected node, also those that leave its module. */
function drawOverlay(side, box) {
  const { open } = state.diff;
  const { boxes, users, root } = sideOf(side);
  const neighbours = (ids) => [
    ...new Set(
      ids
        .map((id) => boxes.get(id))
        .filter(Boolean)
        .map((each) => visible(each, open)),
    ),
  ];
  const here = placeOf(box);
  const ends = [
    ...neighbours(box.node.inputs).map((each) => [placeOf(each), here]),
    ...neighbours(users.get(box.node.id)).map((each) => [here, placeOf(each)]),
  ];
  const lines = ends.map(([from, to]) => [
    [from.x + from.w / 2, from.y + from.h],
    [to.x + to.w / 2, to.y],
  ]);
  const paths = [
    svg("path", { class: "line", d: lines.map(curve).join("") }),
    svg("path", { class: "head", d: lines.map((line) => arrowHead(...line)).join("") }),
  ];
  panes[side].world.append(
    svg("svg", { class: "edges overlay", width: root.w, height: root.h, "aria-hidden": "true" }, paths),
  );
}

// --- details ---

function drawDetails() {
  if (!state.selected) {
    $("details").replaceChildren(
      h("p", { class: "muted" }, "Select a node or a module to see what it is, what it reads and where it came from."),
    );
    return;
  }
  const { side, box, id } = state.selected;
  const close = h("button", { type: "button", class: "close", "aria-label": "Close", click: clearSelection }, "×");
  $("details").replaceChildren(close, ...(id ? nodeDetails(side, id) : moduleDetails(side, box)));
}

function nodeDetails(side, id) {
  const node = sideOf(side).byId.get(id);
  const link = (target, to) =>
    h("a", { class: "node-link", href: `#graph=${state.index}&side=${to}&node=${encodeURIComponent(target)}` }, target);
  const links = (ids, to) =>
    ids.length
      ? ids.slice(0, 24).map((each) => [sideOf(to).byId.has(each) ? link(each, to) : each, " "])
      : h("span", { class: "muted" }, "nothing");
  const rest = (ids) => ids.length > 24 && h("span", { class: "muted" }, `and ${ids.length - 24} more`);
  const readers = sideOf(side).users.get(id);
  const twins = counterparts(side, id);
  const facts = [
    ["Calls", h("code", {}, [...new Set([node.op, node.target])].filter((each) => each !== "call_function").join(" "))],
    ["Arguments", node.args && h("code", {}, node.args)],
    ["Result", h("code", {}, [node.shape, node.dtype].filter(Boolean).join(" ") || "–")],
    ["Weight", node.weight && h("code", {}, node.weight)],
    [
      side === "after" ? "Came from" : "Became",
      (twins.length > 0 || node.status !== "kept") && [links(twins, other(side)), rest(twins)],
    ],
    ["Reads", !isInput(node) && [links(node.inputs, side), rest(node.inputs)]],
    ["Read by", [links(readers, side), rest(readers)]],
    ["Module", node.module.length > 0 && node.module.map(([path, type]) => `${path || "model"} (${type})`).at(-1)],
    ["Source", node.source && h("code", {}, node.source)],
    ...factsOf(state.index, side, id),
  ];
  return [h("h3", {}, badge(node.status), " ", node.id, h("span", { class: "muted" }, ` ${side}`)), factList(facts)];
}

function moduleDetails(side, box) {
  const names = box.kind === "fold" ? box.items.map((item) => item.path).join(", ") : box.path;
  const counts = Object.entries(box.statuses)
    .filter(([, count]) => count)
    .map(([status, count]) => [badge(status, `${integer(count)} ${status}`), " "]);
  const facts = [
    ["Module", names && h("code", {}, names)],
    ["Class", box.type && h("code", {}, box.type)],
    ["Nodes", integer(box.count)],
    ["Status", counts],
  ];
  return [h("h3", {}, box.label, h("span", { class: "muted" }, ` ${side}`)), factList(facts)];
}

const factList = (facts) =>
  h(
    "dl",
    {},
    facts.filter(([, value]) => value).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))),
  );

/** Keeps what is selected in the address, so that it can be sent to others. */
function writeAddress(address) {
  // A page inside a notebook's frame has no address of its own.
  if (location.protocol !== "about:") history.replaceState(null, "", address);
}
