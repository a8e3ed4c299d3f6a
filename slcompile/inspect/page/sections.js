"use strict";
// What stands above the graph: the summary, the table of matmuls, graph breaks and passes.

function drawSummary(document_) {
  const { summary, versions, config } = document_;
  const { replaced, total } = summary.matmuls;
  const tiles = [
    tile(
      "Matmuls replaced",
      `${integer(replaced)} / ${integer(total)}`,
      plural(total - replaced, "matmul") + " left dense",
      total ? replaced / total : 0,
    ),
    ...[
      ["Parameters", summary.parameters, (value) => si(value)],
      ["Weights + gradients + Adam", summary.bytes, (value) => si(value, "B")],
      ["FLOPs of a step's matmuls", summary.flops, (value) => si(value, "FLOP")],
    ].map(([name, values, format]) =>
      tile(name, change(values, format), ratio(values), values.before ? values.after / values.before : 1),
    ),
  ];
  const settings = Object.entries(config).map(([name, value]) => [
    h("dt", {}, name),
    h("dd", {}, JSON.stringify(value)),
  ]);
  $("summary").append(
    h("div", { class: "tiles" }, tiles),
    h(
      "details",
      { class: "config" },
      h(
        "summary",
        {},
        "Configuration ",
        h(
          "span",
          { class: "muted" },
          Object.entries(versions)
            .map(([name, version]) => `${name} ${version}`)
            .join(" · "),
        ),
      ),
      h("dl", {}, settings),
    ),
  );
}

function tile(name, value, note, share) {
  const bar = h(
    "div",
    { class: share > 1.005 ? "meter over" : "meter", "aria-hidden": "true" },
    h("i", { style: `width:${Math.min(100, 100 * share)}%` }),
  );
  return h(
    "div",
    { class: "tile" },
    h("div", { class: "name" }, name),
    h("div", { class: "value" }, value),
    bar,
    h("div", { class: "note" }, note || " "),
  );
}

// --- matmuls ---

const COLUMNS = [
  { label: "Weight", value: (row) => row.name, cell: nameCell },
  {
    label: "Shape",
    value: (row) => row.shape.reduce((product, side) => product * side, 1),
    cell: (row) => row.shape.join(" × "),
  },
  {
    label: "Tokens",
    value: (row) => row.tokens,
    cell: (row) => (typeof row.tokens === "number" ? integer(row.tokens) : row.tokens),
    number: true,
  },
  { label: "Decision", value: (row) => row.decision + row.reason, cell: decisionCell },
  { label: "Rank", value: (row) => row.rank, cell: (row) => row.rank, number: true },
  {
    label: "Density",
    value: (row) => row.density,
    cell: (row) => (row.density === null ? null : percent(row.density)),
    number: true,
  },
  {
    label: "Non-zeros",
    value: (row) => row.nonzeros,
    cell: (row) => (row.nonzeros === null ? null : integer(row.nonzeros)),
    number: true,
  },
  { label: "Lowering", value: (row) => row.lowering, cell: loweringCell },
  {
    label: "Bytes",
    value: (row) => row.bytes.before,
    cell: (row) => change(row.bytes, (value) => si(value, "B")),
    number: true,
  },
  {
    label: "FLOPs",
    value: (row) => row.flops.before,
    cell: (row) => change(row.flops, (value) => si(value)),
    number: true,
  },
];

/** The table; `linkOf(row)` is the address of a row's node in the graph, or null. */
function drawMatmuls(rows, linkOf) {
  const shown = { decision: "", reason: "", text: "", sort: null, descending: false, unfolded: new Set() };
  const groups = foldRows(rows);
  const body = h("tbody");
  const count = h("span", { class: "muted", "aria-live": "polite" });
  const heads = COLUMNS.map((column) =>
    h(
      "th",
      { scope: "col", class: column.number && "number" },
      h("button", { type: "button", click: () => sortBy(column) }, column.label),
    ),
  );

  function sortBy(column) {
    shown.descending = shown.sort === column && !shown.descending;
    shown.sort = column;
    heads.forEach((head, index) => {
      if (COLUMNS[index] === column) head.setAttribute("aria-sort", shown.descending ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    fillBody();
  }

  function matches(row) {
    const text = shown.text.toLowerCase();
    return (
      (!shown.decision || row.decision === shown.decision) &&
      (!shown.reason || row.reason === shown.reason) &&
      (!text ||
        `${row.name} ${row.reason} ${row.detail} ${row.source} ${row.lowering} ${row.shape}`
          .toLowerCase()
          .includes(text))
    );
  }

  function fillBody() {
    const found = groups.map((group) => group.filter(matches)).filter((group) => group.length);
    if (shown.sort)
      found.sort((a, b) => compare(shown.sort.value(a[0]), shown.sort.value(b[0])) * (shown.descending ? -1 : 1));
    body.replaceChildren(...found.flatMap((group) => groupRows(group)));
    const total = found.reduce((sum, group) => sum + group.length, 0);
    count.textContent = `${integer(total)} of ${plural(rows.length, "matmul")}`;
    if (!total)
      body.append(h("tr", {}, h("td", { colspan: COLUMNS.length, class: "muted" }, "No matmul fits these filters.")));
  }

  function groupRows(group) {
    const [first] = group;
    if (group.length === 1) return [matmulRow(first, linkOf)];
    const isOpen = shown.unfolded.has(first);
    const toggle = h(
      "button",
      {
        type: "button",
        class: "unfold",
        "aria-expanded": String(isOpen),
        title: isOpen ? "Fold identical layers" : "Show each layer",
        click: () => {
          if (!shown.unfolded.delete(first)) shown.unfolded.add(first);
          fillBody();
          body.querySelector(`[data-name="${CSS.escape(first.name)}"] .unfold`)?.focus();
        },
      },
      `×${group.length}`,
    );
    const members = isOpen ? group.slice(1).map((row) => matmulRow(row, linkOf, null, "member")) : [];
    return [matmulRow(first, linkOf, toggle), ...members];
  }

  const options = (key) =>
    [...new Set(rows.map((row) => row[key]).filter(Boolean))].sort().map((value) => h("option", { value }, value));
  const choice = (label, key) =>
    h(
      "label",
      {},
      `${label} `,
      h(
        "select",
        { change: (event) => ((shown[key] = event.target.value), fillBody()) },
        h("option", { value: "" }, "all"),
        options(key),
      ),
    );
  const text = h("input", {
    type: "search",
    placeholder: "Filter by name, reason, source",
    "aria-label": "Filter matmuls",
    input: (event) => ((shown.text = event.target.value), fillBody()),
  });
  $("matmuls").append(
    h("div", { class: "tools" }, choice("Decision", "decision"), choice("Reason", "reason"), text, count),
    h(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table of matmuls" },
      h("table", { class: "matmuls" }, h("thead", {}, h("tr", {}, heads)), body),
    ),
  );
  fillBody();
}

/** Rows that differ only in a number of their name, as layers do, in one group; in the order of the document. */
function foldRows(rows) {
  const groups = new Map();
  for (const row of rows) {
    const { node, ...rest } = row;
    const key = JSON.stringify({ ...rest, name: row.name.replace(/(^|\.)\d+(?=\.)/g, "$1#") });
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(row);
  }
  return [...groups.values()];
}

function matmulRow(row, linkOf, toggle = null, kind = null) {
  const address = linkOf(row);
  const open = (event) => {
    if (address && !event.target.closest("a, button") && !getSelection().toString())
      event.currentTarget.querySelector("a").click();
  };
  return h(
    "tr",
    { class: [kind, address && "link"].filter(Boolean).join(" "), "data-name": row.name, click: open },
    COLUMNS.map((column) => {
      const content = column.cell(row, address, toggle);
      return h("td", { class: column.number && "number" }, content ?? h("span", { class: "muted" }, "–"));
    }),
  );
}

function nameCell(row, address, toggle) {
  const name = address ? h("a", { href: address, title: "Show in the graph" }, row.name) : h("span", {}, row.name);
  return [
    h("div", { class: "weight" }, name, toggle && " ", toggle),
    row.source && h("div", { class: "source", title: row.source }, row.source),
  ];
}

/** Yes or no as an icon and a word. */
function verdict(isYes, icon, yes, no) {
  const shown = h("span", { "aria-hidden": "true" }, isYes ? `${icon} ` : "○ ");
  return h("span", { class: `decision ${isYes ? "replaced" : "left"}` }, shown, isYes ? yes : no);
}

function decisionCell(row) {
  return [
    verdict(row.decision === "replaced", "✓", "replaced", "left dense"),
    row.reason && [" ", h("code", { class: "reason" }, row.reason)],
    row.detail && h("div", { class: "detail" }, row.detail),
  ];
}

function loweringCell(row) {
  if (!row.lowering) return null;
  const costs = Object.entries(row.costs).map(([name, cost]) =>
    h("div", { class: "cost" }, `${name} ${seconds(cost)}`),
  );
  return [row.lowering, costs];
}

/** Numbers by size, the rest as text with its numbers by size, what is missing first. */
function compare(a, b) {
  if (a === null || b === null) return (a !== null) - (b !== null);
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), "en", { numeric: true });
}

/** Of a model and its export: which node reads which weight on either side; `linkOf(side, id)` is its address. */
function drawLinks(links, linkOf) {
  const place = (side, id) => (id ? h("a", { href: linkOf(side, id) }, id) : h("span", { class: "muted" }, "missing"));
  const rank = (link) => Number(Boolean(link.before && link.after)); // what is missing first
  const rows = [...links]
    .sort((a, b) => rank(a) - rank(b))
    .map((link) =>
      h(
        "tr",
        {},
        h("td", { class: "weight" }, link.weight),
        h("td", {}, verdict(rank(link) === 1, "✓", "in both", link.before ? "only before" : "only after")),
        ["before", "after"].map((side) => h("td", {}, place(side, link[side]))),
      ),
    );
  const heads = ["Weight", "Read", "Before", "After"].map((label) => h("th", { scope: "col", class: "plain" }, label));
  const table = h("table", {}, h("thead", {}, h("tr", {}, heads)), h("tbody", {}, rows));
  $("matmuls").append(h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Matmuls" }, table));
}

// --- graph breaks and passes ---

function drawBreaks(breaks) {
  const intro = `${plural(breaks.length, "break")}: what Dynamo cannot capture runs in Python, between graphs.`;
  $("breaks").append(
    h("p", { class: "muted" }, intro),
    h(
      "ol",
      { class: "breaks" },
      breaks.map((each) =>
        h("li", {}, h("div", {}, each.reason), each.source && h("div", { class: "source" }, each.source)),
      ),
    ),
  );
}

/** The passes in order, by graph and stage; `linkOf(pass)` is the address of its stage's graph, or null. */
function drawPasses(passes, linkOf) {
  const changed = passes.filter((each) => each.changed).length;
  const total = passes.reduce((sum, each) => sum + each.seconds, 0);
  const intro = `${changed} of ${passes.length} passes changed a graph, in ${seconds(total)}.`;
  $("passes").append(h("p", { class: "muted" }, intro));
  let heading = "";
  let list = null;
  for (const each of passes) {
    const name = `graph ${each.graph}, ${each.stage}`;
    if (name !== heading) {
      heading = name;
      const address = linkOf(each);
      list = h("ol", { class: "passes" });
      $("passes").append(h("h3", {}, address ? h("a", { href: address }, name) : name), list);
    }
    list.append(h("li", {}, passRow(each)));
  }
}

function passRow(pass) {
  const mark = verdict(pass.changed, "●", "changed", "unchanged");
  const counts = ["created", "erased", "replaced", "left"].map((name) =>
    h("span", { class: pass[name] ? "count" : "count muted" }, `${integer(pass[name])} ${name}`),
  );
  const head = [h("code", {}, pass.name), mark, counts, h("span", { class: "count time" }, seconds(pass.seconds))];
  if (!pass.diff) return h("div", { class: "pass" }, head);
  const details = h("details", {}, h("summary", { class: "pass" }, head));
  // A diff may have thousands of lines; nobody waits for those that stay closed.
  details.addEventListener("toggle", () => details.children.length > 1 || details.append(drawDiff(pass.diff)), {
    once: true,
  });
  return details;
}

/** A text diff: runs of added and removed lines are marked by their signs and by colour. */
function drawDiff(text) {
  const kinds = { "+": "s-new", "-": "s-removed" };
  const runs = [];
  for (const line of text.split("\n")) {
    const kind = kinds[line[0]] ?? "s-context";
    if (runs.at(-1)?.kind === kind) runs.at(-1).lines.push(line);
    else runs.push({ kind, lines: [line] });
  }
  return h(
    "pre",
    { class: "diff", tabindex: "0" },
    runs.map((run) => h("span", { class: run.kind }, run.lines.join("\n"))),
  );
}
