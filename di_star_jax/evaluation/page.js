// SPDX-License-Identifier: Apache-2.0
// The evaluation page's program; votes.js comes before it.
"use strict";

// ---------------------------------------------------------------- data

const data = JSON.parse(document.getElementById("data").textContent);
const scored = data.metrics.filter((metric) => metric.per_image);
const paired = data.runs.length > 1;
const samples = data.embedded_samples;
const COLOURS = ["#5b63e6", "#8a8f9c"];
const CARDS = 24; // added to the grid at a time

const metricByName = (name) => data.metrics.find((metric) => metric.name === name);
const pictureOf = (prompt, run, sample) => prompt.runs[run][sample];
const scoreOf = (prompt, run, sample, name) => pictureOf(prompt, run, sample).scores[name];
const sourceOf = (picture) => data.images[picture.image];

function differenceOf(prompt, sample, name) {
  const [ours, theirs] = [0, 1].map((run) => scoreOf(prompt, run, sample, name));
  return ours === undefined || theirs === undefined ? undefined : ours - theirs;
}

// ---------------------------------------------------------------- text

const count = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const minus = (text) => text.replace("-", "−");
const list = (words) => (words.length < 2 ? words.join("") : `${words.slice(0, -1).join(", ")} and ${words.at(-1)}`);

function format(metric, value) {
  return value === undefined || value === null ? "–" : minus(value.toFixed(metric.digits));
}

function formatChange(metric, value) {
  return value === undefined ? "–" : (value > 0 ? "+" : "") + format(metric, value);
}

/** 1 for better (or higher, of a metric that knows no better), -1 for worse, 0 for neither. */
function direction(metric, change) {
  return Math.sign(change) * (metric.higher_is_better === false ? -1 : 1);
}

const tone = (metric, change) =>
  metric.higher_is_better === null ? "" : { "1": "up", "-1": "down" }[direction(metric, change)] ?? "";
const arrow = (change) => (change > 0 ? "▲ " : change < 0 ? "▼ " : "");
const WORDS = new Map([[true, "↑ higher is better"], [false, "↓ lower is better"], [null, "neither is better"]]);

// ---------------------------------------------------------------- elements

/** An element; text is only ever set as text, so that a prompt cannot become markup. */
function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== ""));
  return element;
}

const byId = (id) => document.getElementById(id);
const runName = (run) =>
  el("span", {}, el("span", { className: "swatch", style: `background:${COLOURS[run]}` }),
    data.runs[run].name);

function changeText(metric, change) {
  return el("span", { className: `number ${tone(metric, change)}` }, arrow(change) + formatChange(metric, change));
}

function image(source, alt) {
  const broken = "broken image";
  if (!source) return el("div", { className: "broken", role: "img", ariaLabel: `${broken}: ${alt}` }, broken);
  const tiny = source.startsWith("data:image/png");
  return el("img", { src: source, alt, className: tiny ? "tiny" : "" });
}

/** A select with its label. options: [value, text] pairs. */
function chooser(label, options, value, choose) {
  const entries = options.map(([key, text]) => el("option", { value: key, selected: key === value }, text));
  return el("label", {}, label, el("select", { onchange: (event) => choose(event.target.value) }, entries));
}

const metricChooser = (value, choose) =>
  chooser("Metric", scored.map((m) => [m.name, m.label + (m.trained_on ? " (trained on)" : "")]), value, choose);

// ---------------------------------------------------------------- head and table

/** How the first run does by a metric: 1 better, -1 worse, 0 not told apart, undefined not compared. */
function outcome(metric) {
  const change = data.comparison[metric.name];
  if (!change || metric.higher_is_better === null) return undefined;
  return change.low > 0 || change.high < 0 ? direction(metric, change.difference) : 0;
}

const noise = () => (data.same_noise ? ", the same noise" : "; not the same noise");

function verdict() {
  if (!paired) return `${data.runs[0].name} on ${count(data.total, "prompt")}.`;
  const opening = `${data.runs[0].name} against ${data.runs[1].name}: the same prompts${noise()}.`;
  const tell = (metrics) => [[1, "better"], [-1, "worse"], [0, "no clear difference"]]
    .map(([value, word]) => [metrics.filter((m) => outcome(m) === value).map((m) => m.label), word])
    .filter(([labels]) => labels.length)
    .map(([labels, word]) => `${word} by ${list(labels)}`).join("; ");
  const heldOut = tell(data.metrics.filter((m) => !m.trained_on));
  const trained = tell(data.metrics.filter((m) => m.trained_on));
  const parts = [opening];
  if (heldOut) parts.push(`Metrics it was not trained on: ${heldOut}.`);
  if (trained) parts.push(`Its training reward: ${trained}.`);
  return parts.join(" ");
}

function coverage() {
  const shown = data.prompts.length;
  const numbers = `All numbers in the table are over all ${count(data.total, "prompt")}` +
    (data.samples > 1 ? ` with ${data.samples} samples each. ` : ". ");
  const kept = data.samples > samples ? ` Pictures of the first ${samples} samples of each.` : "";
  if (shown === data.total) return `${numbers}All of them are shown.${kept}`;
  const drawn = data.prompts.filter((prompt) => prompt.random).length;
  const extremes = paired ? "the best, the worst, the largest gains and the largest losses" : "the best and the worst";
  return `${numbers}${shown.toLocaleString("en")} of them are shown: ${extremes} by each metric, and ` +
    `${drawn.toLocaleString("en")} drawn at random out of all.${kept}`;
}

const columnClass = (metric) => (metric.trained_on ? "trained" : "");

function headRow() {
  const cells = data.metrics.map((metric) => el("th", { className: columnClass(metric), scope: "col" },
    metric.label, " ", metric.trained_on ? el("span", { className: "marker" }, "trained on") : "",
    el("small", {}, metric.unit), el("small", {}, WORDS.get(metric.higher_is_better))));
  return el("tr", {}, el("td", {}), cells);
}

function isBest(metric, mean) {
  const means = data.runs.map((run) => run.summary[metric.name]?.mean).filter((value) => value !== undefined);
  if (means.length < 2 || metric.higher_is_better === null) return false;
  return mean === (metric.higher_is_better ? Math.max(...means) : Math.min(...means));
}

function runRow(run, index) {
  const cells = data.metrics.map((metric) => {
    const summary = run.summary[metric.name];
    if (!summary) return el("td", { className: columnClass(metric) }, "–");
    const best = isBest(metric, summary.mean) ? " best" : "";
    return el("td", { className: `number ${columnClass(metric)}${best}` }, format(metric, summary.mean),
      el("small", {}, (summary.stderr === null ? "" : `± ${format(metric, summary.stderr)}, `) +
        `n ${summary.prompts.toLocaleString("en")}`));
  });
  return el("tr", {}, el("th", { scope: "row" }, runName(index)), cells);
}

function differenceRow() {
  const cells = data.metrics.map((metric) => {
    const c = data.comparison[metric.name];
    if (!c) return el("td", { className: columnClass(metric) }, "–");
    const interval = `${formatChange(metric, c.low)} to ${formatChange(metric, c.high)}`;
    const clear = outcome(metric) === 0 ? el("span", { className: "number" }, formatChange(metric, c.difference))
      : changeText(metric, c.difference);
    const wins = metric.higher_is_better === null ? "higher in" : "better in";
    return el("td", { className: `number ${columnClass(metric)}` }, clear, el("small", {}, interval),
      el("small", {}, `${wins} ${percent(c.win_rate)}, n ${c.prompts.toLocaleString("en")}`));
  });
  return el("tr", { className: "difference" }, el("th", { scope: "row" }, "Difference",
    el("small", {}, `${data.runs[0].name} − ${data.runs[1].name}, 95 % interval`)), cells);
}

function publishedRows() {
  const known = data.published.filter((row) => Object.keys(row.values).length);
  if (!known.length) return "";
  const heading = el("tr", { className: "heading" }, el("th", { colSpan: data.metrics.length + 1 }, el("span", {},
    el("strong", {}, "Published, other protocol. "),
    "Numbers of papers: other prompts, seeds or code than the rows above. For orientation, not for a ranking.")));
  const rows = known.flatMap((row, i) => {
    const source = el("tr", { className: "heading" },
      el("th", { colSpan: data.metrics.length + 1 }, el("small", {}, row.source)));
    const scores = el("tr", {}, el("th", { scope: "row" }, row.name, el("small", {}, row.steps)),
      data.metrics.map((metric) => el("td", { className: "number" }, format(metric, row.values[metric.name]))));
    return known[i - 1]?.source === row.source ? [scores] : [source, scores]; // said once for its rows
  });
  return el("tbody", { className: "published" }, heading, rows);
}

function notes() {
  const labels = new Map(); // by note: what several metrics share is said once
  for (const metric of data.metrics) {
    const all = data.runs.map((run) => run.summary[metric.name]?.note).filter(Boolean);
    const note = [...new Set(all)].join("; ");
    if (note) labels.set(note, [...(labels.get(note) ?? []), metric.label]);
  }
  return [...labels].map(([note, names]) => el("li", {}, `${list(names)}: ${note}`));
}

function fillHead() {
  document.title = data.title;
  byId("title").textContent = data.title;
  byId("verdict").textContent = verdict();
  byId("coverage").textContent = coverage();
  const compared = Object.keys(data.comparison).length > 0 && paired;
  byId("summary").replaceChildren(el("thead", {}, headRow()),
    el("tbody", {}, data.runs.map(runRow), compared ? differenceRow() : ""), publishedRows());
  byId("legend").hidden = !data.metrics.some((metric) => metric.trained_on);
  byId("notes").replaceChildren(el("li", {}, "± is one standard error of the mean over prompts, in which the spread of reruns of a training is not; bold is the best of our runs."),
    ...notes());
}

// ---------------------------------------------------------------- cards

/** Picture of one run as a button that enlarges it. view: the list of pictures that the enlarged one moves in. */
function zoomable(view, entry) {
  const source = sourceOf(entry.picture);
  if (!source) return image(null, entry.alt);
  const index = view.push(entry) - 1;
  return el("button", { type: "button", className: "zoom", ariaLabel: `Enlarge ${entry.alt}`,
    onclick: () => openViewer(view, index) }, image(source, entry.alt));
}

function runFigure(view, prompt, run, sample, metric) {
  const picture = pictureOf(prompt, run, sample);
  const alt = `${data.runs[run].name}: ${prompt.prompt}`;
  const entry = { picture, alt, title: data.runs[run].name, caption: () => scoreTable(prompt, run, sample) };
  return el("figure", {}, zoomable(view, entry), el("figcaption", {}, runName(run), el("br"),
    metric ? el("span", { className: "number soft" }, format(metric, picture.scores[metric.name])) : ""));
}

function card(view, prompt, sample, metric, heading = "") {
  const change = paired && metric ? differenceOf(prompt, sample, metric.name) : undefined;
  const place = `row ${prompt.row}` + (samples > 1 ? `, sample ${sample + 1}` : "");
  const chips = Object.entries(prompt.categories).map(([column, value]) =>
    el("span", { className: "chip", title: column }, value));
  return el("article", { className: "card" },
    el("header", {}, el("span", { className: "soft" }, heading ? el("strong", {}, heading, " · ") : "", place),
      change === undefined ? "" : changeText(metric, change)),
    el("p", { className: "prompt", title: prompt.prompt }, prompt.prompt),
    el("div", { className: "pictures" },
      data.runs.map((_, run) => runFigure(view, prompt, run, sample, metric))),
    chips.length ? el("div", { className: "chips" }, chips) : "");
}

/** All scores of a prompt's pictures, the run in view in bold. */
function scoreTable(prompt, run, sample) {
  const rows = scored.map((metric) => el("tr", {}, el("th", { scope: "row" }, metric.label),
    data.runs.map((_, r) => el("td", { className: r === run ? "number best" : "number" },
      format(metric, scoreOf(prompt, r, sample, metric.name))))));
  const head = el("tr", {}, el("td", {}), data.runs.map((_, r) => el("th", { scope: "col" }, runName(r))));
  return [el("p", {}, prompt.prompt), el("div", { className: "scroll" }, el("table", {},
    el("thead", {}, head), el("tbody", {}, rows)))];
}

// ---------------------------------------------------------------- grid

const grid = { metric: scored[0]?.name, order: "row", descending: false, sample: 0, draw: "all", search: "",
               filters: {}, limit: CARDS };

function categoryColumns() {
  const columns = new Map();
  for (const prompt of data.prompts)
    for (const [column, value] of Object.entries(prompt.categories))
      columns.set(column, (columns.get(column) ?? new Set()).add(value));
  return columns;
}

function sortValue(prompt) {
  if (grid.order === "row") return prompt.row;
  if (grid.order === "difference") return differenceOf(prompt, grid.sample, grid.metric);
  return scoreOf(prompt, Number(grid.order), grid.sample, grid.metric);
}

/** Falling or rising; what has no value comes last either way. */
function compare(a, b) {
  const [x, y] = [sortValue(a), sortValue(b)];
  if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
  return (grid.descending ? y - x : x - y) || a.row - b.row;
}

function selected(prompt) {
  const wanted = Object.entries(grid.filters).every(([column, value]) => prompt.categories[column] === value);
  const found = prompt.prompt.toLowerCase().includes(grid.search.toLowerCase());
  return wanted && found && (grid.draw === "all" || prompt.random);
}

function renderCards() {
  const prompts = data.prompts.filter(selected).sort(compare);
  const view = [];
  const metric = metricByName(grid.metric);
  byId("cards").replaceChildren(...prompts.slice(0, grid.limit).map((p) => card(view, p, grid.sample, metric)));
  byId("found").textContent = prompts.length ? count(prompts.length, "prompt") : "No prompt fits these filters.";
  byId("more").hidden = prompts.length <= grid.limit;
  byId("more").textContent = `Show ${Math.min(CARDS, prompts.length - grid.limit)} more`;
}

function setGrid(change) {
  Object.assign(grid, { limit: CARDS }, change);
  byId("direction").textContent = grid.descending ? "↓ high to low" : "↑ low to high";
  renderCards();
}

function gridControls() {
  const orders = [["row", "row"], ...(paired ? [["difference", "difference"]] : []),
    ...data.runs.map((run, r) => [String(r), `score of ${run.name}`])];
  // A change of the order starts with what it is chosen for: the highest first, but rows from the first.
  const order = scored.length
    ? chooser("Sort by", orders, grid.order, (value) => setGrid({ order: value, descending: value !== "row" })) : "";
  const filters = [...categoryColumns()].map(([column, values]) => {
    const options = [["", "all"], ...[...values].sort().map((value) => ["=" + value, value || "(none)"])];
    const chosen = column in grid.filters ? "=" + grid.filters[column] : "";
    return chooser(column, options, chosen, (value) => {
      const { [column]: _, ...others } = grid.filters;
      setGrid({ filters: value ? { ...others, [column]: value.slice(1) } : others });
    });
  });
  const sampleOptions = Array.from({ length: samples }, (_, k) => [String(k), String(k + 1)]);
  return el("div", { className: "controls" },
    scored.length ? metricChooser(grid.metric, (metric) => setGrid({ metric })) : "", order,
    el("button", { type: "button", id: "direction", onclick: () => setGrid({ descending: !grid.descending }) }),
    samples > 1
      ? chooser("Sample", sampleOptions, String(grid.sample), (value) => setGrid({ sample: Number(value) })) : "",
    filters,
    data.prompts.length < data.total
      ? chooser("Shown", [["all", "extremes and random draw"], ["random", "random draw only"]], grid.draw,
        (draw) => setGrid({ draw })) : "",
    el("label", {}, "Search", el("input", { type: "search", placeholder: "words of a prompt", value: grid.search,
      oninput: (event) => setGrid({ search: event.target.value }) })));
}

function renderGrid() {
  byId("grid").replaceChildren(gridControls(),
    el("p", { className: "soft", id: "found", role: "status" }), el("div", { className: "cards", id: "cards" }),
    el("button", { type: "button", className: "more", id: "more",
      onclick: () => { grid.limit += CARDS; renderCards(); } }));
  setGrid({});
}

// ---------------------------------------------------------------- extremes

let extremeMetric = scored[0]?.name;

function histogram(metric) {
  const { limit, counts } = data.histograms[metric.name];
  const highest = Math.max(1, ...counts);
  const half = counts.length / 2;
  const flip = metric.higher_is_better === false;
  const side = (i) => (metric.higher_is_better === null ? "" : (i < half) !== flip ? "loss" : "gain");
  const bars = counts.map((n, i) => el("span", { className: side(i),
    style: `height:${(100 * n) / highest}%`, title: String(n) }));
  const [below, above] = [counts.slice(0, half), counts.slice(half)].map((half) => half.reduce((a, b) => a + b, 0));
  const label = `Differences over all pictures: ${below} below zero, ${above} not below`;
  return el("figure", { className: "histogram" },
    el("div", { className: "bars", role: "img", ariaLabel: label }, bars),
    el("div", { className: "axis" }, el("span", {}, formatChange(metric, -limit)), el("span", {}, "0"),
      el("span", {}, formatChange(metric, limit))),
    el("figcaption", { className: "soft" }, `All differences in ${metric.label}, ${data.runs[0].name} − ` +
      `${data.runs[1].name}: ${below.toLocaleString("en")} below zero, ${above.toLocaleString("en")} not below.`));
}

/** Two lists with equal room, interleaved, so that on one column neither comes first as a block. */
function pairOfLists(metric, kinds, headings, words) {
  const view = [];
  const lists = kinds.map((kind) => data.lists[metric.name][kind]);
  const cells = headings.map((heading) => el("h2", {}, heading));
  for (let rank = 0; rank < Math.max(1, lists[0].length, lists[1].length); rank++)
    lists.forEach((entries, side) => {
      const entry = entries[rank];
      cells.push(entry
        ? card(view, data.prompts[entry[0]], entry[1], metric, `${words[side]} ${rank + 1}`)
        : el("div", { className: "empty" }, `no further ${words[side]} to show`));
    });
  return el("div", { className: "pairs" }, cells);
}

function renderExtremes(id) {
  if (!scored.length) return;
  const metric = metricByName(extremeMetric);
  const neutral = metric.higher_is_better === null;
  const choose = metricChooser(extremeMetric, (name) => { extremeMetric = name; renderExtremes(id); });
  const over = el("p", { className: "soft" }, `Out of all ${count(data.total, "prompt")}` +
    (samples > 1 ? `, of each prompt its most extreme of the first ${samples} samples` : "") +
    ". Both sides get the same room.");
  const body = id === "changes"
    ? [histogram(metric), pairOfLists(metric, ["gains", "losses"],
      neutral ? ["Largest rises", "Largest falls"] : ["Largest gains", "Largest losses"],
      neutral ? ["rise", "fall"] : ["gain", "loss"])]
    : [pairOfLists(metric, ["best", "worst"],
      (neutral ? ["Highest", "Lowest"] : ["Best", "Worst"]).map((word) => `${word} of ${data.runs[0].name}`),
      neutral ? ["highest", "lowest"] : ["best", "worst"])];
  byId(id).replaceChildren(el("div", { className: "controls" }, choose), over, ...body);
}

// ---------------------------------------------------------------- blind vote

const ballot = { seed: 0, pairs: [], votes: [], revealed: false };
const STORE = `evaluation votes ${data.id}`;
const KEYS = { ArrowLeft: "left", a: "left", ArrowRight: "right", b: "right", ArrowDown: "tie", t: "tie" };

/** What can be voted on: the random draw alone, for the extremes are no fair sample. */
function votable() {
  const pairs = [];
  for (const prompt of data.prompts.filter((entry) => entry.random))
    for (let sample = 0; sample < samples; sample++)
      if ([0, 1].every((run) => sourceOf(pictureOf(prompt, run, sample))))
        pairs.push({ row: prompt.row, sample, left: 0, right: 1 });
  return pairs;
}

function restoreVotes() {
  ballot.seed = Math.floor(Math.random() * 2 ** 32);
  try {
    const stored = JSON.parse(localStorage.getItem(STORE));
    if (stored) Object.assign(ballot, { seed: stored.seed, votes: stored.votes });
  } catch {
    // Pages from files may be refused a store: then votes last as long as the page.
  }
  ballot.pairs = shuffled(votable(), ballot.seed);
}

function saveVotes() {
  try {
    localStorage.setItem(STORE, JSON.stringify({ seed: ballot.seed, votes: ballot.votes }));
  } catch {
    // As above.
  }
}

function vote(choice) {
  const pair = ballot.pairs[ballot.votes.length];
  if (!pair) return;
  ballot.votes.push({ ...pair, choice });
  saveVotes();
  renderVote();
}

function undo() {
  if (!ballot.votes.length) return;
  ballot.votes.pop();
  saveVotes();
  renderVote();
}

function restart() {
  if (!confirm(`Delete ${count(ballot.votes.length, "vote")} and start with a new order?`)) return;
  Object.assign(ballot, { seed: Math.floor(Math.random() * 2 ** 32), votes: [], revealed: false });
  ballot.pairs = shuffled(votable(), ballot.seed);
  saveVotes();
  renderVote();
}

function download() {
  const runs = data.runs.map((run) => run.name);
  const votes = ballot.votes.map((v) => ({ ...v, left: runs[v.left], right: runs[v.right] }));
  const text = JSON.stringify({ title: data.title, page: data.id, seed: ballot.seed, runs, votes,
    result: [resultNumbers()] }, null, 1);
  const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  el("a", { href: address, download: "votes.json" }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

/** Of the votes that chose a side, how many chose the side that the metric scores better. */
function agreement(votes, metric) {
  const compared = votes.filter((vote) => vote.choice !== "tie").map((vote) => {
    const prompt = data.prompts.find((p) => p.row === vote.row);
    const [left, right] = [vote.left, vote.right].map((run) => scoreOf(prompt, run, vote.sample, metric.name));
    return left === undefined || right === undefined ? 0
      : direction(metric, left - right) * (vote.choice === "left" ? 1 : -1);
  }).filter((value) => value !== 0);
  return { agree: compared.filter((value) => value > 0).length, total: compared.length };
}

/** Votes of the first run against the second, and its strength above the second's. */
function resultNumbers() {
  const { wins, ties, losses } = tally(ballot.votes);
  const total = ballot.votes.length;
  const above = strength(wins + ties / 2, losses + ties / 2);
  return { run: data.runs[0].name, against: data.runs[1].name, wins, ties, losses,
    win_rate: total ? (wins + ties / 2) / total : null,
    win_rate_interval: total ? wilson(wins + ties / 2, total) : null,
    strength: above && above.value,
    strength_interval: above && [-1, 1].map((side) => above.value + side * 1.959964 * above.stderr) };
}

const signed = (value) => (value > 0 ? "+" : "") + minus(value.toFixed(2));

function resultTable() {
  const head = ["", "wins", "ties", "losses", "win rate", "Bradley-Terry strength"];
  const r = resultNumbers();
  const row = el("tr", {},
    el("th", { scope: "row" }, `${r.run} against ${r.against}`),
    [r.wins, r.ties, r.losses].map((n) => el("td", { className: "number" }, String(n))),
    el("td", { className: "number" }, r.win_rate === null ? "–" : percent(r.win_rate),
      r.win_rate === null ? "" : el("small", {}, r.win_rate_interval.map(percent).join(" to "))),
    el("td", { className: "number" }, r.strength === null ? "not finite yet" : signed(r.strength),
      r.strength === null ? el("small", {}, "needs votes for either side")
        : el("small", {}, r.strength_interval.map(signed).join(" to "))));
  return el("div", { className: "scroll" }, el("table", {},
    el("thead", {}, el("tr", {}, head.map((text) => el("th", { scope: "col" }, text)))), el("tbody", {}, row)));
}

function agreementTable() {
  const rows = scored.filter((metric) => metric.higher_is_better !== null).map((metric) => {
    const { agree, total } = agreement(ballot.votes, metric);
    return el("tr", {}, el("th", { scope: "row" }, metric.label, " ",
      metric.trained_on ? el("span", { className: "marker" }, "trained on") : ""),
    el("td", { className: "number" }, total ? percent(agree / total) : "–",
      total ? el("small", {}, wilson(agree, total).map(percent).join(" to ")) : ""),
    el("td", { className: "number" }, `${agree} of ${total}`));
  });
  return el("div", { className: "scroll" }, el("table", {}, el("thead", {}, el("tr", {},
    ["metric", "agrees with you", "votes for a side"].map((text) => el("th", { scope: "col" }, text)))),
  el("tbody", {}, rows)));
}

function result() {
  return el("div", { className: "result", id: "result" }, el("h2", {}, "Result"), resultTable(),
    el("small", {}, "A tie counts as half a win for each. Win rate with its 95 % Wilson interval; strength as a " +
      "difference of log-odds with its 95 % interval: 0 is even, +1.10 is three wins for each loss."),
    scored.length ? agreementTable() : "");
}

function ballotFigure(view, pair, side, prompt) {
  const alt = `${side} picture: ${prompt.prompt}`;
  const title = side === "left" ? "Left (A)" : "Right (B)";
  const entry = { picture: pictureOf(prompt, pair[side], pair.sample), alt, title,
    caption: () => [el("p", {}, prompt.prompt)] };
  return el("figure", {}, zoomable(view, entry));
}

function ballotForm(pair) {
  const prompt = data.prompts.find((p) => p.row === pair.row);
  const view = [];
  const button = (choice, text, key) => el("button", { type: "button", id: `choose-${choice}`,
    onclick: () => vote(choice) }, text,
  el("kbd", {}, key));
  return [el("p", { className: "prompt" }, prompt.prompt),
    el("div", { className: "pictures" }, ["left", "right"].map((side) => ballotFigure(view, pair, side, prompt))),
    el("div", { className: "choices" }, button("left", "Left is better", "← A"), button("tie", "Tie", "↓ T"),
      button("right", "Right is better", "→ B"))];
}

function renderVote() {
  const done = ballot.votes.length;
  const pair = ballot.pairs[done];
  const finished = !pair;
  const focused = document.activeElement?.id; // the buttons are made anew; Tab must not start over
  const action = (text, press, disabled) => el("button", { type: "button", onclick: press, disabled }, text);
  const fair = data.prompts.length < data.total
    ? "Only prompts drawn at random, for extremes are no fair sample. " : "";
  byId("vote").replaceChildren(el("div", { className: "ballot" },
    el("p", { className: "soft", role: "status", id: "progress" }, `${done} of ${ballot.pairs.length} voted`),
    el("progress", { value: done, max: ballot.pairs.length, ariaLabel: "Votes" }),
    pair ? ballotForm(pair) : el("p", { className: "lead" }, "All pairs are voted on. Thank you."),
    el("div", { className: "actions" }, action("Undo", undo, !done), action("Start again", restart, !done),
      action("Download votes (JSON)", download, !done),
      finished ? "" : action(ballot.revealed ? "Hide result" : "Show result so far",
        () => { ballot.revealed = !ballot.revealed; renderVote(); }, !done)),
    done && (ballot.revealed || finished) ? result() : "",
    el("p", { className: "soft" }, `Which picture is better for the prompt? The same prompt${noise()}; sides and ` +
      `order are random. ${fair}Stop whenever you like; votes stay in this browser.`),
    el("p", { className: "soft keys" }, "Keys: ", el("kbd", {}, "←"), " or ", el("kbd", {}, "A"), " left, ",
      el("kbd", {}, "→"), " or ", el("kbd", {}, "B"), " right, ", el("kbd", {}, "↓"), " or ", el("kbd", {}, "T"),
      " tie, ", el("kbd", {}, "Backspace"), " undo.")));
  if (focused) byId(focused)?.focus();
}

function voteByKey(event) {
  const busy = byId("viewer").open || event.ctrlKey || event.metaKey || event.altKey ||
    event.target.closest?.("input, select, textarea");
  if (current !== "vote" || busy) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (key !== "Backspace" && !(key in KEYS)) return;
  event.preventDefault();
  if (event.repeat) return; // a key held down is one vote
  if (key === "Backspace") undo();
  else vote(KEYS[key]);
}

// ---------------------------------------------------------------- enlarged picture

const viewer = { pictures: [], index: 0 };

function openViewer(pictures, index) {
  Object.assign(viewer, { pictures, index });
  renderViewer();
  byId("viewer").showModal();
}

function moveViewer(step) {
  viewer.index = (viewer.index + step + viewer.pictures.length) % viewer.pictures.length;
  renderViewer();
}

function renderViewer() {
  const entry = viewer.pictures[viewer.index];
  const button = (text, label, press) => el("button", { type: "button", ariaLabel: label, onclick: press }, text);
  const place = `${entry.title} (${viewer.index + 1} of ${viewer.pictures.length})`;
  const focused = document.activeElement?.ariaLabel;
  byId("viewer").replaceChildren(
    el("header", {}, button("←", "Previous picture", () => moveViewer(-1)), el("span", { role: "status" }, place),
      button("→", "Next picture", () => moveViewer(1)), button("✕", "Close", () => byId("viewer").close())),
    el("div", { className: "stage" }, image(sourceOf(entry.picture), entry.alt)), ...entry.caption());
  for (const b of byId("viewer").querySelectorAll("header button")) if (b.ariaLabel === focused) b.focus();
}

function startViewer() {
  byId("viewer").addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) { event.preventDefault(); moveViewer(step); }
  });
  byId("viewer").addEventListener("click", (event) => {
    if (event.target === byId("viewer")) byId("viewer").close(); // the backdrop
  });
}

// ---------------------------------------------------------------- settings and views

function renderSettings() {
  const names = [...new Set(data.runs.flatMap((run) => Object.keys(run.details)))];
  const rows = names.map((name) => el("tr", {}, el("th", { scope: "row" }, name),
    data.runs.map((run) => el("td", {}, run.details[name] ?? "–"))));
  const head = el("tr", {}, el("td", {}), data.runs.map((_, run) => el("th", { scope: "col" }, runName(run))));
  byId("settings").replaceChildren(el("h2", {}, "Settings of the runs"),
    el("div", { className: "scroll" }, el("table", {}, el("thead", {}, head), el("tbody", {}, rows))));
}

const VIEWS = [
  { id: "grid", label: "Grid", useful: data.prompts.length > 0, render: renderGrid },
  { id: "changes", label: "Gains and losses", useful: paired && scored.length && data.prompts.length,
    render: () => renderExtremes("changes") },
  { id: "extremes", label: "Best and worst", useful: scored.length && data.prompts.length,
    render: () => renderExtremes("extremes") },
  { id: "vote", label: "Blind A/B", useful: paired && votable().length, render: renderVote },
  { id: "settings", label: "Settings", useful: data.runs.some((run) => Object.keys(run.details).length),
    render: renderSettings },
].filter((view) => view.useful);
let current = "";

/** Arrived at by choice, a view starts at the top of the screen, below the tabs. */
function show(id, scroll) {
  current = id;
  for (const view of VIEWS) {
    byId(view.id).hidden = view.id !== id;
    byId(`tab-${view.id}`).setAttribute("aria-pressed", String(view.id === id));
  }
  VIEWS.find((view) => view.id === id)?.render();
  if (scroll) scrollTo(0, document.querySelector("main").offsetTop - byId("tabs").offsetHeight);
}

function showFromAddress() {
  const wanted = location.hash.slice(1);
  show((VIEWS.find((view) => view.id === wanted) ?? VIEWS[0])?.id, wanted !== "");
}

function start() {
  fillHead();
  byId("tabs").replaceChildren(...VIEWS.map((view) => el("button", { type: "button", id: `tab-${view.id}`,
    onclick: () => { location.hash = view.id; } }, view.label)));
  byId("tabs").hidden = VIEWS.length < 2;
  restoreVotes();
  startViewer();
  addEventListener("keydown", voteByKey);
  addEventListener("hashchange", showFromAddress);
  showFromAddress();
}

start();
