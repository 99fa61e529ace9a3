// Rows of a run and what of them is chosen. Text reaches the document as text nodes only: names may hold anything.

const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const FILTERS = ["dataset", "task", "split", "backbone", "family"];
const PLACE = FILTERS.slice(0, 4); // what a table of the leaderboard is of
const FLAT = ["none", "fit_constant"]; // floors whatever the budget
const MOST = 4; // methods side by side

// ---- rows

const columns = data.columns.map((column, at) => ({ ...column, at }));
const byHeader = new Map(columns.map((column) => [column.header, column]));
const fields = Object.entries(data.fields);
const rows = data.group.map((group, id) => {
  const row = { id, group, method: data.method[id], kind: data.kind[id] };
  for (const name of ["title", "note", ...PLACE]) row[name] = data.groups[group][name];
  for (const [name, values] of fields) row[name] = values[id];
  if (given(row.lossless)) row.lossless = Number(row.lossless); // to sort by
  return row;
});
const nameOf = (row) => [row.compressor, text(row, "budget")].filter(Boolean).join(" at ");

function given(value) {
  return value !== null && value !== undefined;
}

function text(row, header) {
  const found = typeof header === "string" ? byHeader.get(header) : header;
  return found ? data.texts[found.at][row.id] : "";
}

function budgetsOf(label) { // "50, 25 %" is one state under two budgets
  const several = /^([\d.]+(?:, [\d.]+)*) %$/.exec(label);
  return several ? several[1].split(", ").map((each) => `${each} %`) : [label];
}

const ranking = (row) => given(row.gauc);
const accuracyOf = (row) => (ranking(row) ? "gauc" : "ndcg@10");
const accuracyName = (row) => accuracyOf(row).toUpperCase();
const alikeName = (row) => (ranking(row) ? "agreement" : "overlap@10");
const colourOf = (family) => (family === "chain" ? "var(--ink)" : data.colours[family] ?? "var(--soft)");

// ---- elements

function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name in made && typeof value !== "string") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => given(child) && child !== ""));
  return made;
}
const button = (label, onclick, attributes = {}) => el("button", { type: "button", onclick, ...attributes }, label);

function dot(colour) {
  const made = el("i", { class: "dot", "aria-hidden": "true" });
  made.style.background = colour;
  return made;
}

function plain(caption, head, lines, attributes = {}) {
  return el("table", { class: "plain", ...attributes }, el("caption", {}, caption),
    el("thead", {}, el("tr", {}, ...head.map((each) => el("th", { scope: "col" }, each)))),
    el("tbody", {}, ...lines));
}

// ---- what is chosen

const state = {
  filters: Object.fromEntries(FILTERS.map((name) => [name, new Set()])),
  search: "", complete: false, focus: 0, judge: "fidelity",
  picked: new Set(), compared: new Set(),
};

function inPlace(row) {
  return PLACE.every((name) => !state.filters[name].size || state.filters[name].has(row[name]));
}

// A method is complete if, in every table that is selected, it has all the budgets and seeds that it has in any.
function completeMethods() {
  const groups = data.groups.map((group, at) => at).filter((at) => inPlace(data.groups[at]));
  const found = new Map(); // method -> table -> budgets
  const broken = new Set(data.problems.filter(inPlace).map((each) => each.compressor));
  for (const row of rows.filter(inPlace)) {
    if (row.seeds !== undefined && row.seeds < row.seeds_total) broken.add(row.compressor);
    if (!found.has(row.compressor)) found.set(row.compressor, new Map());
    const tables = found.get(row.compressor);
    tables.set(row.group, new Set([...(tables.get(row.group) ?? []), ...budgetsOf(text(row, "budget"))]));
  }
  const whole = (tables) => {
    const every = new Set([...tables.values()].flatMap((each) => [...each]));
    return groups.every((at) => tables.get(at)?.size === every.size);
  };
  return new Set([...found.keys()].filter((name) => !broken.has(name) && whole(found.get(name))));
}
