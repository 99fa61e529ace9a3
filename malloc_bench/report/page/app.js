// The page of a run. Text reaches the document as text nodes only: names in a run may hold anything.

const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const FILTERS = ["dataset", "task", "split", "backbone", "family"];
const PLACE = FILTERS.slice(0, 4); // what a table of the leaderboard is of
const MOST = 4; // methods side by side

// ---- rows

const columns = data.columns.map((column, at) => ({ ...column, at }));
const column = (header) => columns.find((each) => each.header === header);
const rows = data.group.map((group, id) => {
  const row = { id, group, ...data.groups[group], method: data.method[id], kind: data.kind[id] };
  for (const [name, values] of Object.entries(data.fields)) row[name] = values[id];
  row.lossless = row.lossless === null ? null : Number(row.lossless);
  row.budgets = budgetsOf(text(row, "budget"));
  row.name = [row.compressor, text(row, "budget")].filter(Boolean).join(" at ");
  return row;
});

function text(row, header) {
  const found = typeof header === "string" ? column(header) : header;
  return found ? data.texts[found.at][row.id] : "";
}

function budgetsOf(label) { // "50, 25 %" is one state under two budgets
  const several = /^([\d.]+(?:, [\d.]+)*) %$/.exec(label);
  return several ? several[1].split(", ").map((each) => `${each} %`) : [label];
}

const ranking = (row) => row.gauc !== null && row.gauc !== undefined;
const accuracyOf = (row) => (ranking(row) ? "gauc" : "ndcg@10");
const accuracyName = (row) => accuracyOf(row).toUpperCase();
const alikeName = (row) => (ranking(row) ? "agreement" : "overlap@10");
const given = (value) => value !== null && value !== undefined;

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
    tables.set(row.group, new Set([...(tables.get(row.group) ?? []), ...row.budgets]));
  }
  const whole = (tables) => {
    const every = new Set([...tables.values()].flatMap((each) => [...each]));
    return groups.every((at) => tables.get(at)?.size === every.size);
  };
  return new Set([...found.keys()].filter((name) => !broken.has(name) && whole(found.get(name))));
}

let shown = rows;
function select() {
  const complete = state.complete ? completeMethods() : null;
  const family = state.filters.family, search = state.search.toLowerCase();
  shown = rows.filter((row) => inPlace(row) && (!family.size || family.has(row.family))
    && (!complete || complete.has(row.compressor)) && (!search || row.compressor.toLowerCase().includes(search)));
  const passing = new Set(shown.map((row) => row.id));
  table.setFilter((row) => passing.has(row.id));
  drawChips();
  drawCallouts();
  drawFocus();
  draw();
}

// ---- head, best, filters

function drawFacts() {
  const { ok, skipped, failed } = data.statuses;
  const fact = (n, word) => el("li", {}, el("b", {}, n.toLocaleString("en")), ` ${word}`);
  $("facts").append(fact(ok, "cells measured"), ...(failed ? [fact(failed, "failed")] : []),
    ...(skipped ? [fact(skipped, "skipped")] : []), fact(data.groups.length, data.groups.length === 1 ? "table" : "tables"),
    ...(data.dates.length ? [el("li", {}, [...new Set(data.dates)].join(" to "))] : []));
}

function drawBest() {
  const limits = [...new Map(data.best.map((each) => [each.limit, each.within]))].sort((a, b) => b[0] - a[0]);
  if (!limits.length) return $("best").append(el("p", { class: "hint" }, "No row of this run has a budget that is a share of bytes."));
  const cell = (group, limit) => {
    const found = data.best.find((each) => each.limit === limit && rows[each.row].group === group);
    if (!found) return el("td", {});
    const row = rows[found.row], kept = text(row, "fidelity") || text(row, alikeName(row));
    const ties = (found.ties ?? []).length;
    return el("td", {}, button(row.compressor, () => openCell(row), { class: "link" }),
      el("small", {}, `${kept} · ${text(row, "× smaller")}× smaller`, ties ? ` · ties with ${ties}` : ""));
  };
  const lines = data.groups.map((group, at) => el("tr", {},
    el("th", { scope: "row" }, group.backbone, el("small", {}, `${group.dataset} · ${group.task} · ${group.split}`),
      group.headroom === false ? el("small", { class: "warned" }, "no headroom: judges nothing") : ""),
    ...limits.map(([limit]) => cell(at, limit))));
  $("best").append(plain(el("span", { class: "hidden" }, "Best method by table and budget"),
    ["table", ...limits.map(([, within]) => `≤ ${within} of bytes`)], lines));
}

function drawFilters() {
  for (const name of FILTERS) {
    const values = [...new Set(rows.map((row) => row[name]))].sort();
    if (values.length < 2) continue;
    const choose = el("select", { "aria-label": `Filter by ${name}`, "data-filter": name },
      el("option", { value: "" }, `${name[0].toUpperCase()}${name.slice(1)} …`),
      ...values.map((value, at) => el("option", { value: String(at) }, value)));
    choose.addEventListener("change", () => {
      if (choose.value !== "") state.filters[name].add(values[Number(choose.value)]);
      choose.value = "";
      select();
    });
    $("filters").append(choose);
  }
  const search = el("input", { type: "search", placeholder: "Method contains …", "aria-label": "Filter by a method's name" });
  search.addEventListener("input", () => { state.search = search.value; select(); });
  const check = el("input", { type: "checkbox", id: "complete" });
  check.addEventListener("change", () => { state.complete = check.checked; select(); });
  $("filters").append(search, el("label", { class: "check" }, check, "only methods complete on what is selected"));
}

function drawChips() {
  const chip = (label, remove) => el("li", {}, button(`${label} ×`, remove, { "aria-label": `Remove the filter ${label}`, title: label }));
  const chips = FILTERS.flatMap((name) => [...state.filters[name]].map((value) => chip(`${name}: ${value}`, () => {
    state.filters[name].delete(value);
    select();
  })));
  const clear = (id, value) => { const input = $("filters").querySelector(id); input[value ? "checked" : "value"] = value ? false : ""; };
  if (state.search) chips.push(chip(`method contains: ${state.search}`, () => { state.search = ""; clear("[type=search]"); select(); }));
  if (state.complete) chips.push(chip("complete methods only", () => { state.complete = false; clear("#complete", true); select(); }));
  if (state.picked.size) chips.push(chip(`${state.picked.size} picked`, () => pick([])));
  $("chips").replaceChildren(...chips);
  $("count").textContent = `${shown.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} rows shown`;
  for (const each of $("legend").querySelectorAll("button")) each.setAttribute("aria-pressed", String(state.filters.family.has(each.dataset.family)));
}

function drawCallouts() {
  const groups = [...new Set(shown.map((row) => row.group))].map((at) => data.groups[at]).filter((group) => group.note);
  $("callouts").replaceChildren(...groups.map((group) => el("p", { class: "callout" },
    ...(data.groups.length > 1 ? [el("b", {}, group.title), ": "] : []), group.note)));
}

function drawFocus() {
  const groups = [...new Set(shown.map((row) => row.group))].sort((a, b) => a - b);
  if (!groups.includes(state.focus)) state.focus = groups[0] ?? 0;
  $("focus").replaceChildren(...groups.map((at) => el("option", { value: String(at), selected: at === state.focus }, data.groups[at].title)));
  const first = rows.find((row) => row.group === state.focus);
  if (first) $("judge").options[1].textContent = accuracyName(first);
}

function drawLegend() {
  const families = [...new Set(rows.map((row) => row.family))].sort();
  const dot = (colour) => { const made = el("i", { "aria-hidden": "true" }); made.style.setProperty("--own", colour); return made; };
  $("legend").replaceChildren(
    ...families.map((family) => el("li", {}, el("button", { type: "button", "data-family": family, "aria-pressed": "false", onclick: () => {
      const chosen = state.filters.family;
      if (!chosen.delete(family)) chosen.add(family);
      select();
    } }, dot(colourOf(family)), family))),
    el("li", {}, el("button", { type: "button", disabled: true }, el("i", { class: "line", "aria-hidden": "true" }), "front of kept states")));
}

// ---- table

const FIRST = 190; // px of the frozen column of names; narrower on a phone
function widthOf(each) {
  const longest = data.texts[each.at].reduce((most, one) => Math.max(most, one.length), 0);
  const head = Math.max(...each.header.split(/[ ]/).map((word) => word.length)) + 2;
  return Math.round(22 + 7.6 * Math.min(34, Math.max(longest, head, each.header.length / 2)));
}

function tableColumns() {
  const sorters = (left) => ({ sorter: left ? "string" : "number", sorterParams: { alignEmptyValues: "bottom" } });
  const made = columns.filter((each) => each.part === "table" && each.header !== "compressor").map((each) => ({
    title: each.header, field: each.field, width: widthOf(each), hozAlign: each.left ? "left" : "right", headerHozAlign: each.left ? "left" : "right",
    headerSortStartingDir: each.left ? "asc" : "desc", ...sorters(each.left),
    formatter: (cell) => document.createTextNode(text(cell.getData(), each)),
  }));
  const places = PLACE.filter((name) => new Set(data.groups.map((group) => group[name])).size > 1).map((name) => ({
    title: name, field: name, width: 120, ...sorters(true), formatter: (cell) => document.createTextNode(cell.getValue()),
  }));
  const name = {
    title: "method", field: "compressor", frozen: true, width: innerWidth < 720 ? 148 : FIRST + 60, ...sorters(true),
    formatter: (cell) => {
      const row = cell.getData();
      return el("span", { title: row.compressor }, row.compressor, row.kind ? el("span", { class: "tag" }, row.kind) : "");
    },
  };
  const choose = {
    title: "compare", width: 84, headerSort: false, hozAlign: "center", cssClass: "compared", print: false,
    formatter: (cell) => {
      const row = cell.getData();
      return el("input", { type: "checkbox", tabindex: "-1", "aria-label": `Compare ${row.name}`, checked: state.compared.has(row.id) });
    },
  };
  return [name, ...places, ...made, choose];
}

const table = new Tabulator("#rows", {
  data: rows, index: "id", columns: tableColumns(), nestedFieldSeparator: false, layout: "fitData", height: "min(72vh, 680px)",
  rowHeight: 33, placeholder: "No row passes the filters.", printAsHtml: true, printStyled: false, printRowRange: "active",
  columnDefaults: { headerWordWrap: true, resizable: false, vertAlign: "middle" },
  rowFormatter: (row) => {
    const made = row.getElement();
    made.dataset.id = row.getIndex();
    made.tabIndex = -1;
  },
});
const built = new Promise((done) => table.on("tableBuilt", done));
table.on("renderComplete", mark);
table.on("scrollVertical", mark);

function mark() {
  for (const made of $("rows").querySelectorAll(".tabulator-row[data-id]")) {
    const id = Number(made.dataset.id), box = made.querySelector("input");
    made.classList.toggle("picked", state.picked.has(id) || state.compared.has(id));
    made.setAttribute("aria-selected", String(state.compared.has(id)));
    if (box) box.checked = state.compared.has(id);
  }
}

function readyTable() {
  const grid = $("rows"), holder = grid.querySelector(".tabulator-tableholder");
  grid.setAttribute("aria-labelledby", "rows-title");
  holder.setAttribute("aria-label", "Rows: arrows move, Enter opens a cell, Space chooses it to compare");
  for (const head of grid.querySelectorAll(".tabulator-col.tabulator-sortable")) head.tabIndex = 0;
  grid.addEventListener("click", ({ target }) => {
    const made = target.closest(".tabulator-row[data-id]");
    if (!made) return;
    if (target.closest(".compared")) compare(Number(made.dataset.id));
    else openCell(rows[Number(made.dataset.id)]);
  });
  grid.addEventListener("keydown", (event) => {
    const head = event.target.closest(".tabulator-col"), made = event.target.closest(".tabulator-row[data-id]");
    if (head && (event.key === "Enter" || event.key === " ")) head.click();
    else if (made && event.key === "Enter") openCell(rows[Number(made.dataset.id)]);
    else if (made && event.key === " ") compare(Number(made.dataset.id));
    else if (event.key === "ArrowDown" || event.key === "ArrowUp") step(made, event.key === "ArrowDown");
    else return;
    event.preventDefault();
  });
}

async function step(made, down) {
  const from = made && table.getRow(Number(made.dataset.id));
  const to = from ? (down ? from.getNextRow() : from.getPrevRow()) : table.getRows("visible")[0];
  if (!to) return;
  await table.scrollToRow(to, "nearest", false).catch(() => {});
  to.getElement().focus({ preventScroll: true });
}

// ---- charts

const PANELS = [
  { id: "memory", title: "Memory", make: (own, group) => scatter(own, group, "bytes", "bytes_mean", "state (bytes a user)") },
  { id: "cost", title: "Cost of a read", make: costly },
  { id: "curves", title: "What a smaller budget loses", make: curves },
  { id: "slices", title: "By length of history", make: slices },
  { id: "parts", title: "What the bytes hold", make: parts },
];
const views = new Map();
const specs = JSON.parse($("specs").textContent);

function dark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}
const inkOf = () => (dark() ? "#e6e8eb" : "#1a1c20");
const colourOf = (family) => (family === "chain" ? "var(--ink)" : data.colours[family] ?? data.other);

function judged(row) { // the value that points are as high as
  if (state.judge === "accuracy") return row[accuracyOf(row)];
  return row.fidelity ?? row[alikeName(row)];
}

function judgedName(own) {
  if (state.judge === "accuracy") return accuracyName(own[0]);
  return own.some((row) => given(row.fidelity)) ? `fidelity (${alikeName(own[0])} above no history's)` : alikeName(own[0]);
}

function point(row, x, y) {
  const name = ranking(row) ? "ΔGAUC [95 % interval]" : "ΔNDCG@10 [95 % interval]";
  return {
    id: row.id, x, y, family: row.family, kind: row.kind, method: row.compressor, budget: text(row, "budget"),
    fidelity: text(row, "fidelity"), accuracy: text(row, ranking(row) ? "GAUC" : "NDCG@10"), interval: text(row, name),
    "KB a user": text(row, "state (KB/user)"), read: text(row, "read (× full)") && `${text(row, "read (× full)")} × full`,
  };
}

function ends(row, base) { // the interval of the difference, around a value
  const of = `delta_${accuracyOf(row)}`;
  if (![row[of], row[`${of}_lo`], row[`${of}_hi`]].every(given)) return {};
  return { lo: base + row[`${of}_lo`], hi: base + row[`${of}_hi`] };
}

function frontOf(points) { // what no other beats: none is as cheap and better
  let most = -Infinity;
  const sorted = [...points].sort((a, b) => a.x - b.x || b.y - a.y);
  const found = sorted.filter((each) => each.y > most && ((most = each.y), true)).map(({ x, y }) => ({ x, y }));
  return found.length ? [...found, { x: sorted.at(-1).x, y: most }] : [];
}

function scatter(own, group, spec, field, x) {
  const flat = ["none", "fit_constant"];
  const measured = own.filter((row) => row[field] > 0 && given(judged(row)) && !flat.includes(row.method));
  if (!measured.length) return null;
  const points = measured.map((row) => ({ ...point(row, row[field], judged(row)),
    ...(state.judge === "accuracy" ? ends(row, judged(row) - row[`delta_${accuracyOf(row)}`]) : {}) }));
  const levels = rows.filter((row) => row.group === group && flat.includes(row.method) && given(judged(row)))
    .map((row) => ({ y: judged(row), name: row.method === "none" ? "no history" : row.method }));
  const kept = points.filter((each) => each.kind !== "recompute" && each.kind !== "ceiling");
  return { spec, x, y: judgedName(own), data: { rows: points, levels, front: frontOf(kept) },
    said: `${points.length} rows as points; stepped line: the front of what keeps a state.` };
}

function costly(own, group) {
  const costs = [["read_ratio", "cost", "a read (× the full state's)"], ["read_ms_p50", "cost", "a read (ms, p50)"], ["read_flops", "flops", "a read (FLOPs)"]];
  const found = costs.find(([field]) => own.some((row) => row[field] > 0));
  return found ? scatter(own, group, found[1], found[0], found[2]) : null;
}

function curves(own) {
  const of = `delta_${accuracyOf(own[0])}`;
  const measured = own.filter((row) => row.ratio > 0 && given(row[of]));
  if (!measured.length) return null;
  const points = measured.map((row) => ({ ...point(row, row.ratio, row[of]), ...ends(row, 0),
    line: text(row, "budget") ? row.compressor : row.method }));
  return { spec: "curves", x: "state (share of the full state's bytes)", y: `Δ${accuracyName(own[0])} to the full state`,
    data: { rows: points, levels: [{ y: 0, name: "full state" }] },
    said: "A line a method through its budgets; bars: 95 % paired intervals, drawn out for what is picked or compared." };
}

function singled(own) { // what is picked or compared, else the best at each budget
  const chosen = own.filter((row) => state.compared.has(row.id) || state.picked.has(row.id)).slice(0, 8);
  const best = new Set(data.best.map((each) => each.row));
  return chosen.length ? chosen : own.filter((row) => best.has(row.id)).slice(0, 8);
}

function slices(own, group) {
  const value = state.judge === "accuracy" && !ranking(own[0]) ? "ndcg@10" : alikeName(own[0]);
  const points = singled(own).flatMap((row) => data.slices.map((slice, order) => ({
    ...point(row, null, row[`${value} ${slice}`]), order, users: row[`n_users ${slice}`], label: row.name,
    slice: `${slice}|${(row[`n_users ${slice}`] ?? 0).toLocaleString("en")} users`,
  }))).filter((each) => given(each.y));
  return points.length ? { spec: "slices", x: "events in the history", y: value.toUpperCase().replace("OVERLAP", "overlap").replace("AGREEMENT", "agreement"),
    data: { rows: points }, said: "What is picked or compared, else the best at each budget." } : null;
}

function parts(own) {
  const points = singled(own).flatMap((row, order) => Object.entries(data.parts?.[row.id] ?? {}).map(([part, x]) => ({ id: row.id, order, part, x, label: row.name })));
  return points.length ? { spec: "parts", x: "bytes a user", y: "", data: { rows: points }, said: "What is picked or compared, else the best at each budget." } : null;
}

function drawPanels() {
  for (const { id, title } of PANELS) {
    if (id === "parts" && !data.parts) continue;
    $("plots").append(el("figure", { id, role: "group", "aria-labelledby": `${id}-title`, "aria-describedby": `${id}-said` },
      el("figcaption", {}, el("h3", { id: `${id}-title` }, title), el("p", { id: `${id}-said` })), el("div", { class: "chart" })));
  }
}

let drawing = Promise.resolve();
function draw() { // one after the other, the page stays responsive between them
  drawing = drawing.then(async () => {
    const own = shown.filter((row) => row.group === state.focus);
    for (const panel of PANELS.filter(({ id }) => $(id))) {
      await show(panel.id, own.length ? panel.make(own, state.focus) : null);
      await new Promise((next) => setTimeout(next));
    }
  });
  return drawing;
}

async function show(id, made) {
  const place = $(id).querySelector(".chart"), old = views.get(id);
  const key = made && JSON.stringify([made.spec, made.x, made.y, dark(), made.data.rows.length > 1500]);
  if (old && old.key !== key) { old.view.finalize(); views.delete(id); }
  $(`${id}-said`).textContent = made?.said ?? "";
  place.classList.toggle("empty", !made);
  if (!made) return place.replaceChildren(shown.length ? "Not measured in these rows." : "No row passes the filters.");
  if (!views.has(id)) views.set(id, { key, view: await embed(id, place, made) });
  const { view } = views.get(id);
  views.get(id).rows = made.data.rows;
  for (const [name, values] of Object.entries(made.data)) view.data(name, values);
  tell(id);
  await view.runAsync();
}

async function embed(id, place, made) {
  const families = [...new Set(rows.map((row) => row.family))].sort(), ink = inkOf(), grid = dark() ? "#30343b" : "#e3e6ea";
  const filled = { $ink: ink, $x: made.x, $y: made.y };
  const lists = { $families: families, $colours: families.map((family) => (family === "chain" ? ink : colourOf(family))) };
  const spec = JSON.parse(JSON.stringify(specs[made.spec]), (key, value) =>
    Array.isArray(value) && value[0] in lists ? lists[value[0]] : typeof value === "string" && value in filled ? filled[value] : value);
  const font = getComputedStyle(document.body).fontFamily, soft = dark() ? "#a3aab5" : "#5b616b";
  const config = {
    background: "transparent", font, view: { stroke: null },
    axis: { labelColor: soft, titleColor: soft, gridColor: grid, domainColor: grid, tickColor: grid, titleFontWeight: 500, labelFontSize: 11.5, titleFontSize: 12 },
    legend: { labelColor: ink, titleColor: soft, labelLimit: 300 },
  };
  spec.datasets = made.data; // without any a log axis has no end
  const { view } = await vegaEmbed(place, spec, { actions: false, ast: true, config, logLevel: vega.Error,
    renderer: made.data.rows.length > 1500 ? "canvas" : "svg", tooltip: { theme: "custom" } });
  view.addEventListener("click", (event, item) => { if (given(item?.datum?.id)) openCell(rows[item.datum.id]); });
  if (view.getState().signals.brush !== undefined) view.addSignalListener("brush", (name, box) => brushed(id, box));
  return view;
}

function brushed(id, box) {
  if (!box.x || !box.y) return state.brushed === id && pick([]);
  const inside = ([low, high], value) => value >= Math.min(low, high) && value <= Math.max(low, high);
  state.brushed = id;
  pick(views.get(id).rows.filter((each) => inside(box.x, each.x) && inside(box.y, each.y)).map((each) => each.id));
}

function pick(ids) {
  state.picked = new Set(ids);
  if (!ids.length) state.brushed = null;
  cancelAnimationFrame(pick.next);
  pick.next = requestAnimationFrame(highlight);
}

function highlight() { // the same rows in every plot and in the table
  mark();
  drawChips();
  for (const [id, { view }] of views) {
    tell(id);
    view.runAsync();
  }
  clearTimeout(highlight.later);
  highlight.later = setTimeout(draw, 120); // slices and parts show what is picked
}

function tell(id) {
  const { view, rows: points } = views.get(id), ids = [...new Set([...state.picked, ...state.compared])];
  const signals = view.getState().signals;
  view.signal("picked", ids).signal("few", points.length <= 60);
  if (signals.lines !== undefined) view.signal("lines", [...new Set(points.filter((each) => ids.includes(each.id)).map((each) => each.line))]);
  if (signals.brush_x !== undefined && state.brushed !== id && signals.brush_x?.length) view.signal("brush_x", [0, 0]).signal("brush_y", [0, 0]);
}

// ---- a cell, and cells side by side

function openDialog(title, wide, ...content) {
  const dialog = $("dialog");
  dialog.classList.toggle("wide", wide);
  dialog.replaceChildren(el("div", { class: "head" }, el("h2", { id: "dialog-title" }, title), button("Close", () => dialog.close())), ...content);
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
}

function command(id) { // opened from its folder, the page knows where the run is
  const folder = decodeURIComponent(location.pathname).replace(/\/[^/]*$/, "");
  const run = location.protocol === "file:" ? folder : data.run;
  return `malloc-bench reproduce ${/^[\w./-]+$/.test(run) ? run : `'${run.replaceAll("'", `'\\''`)}'`} ${id.slice(0, 12)}`;
}

function key(pairs) {
  return el("dl", { class: "key" }, ...pairs.filter(([, value]) => given(value) && value !== "").map(([name, value]) =>
    el("div", {}, el("dt", {}, name), el("dd", {}, typeof value === "object" ? JSON.stringify(value) : String(value)))));
}

function openCell(row) {
  const [compressor, backbone] = data.parameters[data.parameter[row.id]], cells = data.cells[row.id];
  const part = (name) => key(columns.filter((each) => each.part === name).map((each) => [each.header, text(row, each)]));
  const has = (name) => columns.some((each) => each.part === name && text(row, each));
  const sections = [["accuracy", "More accuracy"], ["bytes", "Bytes"], ["costs", "Costs"]].filter(([name]) => has(name));
  const environment = data.environments[cells[0]?.[2]] ?? {};
  const seeds = cells.map(([id, seed, , date, alike, accuracy]) => el("tr", {}, el("th", { scope: "row" }, String(seed ?? "")),
    ...[id.slice(0, 12), alike, accuracy, date.replace("T", " ")].map((each) => el("td", {}, given(each) ? String(each) : ""))));
  const chosen = state.compared.has(row.id);
  openDialog(row.name, false,
    el("p", { class: "hint" }, row.title, row.kind ? ` · ${row.kind}` : ""),
    row.note ? el("p", { class: "callout" }, row.note) : "",
    el("h3", {}, "Result"), key(columns.filter((each) => each.part === "table" && each.header !== "compressor").map((each) => [each.header, text(row, each)])),
    ...sections.flatMap(([name, title]) => [el("h3", {}, title), part(name)]),
    ...(given(compressor) && Object.keys(compressor).length ? [el("h3", {}, "Parameters"), key(Object.entries(compressor))] : []),
    ...(given(backbone) ? [el("h3", {}, "Backbone"), key(Object.entries(backbone))] : []),
    el("h3", {}, "Seeds"), el("div", { class: "scroll" }, plain(`${cells.length} that ended well`, ["seed", "cell", alikeName(row), accuracyName(row), "made (UTC)"], seeds)),
    el("h3", {}, "Reproduce"), ...cells.map(([id]) => el("pre", {}, command(id))),
    el("h3", {}, "Environment"), key(Object.entries(environment).flatMap(([name, value]) =>
      given(value) && typeof value === "object" ? Object.entries(value) : [[name.replace("_", " "), value]])),
    el("p", { class: "buttons" }, button(chosen ? "Leave out of the comparison" : "Compare with others", () => { compare(row.id); $("dialog").close(); }, { class: "primary" })));
}

function compare(id) {
  if (!state.compared.delete(id) && state.compared.size < MOST) state.compared.add(id);
  drawTray();
  highlight();
}

function drawTray() {
  const chosen = [...state.compared].map((id) => rows[id]);
  $("tray").hidden = !chosen.length;
  $("tray").replaceChildren(
    el("span", { role: "status" }, `${chosen.length} of ${MOST} to compare`),
    el("ul", { class: "chips", "aria-label": "Chosen to compare" }, ...chosen.map((row) => el("li", {}, button(`${row.name} ×`, () => compare(row.id), { "aria-label": `Leave out ${row.name}` })))),
    button("Compare", () => openComparison(chosen), { class: "primary", disabled: chosen.length < 2 }),
    button("Clear", () => { state.compared.clear(); drawTray(); highlight(); }));
}

const HIGH = ["fidelity", "overlap@10", "agreement", "ndcg@10", "hr@10", "gauc", "auc", "smaller_x"]; // the most is best
const LOW = ["bytes_mean", "read_ratio", "read_ms_p50", "read_flops", "compress_ms_p50", "logloss", "logit_error"];
function openComparison(chosen) {
  const filled = columns.filter((each) => each.header !== "compressor" && chosen.some((row) => text(row, each)));
  const line = (each) => {
    const values = chosen.map((row) => row[each.field]).filter(given);
    const best = HIGH.includes(each.field) ? Math.max(...values) : LOW.includes(each.field) ? Math.min(...values) : null;
    return el("tr", {}, el("th", { scope: "row" }, each.header), ...chosen.map((row) =>
      el("td", best !== null && row[each.field] === best ? { class: "most" } : {}, text(row, each))));
  };
  const place = el("tr", {}, el("th", { scope: "row" }, "table"), ...chosen.map((row) => el("td", {}, row.title)));
  openDialog("Side by side", true, el("div", { class: "scroll", tabindex: "0" },
    plain("Bold: the best of these", ["", ...chosen.map((row) => row.compressor)], [place, ...filled.map(line)], { class: "plain versus" })));
}

// ---- what did not end well, notes, theme

function drawProblems() {
  const kinds = new Map();
  for (const each of data.problems) {
    const said = `${each.status}: ${(each.reason ?? "").trim().split("\n")[0] || "no reason recorded"}`;
    kinds.set(said, [...(kinds.get(said) ?? []), each]);
  }
  $("problems").hidden = !kinds.size;
  const where = (each) => [each.dataset, each.task, each.backbone, each.compressor + (each.budget ? ` at ${each.budget}` : ""), `seed ${each.seed}`].join(" · ");
  const sorted = [...kinds].sort(([a], [b]) => (a < b ? -1 : 1));
  $("problems").append(...sorted.map(([said, cells]) => el("details", {},
    el("summary", { class: cells[0].status }, `${said} (${cells.length} ${cells.length === 1 ? "cell" : "cells"})`),
    el("ul", {}, ...cells.map((each) => el("li", {}, where(each),
      each.traceback ? el("details", {}, el("summary", {}, "traceback"), el("pre", {}, each.traceback)) : ""))))));
}

function themed(name) {
  document.documentElement.dataset.theme = name;
  $("theme").textContent = dark() ? "Light" : "Dark";
  $("theme").setAttribute("aria-label", `Switch to ${dark() ? "light" : "dark"}`);
}

drawFacts();
drawBest();
drawFilters();
drawLegend();
drawPanels();
drawProblems();
$("notes").append(...data.notes.map((note) => el("li", {}, note)));
$("theme").addEventListener("click", () => { themed(dark() ? "light" : "dark"); draw(); });
$("focus").addEventListener("change", () => { state.focus = Number($("focus").value); draw(); });
$("judge").addEventListener("change", () => { state.judge = $("judge").value; draw(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
themed(dark() ? "dark" : "light");
built.then(() => {
  readyTable();
  select();
  drawing.then(() => { document.documentElement.dataset.ready = "true"; });
});
