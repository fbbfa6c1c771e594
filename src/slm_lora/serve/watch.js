"use strict";
// Everything that comes from the server is inserted as text.

const VISIBLE_MS = 2000, HIDDEN_MS = 30000, LONGEST_MS = 30000, AGES_MS = 20000;
const match = /^\/experiment\/([^/]+)$/.exec(location.pathname);
const path = match ? "/api/experiments/" + match[1] : "/api/experiments";
const byId = (id) => document.getElementById(id);

function node(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return made;
}

function drawing(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

const isNumber = (value) => typeof value === "number";
const fixed = (value, digits) => (isNumber(value) ? value.toFixed(digits) : "");
const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

function clock(seconds) {
  if (!isNumber(seconds)) return "";
  const whole = Math.max(0, Math.round(seconds));
  const parts = [Math.floor(whole / 60) % 60, whole % 60];
  const hours = Math.floor(whole / 3600);
  if (!hours) return `${parts[0]}:${String(parts[1]).padStart(2, "0")}`;
  return `${hours}:${parts.map((part) => String(part).padStart(2, "0")).join(":")}`;
}

function age(seconds) {
  if (seconds < 60) return "less than a minute ago";
  for (const [unit, size] of [["day", 86400], ["hour", 3600], ["minute", 60]]) {
    if (seconds >= size) return `${plural(Math.floor(seconds / size), unit)} ago`;
  }
  return "";
}

function curve(points, title) {
  const losses = points.map((point) => point[1]);
  const low = Math.min(...losses), high = Math.max(...losses);
  const first = points[0][0], last = points[points.length - 1][0];
  const x = (step) => (last > first ? ((step - first) / (last - first)) * 196 + 2 : 100);
  const y = (loss) => (high > low ? 46 - ((loss - low) / (high - low)) * 42 : 25);
  const svg = drawing("svg", { viewBox: "0 0 200 50", preserveAspectRatio: "none", role: "img" });
  svg.setAttribute("aria-label", title);
  svg.append(
    drawing("line", { class: "axis", x1: 0, y1: 49, x2: 200, y2: 49 }),
    drawing("polyline", {
      class: "line",
      points: points.map(([step, loss]) => `${x(step).toFixed(1)},${y(loss).toFixed(1)}`).join(" "),
    }),
  );
  return svg;
}

function chart(cell) {
  if (cell.curve.length < 2) return null;
  const first = cell.curve[0], last = cell.curve[cell.curve.length - 1];
  return node(
    "figure", { class: "chart" },
    curve(cell.curve, `Training loss of ${cell.cell}`),
    node(
      "figcaption", {},
      node("span", {}, `step ${first[0]}: ${fixed(first[1], 3)}`),
      node("span", {}, "training loss"),
      node("span", {}, `step ${last[0]}: ${fixed(last[1], 3)}`),
    ),
  );
}

function state(text) {
  const style = { training: " on", scoring: " on", running: " on", "not running": " off" };
  return node("span", { class: "state" + (style[text] || "") }, text);
}

function numbers(entries) {
  const list = node("dl", { class: "numbers" });
  for (const [label, value] of entries) {
    if (value !== "") list.append(node("div", {}, node("dt", {}, label), node("dd", {}, value)));
  }
  return list;
}

function liveCell(cell, now) {
  const silent = cell.state === "not running";
  return node(
    "li", { class: "box live", "data-cell": cell.cell },
    node("h3", {}, node("span", {}, cell.cell), state(cell.state)),
    cell.total_steps
      ? node("progress", { max: cell.total_steps, value: cell.step, "aria-label": "steps" })
      : null,
    numbers([
      ["step", cell.total_steps ? `${cell.step} / ${cell.total_steps}` : ""],
      ["loss", fixed(cell.loss, 4)],
      ["tokens/s", fixed(cell.tokens_per_s, 0)],
      ["training left", cell.state === "training" ? clock(cell.seconds_left) : ""],
    ]),
    silent
      ? node("p", { class: "soft" }, `Its process ended; last sign ${age(now - cell.updated)}. `
          + "The same command continues it.")
      : null,
    chart(cell),
  );
}

function table(cells, lossName) {
  const names = ["cell", "steps", "training loss", lossName, "perplexity", "tokens/s", "curve"];
  const body = node("tbody", {});
  for (const cell of cells) {
    const values = [
      isNumber(cell.step) ? String(cell.step) : "",
      fixed(cell.loss, 4),
      fixed(cell.held_out_loss, 4),
      fixed(cell.perplexity, 3),
      fixed(cell.tokens_per_s, 0),
    ];
    const title = node("td", {}, cell.cell);
    if (cell.reason) title.append(node("div", { class: "soft" }, `stopped: ${cell.reason}`));
    body.append(
      node(
        "tr", { "data-cell": cell.cell }, title,
        ...values.map((value, i) => node("td", { "data-label": names[i + 1] }, value)),
        node("td", { class: "spark" }, cell.curve.length > 1
          ? curve(cell.curve, `Training loss of ${cell.cell}`) : null),
      ),
    );
  }
  const head = node("tr", {}, ...names.map((name) => node("th", { scope: "col" }, name)));
  return node("table", {}, node("thead", {}, head), body);
}

function counts(entry) {
  const cells = plural(entry.total, "cell");
  const parts = [entry.unfinished ? `${entry.finished} of ${cells} finished` : `${cells} finished`];
  if (entry.running) parts.push(`${entry.running} running`);
  if (entry.tuning) parts.push(plural(entry.tuning, "tuning run"));
  return parts.join(" · ");
}

function overallState(entry) {
  if (entry.active) return "running";
  return entry.unfinished ? "not running" : "";
}

function showIndex(data, now) {
  const entries = data.experiments.map((entry) => node(
    "li", { class: "box", "data-experiment": entry.name },
    node(
      "h3", {},
      node("a", { href: "/experiment/" + encodeURIComponent(entry.name) }, entry.name),
      state(overallState(entry)),
    ),
    entry.description ? node("p", {}, entry.description) : null,
    entry.unfinished
      ? node("progress", { max: entry.total || 1, value: entry.finished, "aria-label": "cells" })
      : null,
    node("p", { class: "soft" }, counts(entry)),
    node(
      "p", { class: "soft" }, `changed ${age(now - entry.changed)}`,
      entry.report ? " · " : "",
      entry.report
        ? node("a", { href: `/experiment/${encodeURIComponent(entry.name)}/report` }, "report")
        : null,
    ),
  ));
  byId("live").replaceChildren(
    entries.length
      ? node("ul", { class: "experiments" }, ...entries)
      : node("p", {}, "No experiments in this folder yet. They appear here as soon as one runs."),
  );
}

function showExperiment(data, now) {
  document.title = `${data.name} – slm-lora watch`;
  byId("title").textContent = data.name;
  const all = [...data.cells, ...data.tuning_cells];
  const isDone = (cell) => cell.state === "finished" || cell.state === "stopped";
  const live = all.filter((cell) => !isDone(cell));
  const parts = [
    data.description ? node("p", {}, data.description) : null,
    node("p", { id: "counts" }, state(overallState(data)), data.active || data.unfinished ? " " : "",
      counts(data), ` · changed ${age(now - data.changed)}`),
  ];
  if (live.length) {
    parts.push(
      node("h2", {}, data.running ? "At work" : "Unfinished"),
      node("ul", { class: "cells" }, ...live.map((cell) => liveCell(cell, now))),
    );
  }
  if (data.card.length) {
    const card = node("dl", { class: "card" });
    for (const [title, text] of data.card) card.append(node("dt", {}, title), node("dd", {}, text));
    parts.push(node("h2", {}, "Result"), card);
  }
  for (const [title, lossName, cells] of [
    ["Finished cells", "test loss", data.cells.filter(isDone)],
    ["Tuning runs", "validation loss", data.tuning_cells.filter(isDone)],
  ]) {
    if (cells.length) parts.push(node("h2", {}, title), table(cells, lossName));
  }
  byId("live").replaceChildren(...parts.filter((part) => part !== null));
  showReplies(data.replies);
  showReport(data);
}

let shownReplies = "", shownReport = null;

function showReplies(replies) {
  const text = JSON.stringify(replies);
  if (text === shownReplies) return;
  shownReplies = text;
  const parts = replies.flatMap((entry) => [
    node("p", { class: "prompt" }, entry.prompt),
    entry.reference ? node("p", { class: "soft" }, `Reference: ${entry.reference}`) : null,
    node("div", { class: "answers" }, ...entry.answers.map((answer) => node(
      "div", { class: "box" },
      node("h3", {}, node("span", {}, answer.variant),
        isNumber(answer.loss) ? state(`loss ${fixed(answer.loss, 3)}`) : null),
      node("pre", {}, answer.text),
    ))),
  ]).filter((part) => part !== null);
  byId("replies").replaceChildren(...(parts.length ? [node("h2", {}, "Replies"), ...parts] : []));
}

function showReport(data) {
  if (data.report === shownReport) return;
  shownReport = data.report;
  if (!data.report) return byId("report").replaceChildren();
  const url = `/experiment/${encodeURIComponent(data.name)}/report`;
  const wasOpen = byId("report").querySelector("details[open]") !== null;
  const holder = node("div", {});
  const folded = node(
    "details", {}, node("summary", {}, "Report"),
    node("p", {}, node("a", { href: url }, "Open the report alone")), holder,
  );
  folded.addEventListener("toggle", () => {
    if (!folded.open || holder.firstChild) return;
    const version = `${url}?version=${data.report}`;
    holder.append(node("iframe", { sandbox: "", src: version, title: "Report" }));
  });
  folded.open = wasOpen;
  byId("report").replaceChildren(folded);
}

let shownText = "", shownAt = 0, failures = 0, timer = 0, polling = false;

function show(text, now) {
  // Ages change without the data.
  if (text === shownText && Date.now() - shownAt < AGES_MS) return;
  shownText = text;
  shownAt = Date.now();
  const focused = document.activeElement && document.activeElement.getAttribute("href");
  (match ? showExperiment : showIndex)(JSON.parse(text), now);
  if (focused && document.activeElement === document.body) {
    const link = [...document.querySelectorAll("a")].find((a) => a.getAttribute("href") === focused);
    if (link) link.focus();
  }
}

async function poll() {
  if (polling) return;
  polling = true;
  clearTimeout(timer);
  const status = byId("status");
  try {
    const response = await fetch(path, { cache: "no-store", signal: AbortSignal.timeout(15000) });
    if (!response.ok) throw new Error(response.status === 404 ? "not there any more" : "refused");
    const now = Date.parse(response.headers.get("date")) / 1000 || Date.now() / 1000;
    show(await response.text(), now);
    failures = 0;
    status.textContent = "live";
  } catch (error) {
    failures += 1;
    const refused = error.message === "refused" || error.message.startsWith("not there");
    status.textContent = refused ? error.message : "no connection; trying again";
  }
  polling = false;
  const backoff = Math.min(LONGEST_MS, VISIBLE_MS * 2 ** failures);
  timer = setTimeout(poll, document.hidden ? HIDDEN_MS : failures ? backoff : VISIBLE_MS);
}

document.addEventListener("visibilitychange", () => { if (!document.hidden) poll(); });
poll();
