// The page of a run: what is best, filters, the table, cells alone and side by side.

let shown = rows;
function select() {
  const complete = state.complete ? completeMethods() : null;
  const family = state.filters.family, search = state.search.toLowerCase();
  shown = rows.filter((row) => inPlace(row) && (!family.size || family.has(row.family))
    && (!complete || complete.has(row.compressor)) && (!search || row.compressor.toLowerCase().includes(search)));
  const passing = new Set(shown.map((row) => row.id));
  table.setFilter((row) => passing.has(row.id));
  describe();
  draw();
}

function describe() {
  drawChips();
  drawCallouts();
  drawFocus();
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
  const cell = (group, [limit, within]) => {
    const found = data.best.find((each) => each.limit === limit && rows[each.row].group === group);
    if (!found) return el("td", {});
    const row = rows[found.row], kept = text(row, "fidelity") || text(row, alikeName(row));
    const ties = found.ties === null ? "" : found.ties.length ? ` · ties with ${found.ties.length}` : " · no ties";
    return el("td", { "data-label": `≤ ${within}`, title: (found.ties ?? []).join("\n") }, button(row.compressor, () => openCell(row), { class: "link" }),
      el("small", {}, `${kept} · ${text(row, "× smaller")}× smaller${ties}`));
  };
  const lines = data.groups.map((group, at) => el("tr", {},
    el("th", { scope: "row" }, group.backbone, el("small", {}, `${group.dataset} · ${group.task} · ${group.split}`),
      group.headroom === false ? el("small", { class: "warned" }, "no headroom: accuracy judges nothing") : ""),
    ...limits.map((limit) => cell(at, limit))));
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
  const search = el("input", { type: "search", id: "search", placeholder: "Method contains …", "aria-label": "Filter by a method's name" });
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
  if (state.search) chips.push(chip(`method contains: ${state.search}`, () => { state.search = $("search").value = ""; select(); }));
  if (state.complete) chips.push(chip("complete methods only", () => { state.complete = $("complete").checked = false; select(); }));
  if (state.picked.size) chips.push(chip(`${state.picked.size} picked`, () => pick([])));
  if (chips.length > 1) chips.push(el("li", {}, button("Clear all", clearFilters)));
  $("chips").replaceChildren(...chips);
  $("count").textContent = `${shown.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} rows shown`;
  for (const each of $("legend").querySelectorAll("button")) each.setAttribute("aria-pressed", String(state.filters.family.has(each.dataset.family)));
}

function clearFilters() {
  for (const chosen of Object.values(state.filters)) chosen.clear();
  Object.assign(state, { search: "", complete: false });
  $("search").value = "";
  $("complete").checked = false;
  pick([]);
  select();
}

function drawCallouts() {
  const groups = [...new Set(shown.map((row) => row.group))].map((at) => data.groups[at]);
  const noted = groups.filter((group) => group.note), blind = groups.filter((group) => group.headroom === false);
  const said = noted.map((group) => el("p", {}, ...(data.groups.length > 1 ? [el("b", {}, group.title), ": "] : []), group.note));
  const head = `${blind.length || "No"} of ${groups.length} tables shown ${blind.length === 1 ? "has" : "have"} no headroom and can judge nothing by accuracy`;
  $("callouts").replaceChildren(...(!said.length ? [] : said.length < 3 ? [el("div", { class: "callout" }, ...said)]
    : [el("details", { class: "callout" }, el("summary", {}, head), ...said)]));
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
  $("legend").replaceChildren(
    ...families.map((family) => el("li", {}, el("button", { type: "button", "data-family": family, "aria-pressed": "false", onclick: () => {
      const chosen = state.filters.family;
      if (!chosen.delete(family)) chosen.add(family);
      select();
    } }, dot(colourOf(family)), family))),
    el("li", {}, el("button", { type: "button", disabled: true }, el("i", { class: "dot line", "aria-hidden": "true" }), "front of kept states")));
}

// ---- table

const narrow = () => innerWidth < 720;
const pen = document.createElement("canvas").getContext("2d");
function widthOf(header, values, most = 240) { // of what is written; a header may take two lines
  pen.font = `13.5px ${getComputedStyle(document.body).fontFamily}`;
  const wide = (words) => pen.measureText(words).width;
  const longest = values.reduce((most, one) => (one.length > most.length ? one : most), "");
  const head = Math.max(...header.split(" ").map(wide), 0.62 * wide(header)) + 30;
  return Math.round(20 + Math.min(most, Math.max(wide(longest), head)));
}

const PRINTED = ["size", "fidelity", "overlap@10", "agreement", "delta_ndcg@10", "delta_gauc", "bytes_mean", "smaller_x", "read_ratio", "ndcg@10", "gauc"];
function tableColumns() {
  const sorters = (left) => ({ sorter: left ? "string" : "number", sorterParams: { alignEmptyValues: "bottom" } });
  const made = columns.filter((each) => each.part === "table" && each.header !== "compressor").map((each) => ({
    title: each.header, field: each.field, width: widthOf(each.header, data.texts[each.at], each.left ? 130 : 240), hozAlign: each.left ? "left" : "right", headerHozAlign: each.left ? "left" : "right",
    headerSortStartingDir: each.left ? "asc" : "desc", ...sorters(each.left), print: PRINTED.includes(each.field),
    formatter: (cell) => document.createTextNode(text(cell.getData(), each)),
  }));
  const places = PLACE.filter((name) => new Set(data.groups.map((group) => group[name])).size > 1).map((name) => ({
    title: name, field: name, width: widthOf(name, data.groups.map((group) => group[name])), ...sorters(true), formatter: (cell) => document.createTextNode(cell.getValue()),
  }));
  const name = {
    title: "method", field: "compressor", frozen: true, width: narrow() ? 150 : 36 + widthOf("method", rows.map((row) => row.compressor), 330), ...sorters(true),
    formatter: (cell) => {
      const row = cell.getData();
      return el("span", { title: `${row.compressor} (${row.family})` }, dot(colourOf(row.family)), row.compressor,
        ...(row.kind && row.kind !== row.method ? [" ", el("span", { class: "tag" }, row.kind)] : [])); // the space is for who hears it
    },
  };
  const choose = {
    title: "", field: "compared", width: 34, frozen: true, headerSort: false, hozAlign: "center", cssClass: "compared", print: false,
    formatter: (cell) => {
      const row = cell.getData();
      return el("input", { type: "checkbox", tabindex: "-1", "aria-label": `Compare ${nameOf(row)}`, checked: state.compared.has(row.id) });
    },
  };
  return narrow() ? [choose, name, ...made, ...places] : [choose, name, ...places, ...made];
}

const table = new Tabulator("#rows", {
  data: rows, index: "id", columns: tableColumns(), nestedFieldSeparator: false, layout: "fitData", height: "min(72vh, 680px)",
  rowHeight: 33, autoResize: false, placeholder: "No row passes the filters.", printAsHtml: true, printStyled: false, printRowRange: "active",
  columnDefaults: { headerWordWrap: true, resizable: false, vertAlign: "middle" },
  rowFormatter: (row) => {
    const made = row.getElement();
    made.dataset.id = row.getIndex();
    made.tabIndex = -1;
  },
});
const built = new Promise((done) => table.on("tableBuilt", done));
addEventListener("resize", () => table.redraw());
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
  grid.querySelector(".tabulator-col.compared").setAttribute("aria-label", "Compare");
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
  const chosen = state.compared.has(row.id), held = partsOf(row), stacked = el("div", { class: "chart low" });
  openDialog(nameOf(row), false,
    el("p", { class: "hint" }, row.title, row.kind ? ` · ${row.kind}` : ""),
    row.note ? el("p", { class: "callout" }, row.note) : "",
    el("h3", {}, "Result"), key(columns.filter((each) => each.part === "table" && each.header !== "compressor").map((each) => [each.header, text(row, each)])),
    ...sections.flatMap(([name, title]) => [el("h3", {}, title), part(name)]),
    ...(held.length ? [el("h3", {}, "What the bytes hold"), stacked,
      el("dl", { class: "key" }, ...held.map((each) => el("div", {}, el("dt", {}, dot(each.colour), each.part),
        el("dd", {}, `${each.bytes.toLocaleString("en", { maximumFractionDigits: 1 })} B · ${each.share}`))))] : []),
    ...(given(compressor) && Object.keys(compressor).length ? [el("h3", {}, "Parameters"), key(Object.entries(compressor))] : []),
    ...(given(backbone) ? [el("h3", {}, "Backbone"), key(Object.entries(backbone))] : []),
    el("h3", {}, "Seeds"), el("div", { class: "scroll" }, plain(`${cells.length} that ended well`, ["seed", "cell", alikeName(row), accuracyName(row), "made (UTC)"], seeds)),
    el("h3", {}, "Reproduce"), ...cells.map(([id]) => el("pre", {}, command(id))),
    el("h3", {}, "Environment"), key(Object.entries(environment).flatMap(([name, value]) =>
      given(value) && typeof value === "object" ? Object.entries(value) : [[name.replace("_", " "), value]])),
    el("p", { class: "buttons" }, button(chosen ? "Leave out of the comparison" : "Compare with others", () => { compare(row.id); $("dialog").close(); }, { class: "primary" })));
  if (held.length) stack(stacked, row);
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
    el("ul", { class: "chips", "aria-label": "Chosen to compare" }, ...chosen.map((row) => el("li", {}, button(`${nameOf(row)} ×`, () => compare(row.id), { "aria-label": `Leave out ${nameOf(row)}` })))),
    button("Compare", () => openComparison(chosen), { class: "primary", disabled: chosen.length < 2 }),
    button("Clear", () => { state.compared.clear(); drawTray(); highlight(); }));
}

const HIGH = ["fidelity", "overlap@10", "agreement", "ndcg@10", "hr@10", "gauc", "auc", "smaller_x"]; // the most is best
const LOW = ["bytes_mean", "read_ratio", "read_ms_p50", "read_flops", "compress_ms_p50", "logloss", "logit_error"];
function openComparison(chosen) {
  const filled = columns.filter((each) => each.header !== "compressor" && chosen.some((row) => text(row, each)));
  const line = (each) => {
    const values = chosen.map((row) => row[each.field]).filter(given), differ = new Set(values).size > 1;
    const best = !differ ? null : HIGH.includes(each.field) ? Math.max(...values) : LOW.includes(each.field) ? Math.min(...values) : null;
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

function themed(name) { // light, dark, or as the reader's system has it
  if (name) document.documentElement.dataset.theme = name;
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
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { themed(); draw(); });
themed();
describe();
const idle = window.requestIdleCallback ?? ((later) => setTimeout(later, 50));
built.then(() => {
  readyTable();
  idle(async () => { // who comes to sort need not wait for plots, nor for the code that draws them
    document.head.append(el("script", {}, $("vega").textContent));
    plotting = true;
    await draw();
    document.documentElement.dataset.ready = "true";
  }, { timeout: 1500 });
});
