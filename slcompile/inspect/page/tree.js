"use strict";
// One graph of a diff as a tree of boxes: nodes inside modules, identical layers folded, large modules in parts.
//
// A box is a node or a container. Every container is laid out alone, with its items as boxes of fixed size, and only
// when it is open: thousands of nodes cost nothing until somebody opens their module. An edge is drawn where its two
// ends part, between two items of the smallest container that holds both. Boxes of the two sides have the same key
// where they are the same module, so that one opens with the other.

const MAX_ITEMS = 100; // a container with more is split into parts, which keeps every layout under about 0.1 s
const PART = 50;
const MAX_CALM = 12; // a container with more items shows ...
const MIN_RUN = 6; // ... this many and more unchanged nodes in a row as one box
const MAX_TARGETS = 8; // a source with more readers in one container has no edges there, as lines would cover all else
const MAX_INPUTS = 12; // a graph with more inputs than this shows all of them where they are read

/** Both sides of a diff, and how they belong together. */
function buildDiff(diff) {
  const sides = { before: buildSide(diff.before), after: buildSide(diff.after) };
  foldLayers(sides);
  groupUnchanged(sides);
  splitLarge(sides);
  for (const side of Object.values(sides)) connect(side);
  alignOrder(sides);
  const became = new Map();
  for (const node of diff.after.nodes) {
    for (const id of node.from) became.set(id, [...(became.get(id) ?? []), node.id]);
  }
  return { sides, became, changes: changesOf(diff, sides), open: new Set() };
}

function buildSide({ nodes }) {
  const byId = new Map(nodes.map((node) => [node.id, node]));
  const users = new Map(nodes.map((node) => [node.id, []]));
  for (const node of nodes) for (const id of new Set(node.inputs)) users.get(id)?.push(node.id);
  const inlined = inlinedInputs(nodes, users);
  const backward = backwardIds(nodes, users);
  const modules = placesOf(nodes, users, byId, backward);
  const root = container(null, "", { kind: "root", label: "" });
  const containers = new Map([["", root]]);
  const boxes = new Map();
  for (const node of nodes) {
    if (inlined.has(node.id)) continue;
    let parent = root;
    if (backward.size && !isInput(node) && node.op !== "output") {
      const phase = backward.has(node.id) ? "backward" : "forward";
      parent = enter(containers, parent, phase, { kind: "phase", label: phase });
    }
    for (const [path, type] of modules.get(node.id)) {
      const above = parent.path ? `${parent.path}.` : "";
      const label = path.startsWith(above) ? path.slice(above.length) : path;
      parent = enter(containers, parent, path, { kind: "module", label: label || type, path, type: label ? type : "" });
    }
    const leaf = { kind: "node", key: node.id, node, parent, index: parent.items.length, chips: [] };
    // What came before it in its container, also inside other modules: only what follows at once can be one box.
    leaf.previous = parent.latest;
    for (let each = leaf; each.parent; each = each.parent) each.parent.latest = each;
    parent.items.push(leaf);
    boxes.set(node.id, leaf);
  }
  return { root, containers, boxes, byId, users };
}

function container(parent, key, rest) {
  return { key, parent, path: "", type: "", items: [], edges: new Map(), ...rest };
}

function enter(containers, parent, name, rest) {
  const key = `${parent.key}>${name}`;
  let found = containers.get(key);
  if (!found) {
    found = { ...container(parent, key, rest), index: parent.items.length };
    parent.items.push(found);
    containers.set(key, found);
  }
  return found;
}

const CALLS = ["call_function", "call_method", "call_module", "node"]; // of which the target says what they compute
const isInput = (node) => node.op === "placeholder" || node.op === "get_attr";

/** Parameters, and all inputs where there are many, are shown in the nodes that read them. */
function inlinedInputs(nodes, users) {
  const read = nodes.filter((node) => isInput(node) && users.get(node.id).length);
  const others = read.filter((node) => !node.weight);
  return new Set((others.length > MAX_INPUTS ? read : read.filter((node) => node.weight)).map((node) => node.id));
}

/** What a joint graph computes for the backward pass: what depends on tangents, and what only such nodes read. */
function backwardIds(nodes, users) {
  const found = new Set();
  for (const node of nodes) {
    if (node.op === "placeholder" && node.id.startsWith("tangents")) found.add(node.id);
    else if (node.op !== "output" && node.inputs.some((id) => found.has(id))) found.add(node.id);
  }
  if (!found.size) return found;
  for (const node of [...nodes].reverse()) {
    const readers = users.get(node.id);
    if (readers.length && readers.every((id) => found.has(id))) found.add(node.id);
  }
  return found;
}

/**
 * In which modules nodes are drawn. Passes and autograd make nodes that name none: one that reads a parameter is drawn
 * in the parameter's module, an item with its tuple, and others where all that they read is.
 */
function placesOf(nodes, users, byId, backward) {
  const stacks = new Map();
  for (const { module } of nodes) module.forEach(([path], depth) => stacks.set(path, module.slice(0, depth + 1)));
  const places = new Map();
  for (const node of nodes) {
    const isMade = node.status !== "kept" || backward.has(node.id); // others, as those of a loss, are in no module
    let place = node.module;
    if (!place.length && !isInput(node) && node.op !== "output") {
      const read = node.inputs.map((id) => byId.get(id)).filter(Boolean);
      place = read.map(({ weight }) => weight && ownerOf(weight, stacks)).find(Boolean) ?? [];
      if (!place.length && /getitem$/.test(node.target)) place = places.get(node.inputs[0]) ?? [];
      else if (!place.length && isMade) place = placeOfSources(node, read, places, backward);
    }
    places.set(node.id, place);
  }
  // What a pass made of inputs alone, as the transpose of an activation that was kept, is drawn with what reads it.
  for (const node of [...nodes].reverse()) {
    if (places.get(node.id).length || node.status === "kept" || isInput(node) || node.op === "output") continue;
    const readers = users.get(node.id).filter((id) => places.get(id).length);
    if (readers.length) places.set(node.id, readers.map((id) => places.get(id)).reduce(commonStack));
  }
  return places;
}

/** The smallest module with all that a node reads in its own phase; what names its module itself says more. */
function placeOfSources(node, read, places, backward) {
  const near = read.filter((each) => !isInput(each) && backward.has(each.id) === backward.has(node.id));
  const named = near.filter((each) => each.module.length);
  const found = (named.length ? named : near).map((each) => places.get(each.id));
  return found.length ? found.reduce(commonStack) : [];
}

function ownerOf(weight, stacks) {
  for (let path = weight; path.includes(".");) {
    path = path.slice(0, path.lastIndexOf("."));
    if (stacks.has(path)) return stacks.get(path);
  }
  return null;
}

function commonStack(a, b) {
  const end = a.findIndex(([path], depth) => path !== b[depth]?.[0]);
  return end < 0 ? a : a.slice(0, end);
}

// --- folding ---

/** Replaces runs of numbered modules that are the same on both sides by one box. */
function foldLayers(sides) {
  const shapes = Object.values(sides).map((side) => {
    const numbers = new Map();
    const known = new Map();
    signature(side.root, side, known, numbers);
    return numbers;
  });
  for (const side of Object.values(sides)) {
    for (const each of [...side.containers.values()]) {
      const runs = new Map();
      const layers = each.items.filter((item) => item.kind === "module" && /\d+$/.test(item.path));
      const numberOf = (item) => Number(/\d+$/.exec(item.path)[0]);
      for (const layer of layers.sort((a, b) => numberOf(a) - numberOf(b))) {
        const stem = layer.path.replace(/\d+$/, "");
        const shape = shapes.map((numbers) => numbers.get(layer.key)).join();
        const last = (runs.get(stem) ?? runs.set(stem, []).get(stem)).at(-1);
        if (last?.shape === shape && numberOf(last.items.at(-1)) === numberOf(layer) - 1) last.items.push(layer);
        else runs.get(stem).push({ shape, items: [layer] });
      }
      for (const run of [...runs.values()].flat()) if (run.items.length > 1) fold(side, each, run.items);
    }
  }
}

function fold(side, parent, layers) {
  const [first, last] = [layers[0], layers.at(-1)];
  const label = `${first.label}–${/\d+$/.exec(last.path)[0]}`;
  const rest = { kind: "fold", label, path: parent.path, type: first.type };
  const folded = container(parent, `${parent.key}>${first.path}-${last.path}`, rest);
  const place = Math.min(...layers.map((layer) => parent.items.indexOf(layer)));
  folded.items = layers;
  parent.items[place] = folded;
  parent.items = parent.items.filter((item) => item === folded || !layers.includes(item));
  for (const layer of layers) layer.parent = folded;
  side.containers.set(folded.key, folded);
}

/** A number for everything about a box but its name: ops, statuses, shapes, and how its nodes are wired. */
function signature(box, side, known, numbers) {
  let text;
  if (box.kind === "node") {
    const { node } = box;
    const wires = node.inputs.map((id) => {
      const source = side.boxes.get(id);
      return source?.parent === box.parent ? box.index - source.index : "elsewhere";
    });
    text = [nameOf(node), node.status, node.shape, node.dtype, ...wires].join("|");
  } else {
    const items = box.items.map(
      (item) => `${item.kind === "node" ? "" : item.label}:${signature(item, side, known, numbers)}`,
    );
    text = `${box.type}(${items.join()})`;
  }
  if (!known.has(text)) known.set(text, known.size);
  numbers.set(box.key, known.get(text));
  return known.get(text);
}

// What a node calls; the names of attributes and modules tell layers apart, so they do not count.
const nameOf = (node) => (CALLS.includes(node.op) && node.op !== "call_module" ? node.target : node.op);

// --- parts ---

/** Puts long runs of unchanged nodes into one box where there is much to see, as a text diff leaves out lines. */
function groupUnchanged(sides) {
  const crowded = new Set();
  for (const { containers } of Object.values(sides)) {
    for (const [key, { items }] of containers) if (items.length > MAX_CALM) crowded.add(key);
  }
  for (const side of Object.values(sides)) {
    for (const key of crowded) {
      const parent = side.containers.get(key);
      if (!parent) continue;
      const runs = [];
      for (const item of parent.items) {
        const isCalm =
          item.kind === "node" && item.node.status === "kept" && !isInput(item.node) && item.node.op !== "output";
        const last = runs.at(-1);
        if (isCalm && last?.isCalm && item.previous === last.items.at(-1)) last.items.push(item);
        else runs.push({ isCalm, items: [item] });
      }
      parent.items = runs.flatMap((run) =>
        run.isCalm && run.items.length >= MIN_RUN ? [unchangedPart(side, parent, run.items)] : run.items,
      );
    }
  }
}

function unchangedPart(side, parent, items) {
  // Named by where its first node came from, which is the same on both sides.
  const key = `${parent.key}>unchanged ${items[0].node.from[0] ?? items[0].key}`;
  const part = container(parent, key, { kind: "calm", path: parent.path, label: "" });
  part.items = items;
  part.label = `${endOf(part, 0)} … ${endOf(part, -1)}`;
  for (const item of items) item.parent = part;
  side.containers.set(key, part);
  return part;
}

/** Splits containers with too many items; an item is in the part of what it came from, so that sides stay level. */
function splitLarge({ before, after }) {
  for (const key of new Set([...before.containers.keys(), ...after.containers.keys()])) {
    const [old, current] = [before.containers.get(key), after.containers.get(key)];
    if (old?.items.length > MAX_ITEMS) {
      const places = new Map(old.items.map((item, index) => [item.key, Math.floor(index / PART)]));
      let last = 0;
      const numbers = current?.items.map((item) => {
        const origin = item.kind === "node" ? item.node.from.find((id) => places.has(id)) : item.key;
        last = places.get(origin) ?? last;
        return last;
      });
      if (current) groupItems(after, current, numbers);
    }
    for (const [side, box] of [
      [before, old],
      [after, current],
    ])
      splitByOrder(side, box);
  }
}

/** Parts, parts of parts, and so on, until nothing has too many items. */
function splitByOrder(side, box) {
  while (box?.items.length > MAX_ITEMS)
    groupItems(
      side,
      box,
      box.items.map((_, index) => Math.floor(index / PART)),
    );
  for (const item of box?.items ?? [])
    if (item.kind === "part" && item.items.length > MAX_ITEMS) splitByOrder(side, item);
}

function groupItems(side, parent, numbers) {
  const parts = new Map();
  const level = parent.items[0].kind === "part" ? parent.items[0].level + 1 : 0;
  parent.items.forEach((item, index) => {
    const number = numbers[index];
    if (!parts.has(number)) {
      const key = `${parent.key}>part ${level}.${number}`;
      parts.set(number, { ...container(parent, key, { kind: "part", label: "", path: parent.path }), number, level });
      side.containers.set(key, parts.get(number));
    }
    parts.get(number).items.push(item);
    item.parent = parts.get(number);
  });
  parent.items = [...parts.values()].sort((a, b) => a.number - b.number);
  for (const part of parent.items) part.label = `${endOf(part, 0)} … ${endOf(part, -1)}`;
}

function endOf(box, end) {
  const item = box.items.at(end);
  return item.kind === "node" ? item.key : item.label || endOf(item, end);
}

// --- edges and sums ---

function connect({ root, boxes, byId }) {
  (function descend(box, depth) {
    box.depth = depth;
    box.count = 0;
    box.statuses = { kept: 0, removed: 0, new: 0, rewritten: 0 };
    box.items.forEach((item, index) => {
      item.index = index;
      if (item.kind === "node") item.depth = depth + 1;
      else descend(item, depth + 1);
      box.count += item.count ?? 1;
      for (const status of Object.keys(box.statuses))
        box.statuses[status] += item.statuses?.[status] ?? Number(item.node?.status === status);
    });
  })(root, 0);
  for (const leaf of boxes.values()) {
    for (const id of new Set(leaf.node.inputs)) {
      const source = boxes.get(id);
      if (source) link(source, leaf);
      else if (byId.has(id)) leaf.chips.push(byId.get(id));
    }
  }
  (function thin(box) {
    const readers = new Map();
    for (const [from, to] of box.edges.values()) readers.set(from, [...(readers.get(from) ?? []), to]);
    for (const [from, targets] of readers) {
      if (targets.length <= MAX_TARGETS) continue;
      for (const to of targets.sort((a, b) => a - b).slice(1)) {
        box.edges.delete(`${from} ${to}`);
        box.items[to].hasHiddenInput = true;
      }
      box.items[from].hasHiddenReader = true;
    }
    for (const item of box.items) if (item.kind !== "node") thin(item);
  })(root);
}

function link(source, reader) {
  let [from, to] = [source, reader];
  while (from.parent !== to.parent) {
    if (from.depth >= to.depth) from = from.parent;
    else to = to.parent;
  }
  from.parent.edges.set(`${from.index} ${to.index}`, [from.index, to.index]);
  if (from !== source) source.hasHiddenReader = true;
  if (to !== reader) reader.hasHiddenInput = true;
}

/** Gives boxes of the two sides the same order from left to right, though passes insert nodes anywhere. */
function alignOrder({ before, after }) {
  for (const [key, { items }] of after.containers) {
    const places = new Map(before.containers.get(key)?.items.map((item) => [item.key, item.index]));
    let last = -1;
    for (const item of items) {
      last = places.get(item.node?.from[0] ?? item.key) ?? last;
      item.order = last;
    }
  }
}

/** Whether a box is, or is in, a layer that is folded together with an identical one before it. */
function isRepeated(box) {
  for (; box.parent; box = box.parent) if (box.parent.kind === "fold" && box.index > 0) return true;
  return false;
}

/** What changed, in the order of the graph: [side, id] each. */
function changesOf(diff, { before, after }) {
  const places = new Map(diff.before.nodes.map((node, index) => [node.id, index]));
  const found = diff.before.nodes
    .filter((node) => node.status === "removed")
    .map((node) => ["before", node.id, places.get(node.id)]);
  let place = 0;
  for (const node of diff.after.nodes) {
    place = node.from.length && places.has(node.from[0]) ? places.get(node.from[0]) : place;
    if (node.status !== "kept") found.push(["after", node.id, place]);
  }
  const boxOf = ([side, id]) => (side === "before" ? before : after).boxes.get(id);
  return found.filter((each) => boxOf(each) && !isRepeated(boxOf(each))).sort((a, b) => a[2] - b[2]);
}
