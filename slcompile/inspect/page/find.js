"use strict";
// Search, and stepping through what changed.

const MAX_FOUND = 40;

/** Nodes and modules whose name, target, weight or path holds the text; whole names first, repeated layers last. */
function findHits(text) {
  const found = [];
  for (const side of ["before", "after"]) {
    for (const node of diffs[state.index][side].nodes) {
      const fields = [node.weight, node.id, node.target];
      const hit = fields.find((field) => field.toLowerCase().includes(text));
      if (hit === undefined || (side === "after" && node.status === "kept" && sideOf("before").byId.has(node.id)))
        continue;
      found.push({
        side,
        id: node.id,
        name: node.weight || node.id,
        note: node.weight ? node.id : node.target,
        status: node.status,
        rank: fields.some((field) => field.toLowerCase() === text) ? 0 : 1,
      });
    }
    for (const [key, box] of sideOf(side).containers) {
      const isHit = box.kind === "module" && `${box.path} ${box.type}`.toLowerCase().includes(text);
      if (isHit && (side === "before" || !sideOf("before").containers.has(key)))
        found.push({
          side,
          box,
          name: box.path || box.label,
          note: box.type,
          rank: box.path.toLowerCase() === text ? 0 : 2,
        });
    }
  }
  const rank = (hit) => hit.rank + (isRepeated(hit.box ?? boxOf(hit.side, hit.id)) ? 0.5 : 0);
  return found
    .map((hit) => [rank(hit), hit])
    .sort((a, b) => a[0] - b[0])
    .map(([, hit]) => hit);
}

function search() {
  const text = $("search").value.trim().toLowerCase();
  const found = text ? findHits(text) : [];
  const items = found.slice(0, MAX_FOUND).map((hit, index) =>
    h(
      "li",
      {
        role: "option",
        id: `found-${index}`,
        "aria-selected": "false",
        mousedown: (event) => event.preventDefault(),
        click: () => go(hit),
      },
      hit.status ? glyph(hit.status) : h("span", { class: "glyph" }, "▸"),
      h("span", { class: "found" }, hit.name),
      h("span", { class: "muted" }, hit.note),
      h("span", { class: "side" }, hit.side),
    ),
  );
  if (text && !found.length) items.push(h("li", { class: "muted" }, "Nothing found in this graph."));
  if (found.length > MAX_FOUND)
    items.push(h("li", { class: "muted" }, `and ${integer(found.length - MAX_FOUND)} more`));
  $("results").replaceChildren(...items);
  setResults(text !== "");
  if (found.length) choose(0);
}

function setResults(isShown) {
  $("results").hidden = !isShown;
  $("search").setAttribute("aria-expanded", String(isShown));
  if (!isShown) $("search").removeAttribute("aria-activedescendant");
}

function choose(step) {
  const options = [...$("results").querySelectorAll('[role="option"]')];
  if (!options.length) return;
  const old = options.findIndex((option) => option.getAttribute("aria-selected") === "true");
  const index = (Math.max(old, 0) + step + options.length) % options.length;
  options[Math.max(old, 0)].setAttribute("aria-selected", "false");
  options[index].setAttribute("aria-selected", "true");
  options[index].scrollIntoView({ block: "nearest" });
  $("search").setAttribute("aria-activedescendant", options[index].id);
}

function go(hit) {
  setResults(false);
  if (hit.id) selectNode(hit.side, hit.id);
  else {
    reveal(hit.box);
    select(hit.side, hit.box);
  }
}

function searchKey(event) {
  const steps = { ArrowDown: 1, ArrowUp: -1 };
  if (event.key in steps) choose(steps[event.key]);
  else if (event.key === "Enter") $("results").querySelector('[aria-selected="true"]')?.click();
  else if (event.key === "Escape") {
    if ($("results").hidden) $("search").blur();
    setResults(false);
  } else return;
  event.preventDefault();
  event.stopPropagation();
}

// --- changes ---

/** To the next change that is wanted, from the one that was selected last. */
function stepTo(isWanted = () => true, direction = 1) {
  const { changes } = state.diff;
  for (let count = 1; count <= changes.length; count += 1) {
    const start = state.step < 0 && direction < 0 ? 0 : state.step;
    const index = (start + direction * count + 2 * changes.length) % changes.length;
    const [side, id] = changes[index];
    if (!isWanted(id, side)) continue;
    selectNode(side, id);
    return;
  }
}

function showStep() {
  const { changes } = state.diff;
  const { side, id } = state.selected ?? {};
  const selected = changes.findIndex((each) => each[0] === side && each[1] === id);
  if (selected >= 0) state.step = selected;
  const { length } = changes;
  $("change").textContent =
    state.step < 0 ? plural(length, "change") : `change ${integer(state.step + 1)} of ${integer(length)}`;
  $("next").disabled = $("previous").disabled = !length;
}
