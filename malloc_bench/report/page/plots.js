// The plots of a run's page: what is shown of the rows that pass the filters, and what is picked in one of them.

const PANELS = [
  { id: "memory", title: "Memory", make: (own, group) => scatter(own, group, "bytes", "bytes_mean", "state (bytes a user)") },
  { id: "cost", title: "Cost of a read", make: costly },
  { id: "curves", title: "What a smaller budget loses", make: curves },
  { id: "slices", title: "By length of history", make: slices },
  { id: "parts", title: "What the bytes hold", make: (own) => parts(singled(own)) },
];
const views = new Map();
const specs = JSON.parse($("specs").textContent);

function dark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

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
  const measured = own.filter((row) => row[field] > 0 && given(judged(row)) && !FLAT.includes(row.method));
  if (!measured.length) return null;
  const points = measured.map((row) => ({ ...point(row, row[field], judged(row)),
    ...(state.judge === "accuracy" ? ends(row, judged(row) - row[`delta_${accuracyOf(row)}`]) : {}) }));
  const levels = rows.filter((row) => row.group === group && FLAT.includes(row.method) && given(judged(row)))
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
  const measured = own.filter((row) => row.ratio > 0 && given(row[of]) && !FLAT.includes(row.method));
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
    ...point(row, null, row[`${value} ${slice}`]), order, users: row[`n_users ${slice}`], label: nameOf(row),
    slice: `${slice}|${(row[`n_users ${slice}`] ?? 0).toLocaleString("en")} users`,
  }))).filter((each) => given(each.y));
  return points.length ? { spec: "slices", x: "events in the history", y: value.toUpperCase().replace("OVERLAP", "overlap").replace("AGREEMENT", "agreement"),
    data: { rows: points }, said: "What is picked or compared, else the best at each budget." } : null;
}

function partsOf(row) { // what a state has, in the order in which it is stacked
  const held = data.parts.map(({ name, colour, bytes }, at) => ({ part: name, colour, at, bytes: bytes[row.id] })).filter((each) => each.bytes);
  const whole = held.reduce((sum, each) => sum + each.bytes, 0);
  return held.map((each) => ({ ...each, share: `${(100 * each.bytes / whole).toFixed(1)} %` }));
}

function parts(chosen) {
  const points = chosen.flatMap((row, order) => partsOf(row).map((each) => ({ id: row.id, order, label: `${nameOf(row)}|${text(row, "state (KB/user)")} KB`,
    method: row.compressor, budget: text(row, "budget"), ...each })));
  const there = data.parts.filter(({ name }) => points.some((each) => each.part === name));
  return points.length ? { spec: "parts", x: "share of the state's bytes", lists: { $parts: there.map(({ name }) => name), $tints: there.map(({ colour }) => colour) },
    data: { rows: points }, said: "What is picked or compared, else the best at each budget.", legend: there } : null;
}

async function stack(place, row) { // one row's bytes, in its dialog
  if (!plotting) return place.remove();
  const made = parts([row]);
  for (const each of made.data.rows) each.label = ""; // the dialog's title says it
  stack.view?.finalize();
  stack.view = await embed("dialog", place, { ...made, height: 30 });
}

function drawPanels() {
  for (const { id, title } of PANELS) {
    $("plots").append(el("figure", { id, role: "group", "aria-labelledby": `${id}-title`, "aria-describedby": `${id}-said` },
      el("figcaption", {}, el("h3", { id: `${id}-title` }, title), el("p", { id: `${id}-said` })), el("div", { class: "chart" })));
  }
}

let drawing = Promise.resolve(), plotting = false;
function draw() { // one after the other, the page stays responsive between them
  if (!plotting) return drawing;
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
  const key = made && JSON.stringify([made.spec, made.x, made.y, made.lists, dark(), made.data.rows.length > 1500]);
  if (old && old.key !== key) { old.view.finalize(); views.delete(id); }
  $(`${id}-said`).replaceChildren(made?.said ?? "", ...(made?.legend ?? []).map(({ name, colour }) => el("span", { class: "named" }, dot(colour), name)));
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
  const families = [...new Set(rows.map((row) => row.family))].sort(), [ink, soft, grid, paper] = dark() ? ["#e6e8eb", "#a3aab5", "#30343b", "#14161a"] : ["#1a1c20", "#5b616b", "#e3e6ea", "#ffffff"];
  const filled = { $ink: ink, $paper: paper, $x: made.x, $y: made.y };
  const lists = { $families: families, $colours: families.map((family) => (family === "chain" ? ink : data.colours[family] ?? soft)), ...made.lists };
  const spec = JSON.parse(JSON.stringify(specs[made.spec]), (key, value) =>
    Array.isArray(value) && value[0] in lists ? lists[value[0]] : typeof value === "string" && value in filled ? filled[value] : value);
  const font = getComputedStyle(document.body).fontFamily;
  const config = {
    background: "transparent", font, view: { stroke: null },
    axis: { labelColor: soft, titleColor: soft, gridColor: grid, domainColor: grid, tickColor: grid, titleFontWeight: 500, labelFontSize: 11.5, titleFontSize: 12 },
    axisX: { labelBound: true }, // else the last label may be cut at the edge
    legend: { labelColor: ink, labelFontSize: 12, titleColor: soft, labelLimit: place.clientWidth - 40 },
  };
  spec.datasets = made.data; // without any a log axis has no end
  if (made.height) spec.height = made.height;
  const { view } = await vegaEmbed(place, spec, { actions: false, ast: true, config, logLevel: 1,
    renderer: made.data.rows.length > 1500 ? "canvas" : "svg", tooltip: { theme: "custom" } });
  view.description([$(`${id}-title`)?.innerText, [made.y, made.x].filter(given).join(" over ")].filter(given).join(": "));
  place.setAttribute("role", "img"); // its name is read, in place of every tick
  place.querySelector("svg, canvas").setAttribute("aria-hidden", "true");
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


window.page = { // for the console, and for tests
  shown: () => shown,
  row: (id) => rows[id],
  points: (id) => views.get(id).rows,
  picked: (id) => views.get(id).view.signal("picked"),
  async anew() { // as it was when it opened
    $("dialog").close();
    delete document.documentElement.dataset.theme;
    Object.assign(state, { focus: 0, judge: "fidelity" });
    state.compared.clear();
    $("judge").value = state.judge;
    table.clearSort();
    themed();
    drawTray();
    clearFilters();
    scrollTo(0, 0);
    await this.drawn();
    await new Promise((next) => requestAnimationFrame(() => requestAnimationFrame(next)));
  },
  drawn: async () => { for (let last; last !== drawing;) await (last = drawing); },
  place(id, which = 0) { // of a point, in the window
    const { view, rows: points } = views.get(id), box = $(id).querySelector("svg, canvas").getBoundingClientRect();
    const [left, top] = view.origin(), pad = view.padding(), at = points[which];
    return { id: at.id, x: box.left + pad.left + left + view.scale("x")(at.x), y: box.top + pad.top + top + view.scale("y")(at.y) };
  },
};
