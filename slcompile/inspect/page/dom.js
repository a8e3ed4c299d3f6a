"use strict";
// Elements and numbers. Text enters the page only as text nodes and attributes, never as markup.

const STATUSES = {
  kept: { glyph: "=", meaning: "in both graphs" },
  removed: { glyph: "−", meaning: "only before" },
  new: { glyph: "+", meaning: "only after" },
  rewritten: { glyph: "~", meaning: "the same role in another form" },
};

const $ = (id) => document.getElementById(id);

/** An element. Functions become listeners, null and false leave an attribute out, children may be nested arrays. */
function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  return fill(element, attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  return fill(element, attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false)
      element.setAttribute(name, value === true ? "" : value);
  }
  element.append(
    ...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false),
  );
  return element;
}

/** A status as icon and word; colour only repeats what they say. */
function badge(status, text = status) {
  return h(
    "span",
    { class: `badge s-${status}`, title: `${status}: ${STATUSES[status].meaning}` },
    glyph(status),
    " ",
    text,
  );
}

const glyph = (status) => h("span", { class: `glyph s-${status}`, "aria-hidden": "true" }, STATUSES[status].glyph);

const integer = (value) => value.toLocaleString("en-US");

/** Three significant digits with a prefix: 1.05 M. */
function si(value, unit = "") {
  const prefixes = ["", "k", "M", "G", "T", "P", "E"];
  let power = 0;
  while (Math.abs(value) >= 999.5 && power < prefixes.length - 1) {
    value /= 1000;
    power += 1;
  }
  const digits = power === 0 ? 0 : Math.max(0, 2 - Math.floor(Math.log10(Math.abs(value))));
  return `${value.toFixed(digits)} ${prefixes[power]}${unit}`.trim();
}

function seconds(value) {
  if (value >= 1) return `${value.toFixed(2)} s`;
  return value >= 1e-3 ? `${(value * 1e3).toFixed(value < 1e-2 ? 2 : 1)} ms` : `${(value * 1e6).toFixed(1)} µs`;
}

const percent = (value) => `${Number((100 * value).toPrecision(3))} %`;

const ratio = ({ before, after }) => (before ? `× ${(after / before).toFixed(2)}` : "");

/** "1.05 MB → 453 kB", or one number where nothing changed. */
function change({ before, after }, format) {
  return before === after ? format(before) : `${format(before)} → ${format(after)}`;
}

const plural = (count, word) => `${integer(count)} ${word}${count === 1 ? "" : "s"}`;
