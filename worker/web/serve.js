"use strict";
// An image goes to the server as it is; this shows what the server says of it.

const at = (id) => document.getElementById(id);
let about = null;
let image = null; // The file that was chosen last.
let asked = 0;

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined && text !== null) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

const percent = (share) => `${(share * 100).toFixed(1)} %`;
const ms = (seconds) => `${(seconds * 1e3).toFixed(1)} ms`;

function say(text, kind = "good") {
  at("said").textContent = text;
  at("said").dataset.kind = kind;
}

function fact(name, value) {
  const pair = element("div");
  pair.append(element("dt", name), element("dd", value));
  return pair;
}

function exits(taken) {
  const names = about ? about.exits : [];
  const place = names.findIndex((exit) => exit.name === taken);
  const boxes = names.map((exit, index) => {
    const state = index === place ? "taken" : index < place ? "passed" : "not reached";
    const box = element("li", null, taken ? { "data-state": state } : {});
    const words = taken ? `${percent(exit.share)}, ${state}` : percent(exit.share);
    box.append(element("strong", exit.name), element("span", words));
    return box;
  });
  at("exits").replaceChildren(...boxes);
}

function draw(answer) {
  const { decode, wait, network } = answer.seconds;
  at("facts").replaceChildren(
    fact("Exit taken", answer.exit),
    fact("How sure", percent(answer.confidence)),
    fact("Multiply–accumulates", `${(answer.macs / 1e6).toFixed(1)} M, ${percent(answer.macs_share)}`),
    fact("Time", ms(decode + wait + network)),
    fact("of which network", ms(network)),
  );
  const rows = answer.top.map((guess) => {
    const row = element("tr");
    const bar = element("td");
    bar.append(element("meter", null, { min: 0, max: 1, value: guess.probability, "aria-hidden": "true" }));
    row.append(element("td", guess.class), element("td", percent(guess.probability)), bar);
    return row;
  });
  at("top").replaceChildren(...rows);
  exits(answer.exit);
}

async function ask() {
  if (!image) return;
  const number = ++asked;
  const budget = about && about.has_budgets && !at("last").checked ? `?budget=${at("budget").value}` : "";
  say("Asking …");
  let words, kind = "good";
  try {
    const response = await fetch(`v1/classify${budget}`, { method: "POST", body: image });
    const answer = await response.json();
    if (number !== asked) return; // A newer question is under way.
    if (response.ok) {
      draw(answer);
      words = `It most likely shows: ${answer.top[0].class}, ${percent(answer.top[0].probability)}.`;
    } else {
      [words, kind] = [answer.error, "bad"];
    }
  } catch (error) {
    [words, kind] = [`The server does not answer: ${error.message}`, "bad"];
  }
  if (number === asked) say(words, kind);
}

function choose(file) {
  image = file;
  const shown = at("shown");
  if (shown.src) URL.revokeObjectURL(shown.src);
  shown.src = URL.createObjectURL(file);
  shown.alt = `The chosen image, ${file.name}`;
  shown.hidden = false;
  at("invitation").textContent = `${file.name}; drop or choose another`;
  ask();
}

function theme(name) {
  document.documentElement.dataset.theme = name;
  at("theme").setAttribute("aria-pressed", String(name === "dark"));
}

async function begin() {
  const response = await fetch("v1/model");
  about = await response.json();
  at("model").textContent =
    `${about.model}, ${about.weights} weights of step ${about.step}, ${about.classes} classes`;
  at("budgets").hidden = !about.has_budgets;
  if (about.default_budget !== null) at("budget").value = about.default_budget;
  at("budget-value").textContent = at("budget").value;
  exits(null);
}

at("theme").addEventListener("click", () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
at("file").addEventListener("change", () => at("file").files.length && choose(at("file").files[0]));
at("budget").addEventListener("input", () => { at("budget-value").textContent = at("budget").value; });
at("budget").addEventListener("change", ask);
at("last").addEventListener("change", ask);
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    at("drop").classList.toggle("over", kind === "dragenter" || kind === "dragover");
    const files = kind === "drop" ? event.dataTransfer.files : [];
    if (files.length) choose(files[0]);
  });
}
theme(window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
begin().catch((error) => say(`The server does not answer: ${error.message}`, "bad"));
