"use strict";
// The page of a run. The server folds the log; this draws what it says, and asks again when there is news.

const at = (id) => document.getElementById(id);
const EXITS = ["early3", "att", "cnn", "merge"];
const CLASSES = [
  ["train", "training", 0], ["load", "waiting for images", 1], ["communicate", "communicating", 6],
  ["evaluate", "evaluating", 2], ["checkpoint", "around checkpoints", 5], ["detect", "lost before a fault was noticed", 3],
  ["recover", "recovering", 4], ["idle", "starting and other", 7],
];
let until = null; // The newest record that counts; null is now.
let asked = 0;
let shown = null; // What was drawn last.

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined && text !== null) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function drawn(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

const number = (value, digits = 0) =>
  value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });

function duration(ms) {
  if (ms < 1000) return `${Math.round(ms)} ms`;
  const s = ms / 1000;
  if (s < 60) return `${s.toFixed(1)} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${Math.round(s % 60)} s`;
  return `${Math.floor(s / 3600)} h ${Math.round((s % 3600) / 60)} min`;
}

function table(id, caption, heads, rows) {
  const target = at(id);
  const head = element("tr");
  heads.forEach((text) => head.append(element("th", text, { scope: "col" })));
  const body = rows.map((cells) => {
    const row = element("tr");
    cells.forEach((text) => row.append(element("td", text)));
    return row;
  });
  const top = element("thead");
  top.append(head);
  const rest = element("tbody");
  rest.append(...body);
  target.replaceChildren(element("caption", caption), top, rest);
}

// A round number near a fifth of the range.
function tick(range) {
  const rough = range / 5 || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 5, 10].map((m) => m * power).find((t) => t >= rough);
}

// Lines over steps: `lines` is [{name, colour, y}].
function chart(id, xs, lines, { unit = "", digits = 2, from0 = false, what }) {
  const W = Math.max(280, at(id).clientWidth || 640), H = 220, L = 52, R = 10, T = 10, B = 28;
  const known = lines.flatMap((line) => line.y).filter(Number.isFinite);
  const svg = drawn("svg", { viewBox: `0 0 ${W} ${H}`, role: "img" });
  if (xs.length === 0 || known.length === 0) {
    svg.setAttribute("aria-label", `${what}: nothing yet`);
    svg.append(drawn("text", { x: W / 2, y: H / 2, "text-anchor": "middle" }, "nothing yet"));
    return at(id).replaceChildren(svg);
  }
  let [low, high] = [Math.min(...known), Math.max(...known)];
  if (from0) low = 0;
  if (high === low) high = low + (Math.abs(low) || 1);
  const [first, last] = [xs[0], Math.max(xs[xs.length - 1], xs[0] + 1)];
  const x = (v) => L + ((v - first) / (last - first)) * (W - L - R);
  const y = (v) => H - B - ((v - low) / (high - low)) * (H - T - B);
  const step = tick(high - low);
  for (let v = Math.ceil(low / step) * step; v <= high + 1e-9; v += step) {
    svg.append(drawn("line", { class: "grid", x1: L, x2: W - R, y1: y(v), y2: y(v) }));
    svg.append(drawn("text", { x: L - 6, y: y(v) + 4, "text-anchor": "end" }, number(v, step < 1 ? digits : 0) + unit));
  }
  const across = Math.max(1, tick(last - first));
  for (let v = Math.ceil(first / across) * across; v <= last; v += across) {
    svg.append(drawn("text", { x: x(v), y: H - 8, "text-anchor": "middle" }, number(v)));
  }
  for (const line of lines) {
    const points = xs.map((v, i) => [v, line.y[i]]).filter(([, w]) => Number.isFinite(w));
    const path = points.map(([v, w]) => `${x(v).toFixed(1)},${y(w).toFixed(1)}`).join(" ");
    const colour = `var(--c${line.colour})`;
    svg.append(drawn("polyline", { points: path, fill: "none", stroke: colour, "stroke-width": 1.8 }));
    if (points.length === 1) svg.append(drawn("circle", { cx: x(points[0][0]), cy: y(points[0][1]), r: 3, fill: colour }));
  }
  const ends = lines.map((line) => `${line.name} ${number(line.y[line.y.length - 1], digits)}${unit}`);
  svg.setAttribute("aria-label", `${what}, steps ${first} to ${last}; last: ${ends.join(", ")}`);
  at(id).replaceChildren(svg);
}

function legend(id, items) {
  at(id).replaceChildren(...items.map(([text, colour]) => {
    const item = element("li", text);
    item.prepend(element("span", "", { style: `background: var(--c${colour})`, "aria-hidden": "true" }));
    return item;
  }));
}

function goodput(run) {
  const total = run.goodput_total_ms || 1;
  const shares = CLASSES.map(([key, text, colour]) => [text, colour, run.goodput[key], (100 * run.goodput[key]) / total]);
  const there = shares.filter(([, , ms]) => ms > 0);
  at("goodput").replaceChildren(...there.map(([, colour, , share]) =>
    element("div", "", { style: `flex: ${share} 0 0; background: var(--c${colour})` })));
  const words = there.map(([text, colour, ms, share]) => [`${text} ${share.toFixed(1)} % (${duration(ms)})`, colour]);
  at("goodput").setAttribute("aria-label", words.map(([text]) => text).join(", ") || "nothing yet");
  legend("goodput-legend", words);
}

// A lane a worker; at most so many, the newest.
function lanes(run) {
  const MOST = 64;
  const shown = run.lanes.slice(-MOST);
  const W = Math.max(280, at("lanes").clientWidth || 960), L = W < 600 ? 76 : 110, ROW = 18, T = 6, B = 24;
  const H = T + B + Math.max(1, shown.length) * ROW;
  const end = Math.max(run.at_ms, run.began_ms + 1);
  const x = (ms) => L + ((ms - run.began_ms) / (end - run.began_ms)) * (W - L - 10);
  const svg = drawn("svg", { viewBox: `0 0 ${W} ${H}`, role: "img" });
  shown.forEach((lane, row) => {
    const y = T + row * ROW;
    svg.append(drawn("text", { x: L - 8, y: y + 12, "text-anchor": "end" }, lane.name));
    const till = lane.lost_ms ?? end;
    svg.append(drawn("line", { class: "grid", x1: x(lane.joined_ms), x2: x(till), y1: y + 8, y2: y + 8 }));
    for (const [generation, from, to] of lane.spans) {
      const width = Math.max(1, x(to ?? end) - x(from) - 1);
      const bar = drawn("rect", { x: x(from), y: y + 2, width, height: 12, rx: 2, fill: `var(--c${generation % 2 ? 0 : 6})` });
      bar.append(drawn("title", {}, `${lane.name}, generation ${generation}`));
      svg.append(bar);
    }
    if (lane.lost_ms !== null) {
      const mark = drawn("text", { x: x(lane.lost_ms), y: y + 13, "text-anchor": "middle", style: "fill: var(--bad); font-weight: 700" }, "✕");
      mark.append(drawn("title", {}, `${lane.name} was lost: ${lane.cause}`));
      svg.append(mark);
    }
  });
  for (const incident of run.incidents) {
    const place = x(incident.at_ms);
    const line = drawn("line", { x1: place, x2: place, y1: T, y2: H - B, stroke: "var(--bad)", "stroke-dasharray": "3 3" });
    line.append(drawn("title", {}, incident.what.join("; ")));
    svg.append(line);
  }
  const marks = W < 600 ? 2 : 6;
  const step = (end - run.began_ms) / marks;
  for (let i = 0; i <= marks; i += 1) {
    svg.append(drawn("text", { x: x(run.began_ms + i * step), y: H - 6, "text-anchor": i === marks ? "end" : "middle" }, duration(i * step)));
  }
  const there = run.lanes.filter((lane) => lane.lost_ms === null).length;
  const older = run.lanes.length - shown.length;
  svg.setAttribute("aria-label", `${run.lanes.length} workers, ${there} of them there, ${run.generation} generations, `
    + `${run.incidents.length} incidents${older > 0 ? `; the ${MOST} newest are drawn` : ""}`);
  at("lanes").replaceChildren(svg);
}

function facts(run) {
  const pairs = [
    ["Step", `${number(run.step)} of ${number(run.steps_total)}`],
    ["Epoch", run.steps_per_epoch ? number(run.step / run.steps_per_epoch, 2) : "–"],
    ["Images a second", run.curve.images_per_s.length ? number(run.curve.images_per_s.at(-1), 1) : "–"],
    ["Loss", run.curve.loss.length ? number(run.curve.loss.at(-1), 4) : "–"],
    ["Learning rate", run.curve.learning_rate.length ? run.curve.learning_rate.at(-1).toExponential(2) : "–"],
    ["Generation", number(run.generation)],
    ["Term", number(run.term)],
    ["Steps repeated", number(run.repeated)],
    ["Since the start", duration(run.at_ms - run.began_ms)],
  ];
  at("facts").replaceChildren(...pairs.map(([name, value]) => {
    const pair = element("div");
    pair.append(element("dt", name), element("dd", value));
    return pair;
  }));
  at("progress").max = run.steps_total || 1;
  at("progress").value = run.step;
}

function state(run) {
  const kind = run.outcome ?? (until !== null ? "past" : run.led ? "training" : "away");
  const words = {
    finished: "finished", failed: `failed: ${run.outcome_detail}`, past: "the past",
    training: run.step > 0 ? "training" : "waiting for its first step", away: "no coordinator answers",
  };
  at("state").textContent = words[kind];
  at("state").dataset.kind = kind;
  at("location").textContent = run.about.location + (run.outcome === "finished" ? ` · state ${run.outcome_detail.slice(0, 16)}…` : "");
}

function travel(run) {
  const slider = at("until");
  slider.max = run.newest;
  if (until === null) slider.value = run.newest;
  at("until-value").textContent = `${number(run.shown)} of ${number(run.newest)}`;
  slider.setAttribute("aria-valuetext", `record ${run.shown} of ${run.newest}, step ${run.step}`);
  at("now").hidden = until === null;
}

function show(run) {
  document.title = `${run.about.run} · step ${run.step} · Percheron`;
  at("run").textContent = run.about.run;
  state(run);
  facts(run);
  travel(run);
  goodput(run);
  chart("loss", run.curve.step, [{ name: "loss", colour: 0, y: run.curve.loss }], { digits: 3, what: "Training loss" });
  chart("speed", run.curve.step, [{ name: "images a second", colour: 2, y: run.curve.images_per_s }],
    { digits: 1, from0: true, what: "Images per second" });
  const scores = run.evaluations;
  chart("accuracy", scores.map((s) => s.step),
    EXITS.map((name, exit) => ({ name, colour: exit, y: scores.map((s) => 100 * s.ema[exit]) })),
    { unit: " %", digits: 1, what: "Top-1 accuracy" });
  legend("accuracy-legend", EXITS.map((name, exit) => [name, exit]));
  const percent = (list) => list.map((share) => (100 * share).toFixed(2));
  table("evaluations", "Top-1 in %, of the weights and of their average (EMA)",
    ["Step", "Epoch", ...EXITS, ...EXITS.map((name) => `${name} EMA`)],
    scores.map((s) => [number(s.step), s.epoch, ...percent(s.weights), ...percent(s.ema)]).reverse());
  lanes(run);
  const mib = (bytes) => (bytes === null ? "–" : `${number(bytes / 2 ** 20)} MiB`);
  table("workers", run.workers.length ? "Now" : "Nobody is there at this moment of the log",
    ["Worker", "Session", "Does", "For", "Step", "Memory"],
    run.workers.map((w) => [w.name, w.session ? "open" : "closed", w.phase ?? "–",
      w.in_phase_ms === null ? "–" : duration(w.in_phase_ms), w.step ?? "–", mib(w.resident_bytes)]));
  table("incidents", run.incidents.length ? "Newest first" : "None",
    ["After step", "What happened", "Noticed by", "Next step after", "Steps repeated", "Cost"],
    run.incidents.map((i) => [number(i.step), i.what.join("; "), i.noticed_by,
      i.recovery_ms === null ? "not over" : duration(i.recovery_ms), i.repeated_steps,
      i.cost_ms === null ? "not over" : duration(i.cost_ms)]).reverse());
  table("checkpoints", run.checkpoints.length ? "Verified, newest first" : "None yet", ["Step", "After"],
    run.checkpoints.map((c) => [number(c.step), duration(c.at_ms - run.began_ms)]).reverse());
  table("fingerprint", "What can change the bits", ["Fact", "Value"], Object.entries(run.fingerprint));
  at("recipe").textContent = run.about.recipe;
  at("log").replaceChildren(...run.log.slice().reverse().map((line) =>
    element("li", `${String(line.sequence).padStart(6)}  ${((line.at_ms - run.began_ms) / 1000).toFixed(3)} s  ${line.text}`)));
}

async function refresh() {
  const mine = (asked += 1);
  const query = until === null ? "" : `?until=${until}`;
  try {
    const answer = await fetch(`api/run${query}`);
    if (!answer.ok) throw new Error(`the server answers ${answer.status}`);
    const run = await answer.json();
    if (mine === asked) show(shown = run);
  } catch (error) {
    at("state").textContent = `this page has lost its server (${error.message}); start percheron page again`;
    at("state").dataset.kind = "failed";
  }
}

function theme(name) {
  document.documentElement.dataset.theme = name;
  at("theme").setAttribute("aria-pressed", String(name === "dark"));
}

at("until").addEventListener("input", (event) => {
  const slider = event.target;
  until = slider.value === slider.max ? null : Number(slider.value);
  refresh();
});
at("now").addEventListener("click", () => { until = null; refresh(); at("until").focus(); });
at("theme").addEventListener("click", () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
theme(window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");

let redraw = null;
window.addEventListener("resize", () => {
  clearTimeout(redraw);
  redraw = setTimeout(() => { if (shown) show(shown); }, 150);
});

let due = null;
new EventSource("api/changes").onmessage = () => {
  // News comes faster than anybody looks.
  due ??= setTimeout(() => { due = null; refresh(); }, 300);
};
refresh();
