// Samples: a group is a row of bars by length; a click shows the text of one, shaded by log-probability or version.

import { ask, el, short, styled, swatch } from "./dom.js";

const BAR_PX = 66;
const GROUPS_AT_ONCE = 40;
const LOW = [217, 112, 42];
const MIDDLE = [141, 143, 150];
const HIGH = [47, 111, 181];
const FACTS = ["sample", "outcome", "why", "reward", "advantage", "weight", "baseline", "length", "finish_reason", "answer", "prompt_id", "generators"];
const TEXTS = ["prompt", "model_input", "text", "tokens", "token_ids", "logprobs", "versions", "kind", "step", "group_id", "sample_index", "selected"];

export class Samples {
  /** Args: where a sample is shown; what is shown is remembered from one drawing to the next. */
  constructor(dialog, outcomes) {
    Object.assign(this, { dialog, outcomes, kind: "train", number: null, groups: [], order: [], shade: "logprob", shown: GROUPS_AT_ONCE });
  }

  /** The section, for the run whose samples are shown. */
  section(run) {
    this.run = run;
    this.list = el("div", {});
    this.place = el("div", { class: "tools" });
    this.fillTools();
    this.load();
    return [this.place, this.legend(), this.list];
  }

  /** There are samples of further steps. Those that are shown stay. */
  refresh(run) {
    if (this.run !== run || this.dialog.open) return;
    if (this.filled !== this.known()) this.fillTools();
    if (this.number === null && this.loaded !== this.wanted()) this.load();
  }

  numbers() {
    return this.run.samples[this.kind] ?? [];
  }

  /** What is asked for: of steps the newest that is complete, for a later one may have only groups that came to nothing. */
  wanted() {
    const numbers = this.numbers();
    if (this.number !== null && numbers.includes(this.number)) return this.number;
    const trained = numbers.filter((number) => number <= this.run.lastStep);
    return (this.kind === "train" && trained.length ? trained : numbers).at(-1) ?? null;
  }

  known() {
    return JSON.stringify([this.numbers(), this.wanted()]);
  }

  fillTools() {
    this.filled = this.known();
    const wanted = this.wanted();
    const numbers = this.numbers();
    const place = numbers.indexOf(wanted);
    const kinds = [["train", "training"], ["held-out", "held-out prompts"]];
    const kind = el("select", { id: "kind", onchange: (event) => this.go(event.target.value, null) }, kinds.map(([value, name]) => el("option", { value, selected: value === this.kind }, name)));
    const word = this.kind === "train" ? "step" : "version";
    const options = numbers.map((number) => el("option", { value: number, selected: number === wanted }, String(number)));
    const number = el("select", { id: "number", onchange: (event) => this.go(this.kind, Number(event.target.value)) }, options.reverse());
    const step = (by, name) => el("button", { type: "button", disabled: place + by < 0 || place + by >= numbers.length || place < 0, onclick: () => this.go(this.kind, numbers[place + by]) }, name);
    this.place.replaceChildren(el("label", {}, "samples of", kind), el("label", {}, word, number), step(-1, "‹ earlier"), step(1, "later ›"), el("span", { class: "soft" }, this.number === null && wanted !== null ? "follows the newest" : ""));
  }

  go(kind, number) {
    Object.assign(this, { kind, number, shown: GROUPS_AT_ONCE });
    this.fillTools();
    this.load();
  }

  async load() {
    const wanted = this.wanted();
    this.loaded = wanted;
    if (wanted === null) {
      this.list.replaceChildren(el("p", { class: "about" }, "There are no samples yet: no step is complete, or telemetry.sample_groups is 0."));
      return;
    }
    const list = this.list;
    try {
      const groups = await ask("samples", { run: this.run.name, kind: this.kind, number: wanted });
      if (list !== this.list || this.loaded !== wanted) return;
      this.groups = groups;
      this.showGroups();
    } catch (error) {
      list.replaceChildren(el("p", { class: "notice" }, error.message));
    }
  }

  legend() {
    const keys = this.outcomes.map((outcome) => el("span", { class: "key" }, swatch(`var(--${outcome})`), outcome));
    const reward = el("span", { class: "key" }, "bar: reward, low", el("span", { class: "scale" }), "high; hatched: none");
    return el("div", { class: "legend" }, reward, el("span", { class: "key" }, "foot: outcome"), keys);
  }

  showGroups() {
    const rewards = this.groups.flatMap((group) => group.samples.map((each) => each.reward)).filter((each) => each !== null);
    this.range = [Math.min(...rewards, 0), Math.max(...rewards, rewards.length ? -Infinity : 1)];
    if (this.range[1] <= this.range[0]) this.range[1] = this.range[0] + 1;
    this.longest = Math.max(1, ...this.groups.flatMap((group) => group.samples.map((each) => each.length)));
    this.order = [];
    const cards = this.groups.slice(0, this.shown).map((group) => this.groupCard(group));
    const left = this.groups.length - cards.length;
    const more = left > 0 ? el("button", { type: "button", onclick: () => this.more() }, `show more: ${left} groups are left`) : null;
    this.list.replaceChildren(el("div", { class: "cards" }, cards), more ?? "");
  }

  more() {
    this.shown *= 2;
    this.showGroups();
  }

  groupCard(group) {
    const samples = [...group.samples].sort((a, b) => a.length - b.length);
    const scored = samples.filter((each) => each.reward !== null);
    const mean = scored.length ? scored.reduce((sum, each) => sum + each.reward, 0) / scored.length : null;
    const about = `group ${group.group_id} · prompt ${group.prompt_id} · ${samples.length} samples · mean reward ${short(mean)}${group.answer ? ` · answer ${group.answer}` : ""}`;
    const bars = samples.map((each) => this.bar(each));
    return el("section", { class: "card group" }, el("p", { class: "about" }, about), el("p", { class: "prompt" }, group.prompt), el("div", { class: "bars" }, bars));
  }

  bar(each) {
    const words = `${each.sample}: ${each.outcome}${each.why ? ` (${each.why})` : ""}, ${each.length} tokens, reward ${each.reward === null ? "none" : short(each.reward)}`;
    const body = el("span", { class: each.reward === null ? "body none" : "body" });
    styled(body, { height: `${Math.max(3, (each.length / this.longest) * BAR_PX)}px` });
    if (each.reward !== null) styled(body, { background: this.rewardColour(each.reward) });
    const foot = styled(el("span", { class: "foot" }), { background: `var(--${each.outcome})` });
    const button = el("button", { type: "button", title: words, "aria-label": words, onclick: () => this.open(each.sample) }, body, foot);
    this.order.push([each.sample, button]);
    return button;
  }

  rewardColour(reward) {
    const place = (reward - this.range[0]) / (this.range[1] - this.range[0]);
    const [from, to, part] = place < 0.5 ? [LOW, MIDDLE, place * 2] : [MIDDLE, HIGH, place * 2 - 1];
    return `rgb(${from.map((value, index) => Math.round(value + (to[index] - value) * part)).join(",")})`;
  }

  async open(sample) {
    for (const [name, button] of this.order) button.classList.toggle("seen", name === sample);
    this.opened = sample;
    let content;
    try {
      content = this.detail(await ask("sample", { run: this.run.name, kind: this.kind, number: this.loaded, sample }));
    } catch (error) {
      content = [el("p", { class: "notice" }, error.message)];
    }
    if (this.opened !== sample) return;
    this.dialog.replaceChildren(this.dialogTools(sample), ...content);
    if (!this.dialog.open) this.dialog.showModal();
    this.dialog.scrollTop = 0;
  }

  dialogTools(sample) {
    const place = this.order.findIndex(([name]) => name === sample);
    const step = (by, name) => el("button", { type: "button", disabled: !this.order[place + by], onclick: () => this.open(this.order[place + by][0]) }, name);
    const shades = [["logprob", "log-probability"], ["version", "version"], ["none", "nothing"]];
    const choice = el("select", { id: "shade", onchange: (event) => this.reshade(event.target.value) }, shades.map(([value, name]) => el("option", { value, selected: value === this.shade }, name)));
    return el("div", { class: "tools" }, step(-1, "‹ previous"), step(1, "next ›"), el("label", {}, "shade by", choice), styled(el("button", { type: "button", onclick: () => this.dialog.close() }, "close"), { "margin-left": "auto" }));
  }

  detail(rollout) {
    this.rollout = rollout;
    const rest = Object.keys(rollout).filter((name) => !FACTS.includes(name) && !TEXTS.includes(name));
    const facts = [...FACTS, ...rest].filter((name) => !isEmpty(rollout[name])).flatMap((name) => [el("dt", {}, name.replaceAll("_", " ")), el("dd", {}, factText(rollout[name]))]);
    this.tokens = el("pre", { class: "tokens" });
    this.shadeLegend = el("div", { class: "legend" });
    this.fillTokens();
    const input = rollout.model_input ? [el("details", {}, el("summary", { class: "soft" }, "what the model saw"), el("pre", {}, rollout.model_input))] : [];
    return [el("dl", {}, facts), el("h3", {}, "Prompt"), el("pre", { class: "prompt-text" }, rollout.prompt), ...input, el("h3", {}, "Response"), this.shadeLegend, this.tokens];
  }

  reshade(shade) {
    this.shade = shade;
    this.fillTokens();
  }

  fillTokens() {
    const { tokens, logprobs, versions, token_ids: ids, text } = this.rollout;
    if (!tokens.length) {
      this.shadeLegend.replaceChildren("its tokens were not kept");
      this.tokens.replaceChildren(text || "(no text)");
      return;
    }
    const known = [...new Set(versions)].sort((a, b) => a - b);
    this.tokens.replaceChildren(...tokens.map((token, index) => {
      const title = [`log-probability ${logprobs[index] ?? "unknown"}`, `version ${versions[index] ?? "unknown"}`, `token ${ids[index] ?? "unknown"}`].join(" · ");
      return styled(el("span", { title }, token), { background: this.tokenColour(logprobs[index], known.indexOf(versions[index])) });
    }));
    const bySpan = (colour, name) => el("span", { class: "key" }, swatch(colour), name);
    const steps = [-0.05, -1, -2.5, -5];
    const keys = { logprob: steps.map((value) => bySpan(this.tokenColour(value, 0), String(value))), version: known.map((version, index) => bySpan(this.tokenColour(0, index), `version ${version}`)), none: [] };
    this.shadeLegend.replaceChildren(...keys[this.shade]);
  }

  tokenColour(logprob, place) {
    if (this.shade === "version") return place < 0 ? "none" : `color-mix(in srgb, var(--c${place % 8}) 30%, transparent)`;
    if (this.shade === "none" || logprob === undefined || logprob === null) return "none";
    return `rgba(var(--token), ${Math.min(0.85, -logprob / 5).toFixed(2)})`;
  }
}

const isEmpty = (value) => value === null || value === undefined || value === "" || (typeof value === "object" && Object.keys(value).length === 0);

function factText(value) {
  if (typeof value === "number") return String(Number(value.toPrecision(6)));
  return typeof value === "object" ? (Array.isArray(value) && value.every((each) => typeof each !== "object") ? value.join(", ") : JSON.stringify(value)) : String(value);
}
