// The page: which runs and which section are shown, and the stream of what is new in them.

import { draw, hasData, seriesOf } from "./charts.js";
import { el, styled } from "./dom.js";
import { Samples } from "./samples.js";
import { evaluations, events, overview, processes } from "./sections.js";

const SECTIONS = { overview: "Overview", charts: "Charts", samples: "Samples", evaluations: "Evaluations", processes: "Processes", events: "Events" };
const OF_ONE_RUN = ["samples", "evaluations", "processes", "events"];
const main = document.getElementById("main");

/** What is known of a run: the messages of the stream, put together. */
class Run {
  constructor(name) {
    this.name = name;
    this.clear();
  }

  clear() {
    Object.assign(this, { metrics: new Map(), lastStep: -1, evaluations: [], events: [], state: null, samples: {}, problem: "" });
  }

  take(message) {
    if (message.reset) this.clear();
    for (const [name, [steps, values]] of Object.entries(message.points ?? {})) {
      if (!this.metrics.has(name)) this.metrics.set(name, { steps: [], values: [] });
      steps.forEach((step, index) => put(this.metrics.get(name), step, values[index]));
    }
    this.lastStep = Math.max(this.lastStep, message.last_step ?? -1);
    for (const each of message.evaluations ?? []) {
      this.evaluations = this.evaluations.filter((other) => other.policy_version !== each.policy_version);
      this.evaluations.push(each);
      this.evaluations.sort((a, b) => a.policy_version - b.policy_version);
    }
    this.events.push(...(message.events ?? []));
    this.state = message.state ?? this.state;
    this.samples = message.samples ?? this.samples;
    this.problem = message.problem ?? (message.state ? "" : this.problem);
  }

  series(name) {
    return this.metrics.get(name);
  }

  last(name) {
    return this.metrics.get(name)?.values.at(-1);
  }

  evaluated(name) {
    const found = name ? this.evaluations.filter((each) => typeof each[name] === "number") : [];
    return { steps: found.map((each) => each.policy_version), values: found.map((each) => each[name]) };
  }
}

/** A value of a step. Steps ascend, until a resumed run takes some of them again. */
function put(series, step, value) {
  if (!series.steps.length || step > series.steps.at(-1)) {
    series.steps.push(step);
    series.values.push(value);
    return;
  }
  const place = series.steps.findIndex((each) => each >= step);
  const isThere = series.steps[place] === step;
  series.steps.splice(place, isThere ? 1 : 0, step);
  series.values.splice(place, isThere ? 1 : 0, value);
}

class Page {
  constructor(start) {
    Object.assign(this, { charts: start.charts, maxRuns: start.max_runs, list: start.runs, runs: new Map(), figures: new Map(), smoothing: 0, words: "", isOpen: {} });
    this.samples = new Samples(document.getElementById("sample"), start.outcomes);
    this.search = el("input", { type: "search", placeholder: "find in events", "aria-label": "find in events", oninput: (event) => this.find(event.target.value) });
    this.readAddress();
    window.addEventListener("hashchange", () => this.readAddress() && this.follow());
    document.addEventListener("visibilitychange", () => this.follow()); // a hidden page keeps no connection
    new ResizeObserver(() => this.redraw()).observe(main);
    this.follow();
  }

  // --- the address: #section=charts&run=NAME&run=NAME

  readAddress() {
    const fields = new URLSearchParams(location.hash.slice(1));
    const before = this.chosen?.join("/");
    this.section = SECTIONS[fields.get("section")] ? fields.get("section") : "overview";
    const known = fields.getAll("run").filter((name) => this.list.some((row) => row.run === name));
    this.chosen = (known.length ? known : this.list.slice(0, 1).map((row) => row.run)).slice(0, this.maxRuns);
    this.focus = this.chosen.includes(this.focus) ? this.focus : this.chosen[0];
    this.show();
    return before !== this.chosen.join("/");
  }

  address(section, chosen) {
    const fields = new URLSearchParams({ section });
    for (const name of chosen) fields.append("run", name);
    return `#${fields}`;
  }

  // --- the stream

  follow() {
    this.source?.close();
    if (document.hidden) return;
    this.runs = new Map(this.chosen.map((name) => [name, this.runs.get(name) ?? new Run(name)]));
    const isFresh = new Set();
    this.source = new EventSource(`updates?${new URLSearchParams(this.chosen.map((name) => ["run", name]))}`);
    this.source.onopen = () => {
      isFresh.clear(); // a stream begins with everything, also one that the browser has opened again
      this.say("");
    };
    this.source.onerror = () => this.say("not connected: is `darts-launch dashboard` running?");
    this.source.onmessage = (event) => {
      const message = JSON.parse(event.data);
      const run = this.runs.get(message.run);
      if (message.runs) this.list = message.runs;
      if (run) {
        if (!isFresh.has(run.name)) run.clear();
        isFresh.add(run.name);
        run.take(message);
        this.isStale ||= Boolean(message.points || message.evaluations || message.reset);
      }
      this.later();
    };
  }

  say(text) {
    document.getElementById("link").textContent = text;
  }

  // --- drawing

  later() {
    this.isDue ??= requestAnimationFrame(() => {
      this.isDue = null;
      this.refresh();
    });
  }

  /** Draw the charts, also if they have nothing new. */
  redraw() {
    this.isStale = true;
    this.later();
  }

  show() {
    const links = Object.entries(SECTIONS).map(([name, title]) => el("a", { href: this.address(name, this.chosen), "aria-current": name === this.section ? "page" : null }, title));
    document.getElementById("sections").replaceChildren(...links);
    this.figures.clear();
    this.drawn = "";
    this.body = el("div", {});
    main.replaceChildren(...this.tools(), this.body);
    this.refresh();
  }

  tools() {
    if (this.section === "charts") {
      const smooth = el("input", { type: "range", min: 0, max: 0.98, step: 0.02, value: this.smoothing, oninput: (event) => this.smooth(Number(event.target.value)) });
      return [el("div", { class: "tools" }, el("label", {}, "smooth", smooth))];
    }
    if (!OF_ONE_RUN.includes(this.section) || this.chosen.length < 2) return [];
    const options = this.chosen.map((name) => el("option", { value: name, selected: name === this.focus }, name));
    return [el("div", { class: "tools" }, el("label", {}, "run", el("select", { id: "focus", onchange: (event) => this.look(event.target.value) }, options)))];
  }

  refresh() {
    this.showRuns();
    const runs = this.chosen.map((name) => this.runs.get(name)).filter((run) => run);
    const run = this.runs.get(this.focus);
    document.title = run?.state ? `${run.lastStep + 1} · ${run.name}` : "darts";
    if (!run) return;
    if (this.section === "charts") this.drawCharts(runs);
    else if (this.section === "samples") this.drawSamples(run);
    else this.replaceBody({ overview: () => overview(runs), evaluations: () => evaluations(run), processes: () => processes(run), events: () => events(run, this.words, this.search) }[this.section]());
  }

  /** New content, unless someone reads in what is there: has opened the settings, or selects text. */
  replaceBody(content) {
    const isRead = this.body.querySelector("details[open]") || (getSelection().toString() && this.body.contains(getSelection().anchorNode));
    if (isRead) return;
    const wasFocused = document.activeElement === this.search;
    const x = [...this.body.querySelectorAll(".wide")].map((each) => each.scrollLeft);
    this.body.replaceChildren(...content);
    [...this.body.querySelectorAll(".wide")].forEach((each, index) => (each.scrollLeft = x[index] ?? 0));
    if (wasFocused) this.search.focus();
  }

  showRuns() {
    const drawn = JSON.stringify([this.list, this.chosen]);
    if (drawn === this.runsDrawn) return;
    this.runsDrawn = drawn;
    const chips = this.list.map((row) => {
      const place = this.chosen.indexOf(row.run);
      const dot = styled(el("span", { class: "dot" }), place >= 0 ? { background: `var(--c${place})` } : {});
      const title = row.status + (row.reason && row.reason !== row.status ? `: ${row.reason}` : "");
      return el("button", { type: "button", class: "chip", title, "aria-pressed": String(place >= 0), onclick: () => this.toggle(row.run) }, dot, row.run, el("span", { class: `status ${row.status}` }, row.status));
    });
    document.getElementById("runs").replaceChildren(...chips);
  }

  drawCharts(runs) {
    const named = new Set(this.charts.flatMap((chart) => [...seriesOf(chart, runs).map((each) => each.metric), ...(chart.band ?? [])]));
    const rest = [...new Set(runs.flatMap((run) => [...run.metrics.keys()]))].filter((name) => !named.has(name) && name !== "elapsed_s").sort();
    const more = rest.map((name) => ({ title: name, about: "", kind: "lines", band: null, family: "", evaluated: "", series: [{ metric: name, label: name }] }));
    const drawn = JSON.stringify([this.charts.filter((chart) => hasData(chart, runs)).map((chart) => chart.title), rest, runs.map((run) => run.name)]);
    if (drawn === this.drawn && !this.isStale) return;
    this.isStale = false;
    if (drawn !== this.drawn) this.layOut(runs, more, drawn);
    for (const [figure, [chart, of]] of this.figures) if (!figure.closest("details:not([open])")) draw(figure, chart, of, this.smoothing);
  }

  layOut(runs, more, drawn) {
    this.drawn = drawn;
    this.figures.clear();
    const figures = (charts) => charts.filter((chart) => hasData(chart, runs)).flatMap((chart) => {
      const drawings = chart.kind === "stacked" ? runs.filter((run) => hasData(chart, [run])).map((run) => [run]) : [runs];
      return drawings.map((of) => {
        const figure = el("figure", {});
        const about = chart.kind === "stacked" && runs.length > 1 ? `${of[0].name}: ${chart.about}` : chart.about;
        this.figures.set(figure, [{ ...chart, about }, of]);
        return figure;
      });
    });
    const first = figures(this.charts);
    const rest = el("details", { open: this.isOpen.more, ontoggle: (event) => { this.isOpen.more = event.target.open; this.redraw(); } }, el("summary", {}, `${more.length} further metrics`), el("div", { class: "cards" }, figures(more)));
    this.body.replaceChildren(first.length ? el("div", { class: "cards" }, first) : el("p", { class: "about" }, "No step is complete yet."), more.length ? rest : "");
  }

  drawSamples(run) {
    if (this.drawn !== run.name) {
      this.drawn = run.name;
      this.body.replaceChildren(...this.samples.section(run));
    } else this.samples.refresh(run);
  }

  // --- what the reader does

  toggle(name) {
    const others = this.chosen.filter((other) => other !== name);
    const chosen = others.length < this.chosen.length ? others : [...others, name].slice(-this.maxRuns);
    if (chosen.length) location.hash = this.address(this.section, chosen);
  }

  look(name) {
    this.focus = name;
    this.show();
  }

  smooth(strength) {
    this.smoothing = strength;
    this.redraw();
  }

  find(words) {
    this.words = words;
    this.later();
  }
}

fetch("start").then((reply) => reply.json()).then((start) => new Page(start), (error) => {
  main.replaceChildren(el("p", { class: "notice" }, `The dashboard does not answer: ${error.message}`));
});
