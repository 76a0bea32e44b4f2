// The sections beside charts and samples: overview, evaluations, processes, events.

import { sparkline } from "./charts.js";
import { clock, el, short, styled, table } from "./dom.js";

const EVENTS_SHOWN = 500;
const STAGE_OF_IDLE = "idle_s";

const statusText = (run) => {
  const { status, live } = run.state ?? { status: "unknown" };
  if (status === "running" && !live) return "running, but its launcher does not answer: it starts, ends or was killed";
  return live?.ending ? `ending: ${live.ending}` : status;
};

/** A card for each run. */
export function overview(runs) {
  return [el("div", { class: "cards" }, runs.map(runCard)), ...runs.map(settings)];
}

function runCard(run) {
  const { state } = run;
  if (!state) return el("section", { class: "card" }, el("h3", {}, run.name), el("p", { class: "about" }, run.problem || "Reading …"));
  const { live, summary } = state;
  const total = live?.total_steps ?? summary?.total_steps;
  const held = run.evaluations.map((each) => each["reward/mean"]).filter((each) => typeof each === "number");
  const tokensPerS = live?.processes.reduce((sum, each) => sum + each.tokens_per_s, 0);
  const facts = [
    ["steps", `${run.lastStep + 1}${total ? ` of ${total}` : ""}`],
    ["started", new Date(state.started_at_s * 1000).toLocaleString()],
    ["time", clock(live?.elapsed_s ?? summary?.duration_s ?? run.last("elapsed_s"))],
    ["left", live?.remaining_s == null ? null : `about ${clock(live.remaining_s)}`],
    ["reward", change(run.series("reward/pool_mean"))],
    ["length", change(run.series("length/pool_mean"))],
    ["held-out reward", held.length ? `${short(held[0])}${held.length > 1 ? ` → ${short(held.at(-1))}` : ""}` : null],
    ["decoding", tokensPerS == null ? null : `${short(tokensPerS)} tokens/s`],
    ["starts of the launcher", state.life > 1 ? String(state.life) : null],
    ["model", summary?.model_path],
    ["directory", state.run_dir],
  ].filter(([, value]) => value !== null && value !== undefined && value !== "");
  const reason = state.reason && state.reason !== state.status ? `: ${state.reason}` : "";
  return el(
    "section", { class: "card" },
    el("h3", {}, run.name),
    el("p", { class: "about" }, el("span", { class: `status ${state.status}` }, statusText(run)), reason),
    run.problem ? el("p", { class: "notice" }, run.problem) : null,
    el("div", {}, sparkline(run.series("reward/pool_mean"))),
    el("dl", {}, facts.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])),
    (live?.notices ?? []).map((notice) => el("p", { class: "notice" }, notice)),
  );
}

function change(series) {
  if (!series) return null;
  return `${short(series.values[0])} → ${short(series.values.at(-1))}`;
}

function settings(run) {
  const text = el("pre", {}, "Reading …");
  const shown = el("details", { ontoggle: read }, el("summary", {}, `Settings of ${run.name}`), text);
  async function read() {
    const reply = await fetch(`settings?${new URLSearchParams({ run: run.name })}`);
    text.textContent = await reply.text();
  }
  return shown;
}

/** The evaluations of one run. */
export function evaluations(run) {
  if (!run.evaluations.length) return [el("p", { class: "about" }, "No evaluation is complete yet.")];
  const names = [...new Set(run.evaluations.flatMap((each) => Object.keys(each)))].filter((name) => !["type", "elapsed_s", "policy_version", "newest_version", "num_skipped", "reward/mean", "reward/standard_error"].includes(name));
  const columns = [
    ["version", (each) => String(each.policy_version), "number"],
    ["after", (each) => clock(each.elapsed_s), "number"],
    ["reward", (each) => `${short(each["reward/mean"])}${each["reward/standard_error"] == null ? "" : ` ± ${short(each["reward/standard_error"])}`}`, "number"],
    ...names.map((name) => [name.replaceAll("_", " "), (each) => (typeof each[name] === "number" ? short(each[name]) : String(each[name] ?? "–")), "number"]),
  ];
  return [table(columns, [...run.evaluations].reverse())];
}

/** The processes of one run, and what became of them. */
export function processes(run) {
  const { live, summary, histories } = run.state ?? { histories: [] };
  const found = [];
  if (live) {
    found.push(el("h2", {}, "Now"), table([
      ["process", (each) => each.name], ["state", (each) => each.state], ["version", (each) => (each.policy_version < 0 ? "–" : String(each.policy_version)), "number"],
      ["in flight", (each) => String(each.num_in_flight), "number"], ["tokens/s", (each) => short(each.tokens_per_s), "number"],
      ["up", (each) => clock(each.uptime_s), "number"], ["restarts", (each) => String(each.restarts), "number"], ["pid", (each) => String(each.pid ?? "–"), "number"],
    ], live.processes));
    found.push(el("h2", {}, "Nodes"), table([["node", (each) => each.name], ["state", (each) => each.state], ["agents so far", (each) => String(each.agent_incarnation), "number"]], live.nodes));
  }
  if (summary) {
    found.push(el("h2", {}, "Time at the end of the run"), table([
      ["process", (each) => each.name], ["up", (each) => clock(each.uptime_s), "number"], ["idle", (each) => share(each[STAGE_OF_IDLE], each.uptime_s)], ["busy with", (each) => stages(each), "text"],
    ], summary.processes));
  }
  found.push(el("h2", {}, "Starts and ends"));
  if (!histories.length) return [...found, el("p", { class: "about" }, "No process has started yet.")];
  return [...found, table([
    ["process", (each) => each.process], ["starts", (each) => String(each.num_starts), "number"], ["ends", (each) => String(each.num_ends), "number"],
    ["last code", (each) => String(each.last_code ?? "–"), "number"], ["killed", (each) => String(each.num_kills), "number"], ["away", (each) => clock(each.away_s), "number"],
  ], histories)];
}

function share(part, whole) {
  const value = whole > 0 ? part / whole : 0;
  const bar = el("span", { class: "share" }, styled(el("i", {}), { width: `${Math.round(value * 100)}%` }));
  return el("span", {}, bar, ` ${Math.round(value * 100)} %`);
}

const stages = (each) => Object.entries(each.busy_s).filter(([, seconds]) => each.uptime_s > 0 && seconds / each.uptime_s >= 0.005).sort((a, b) => b[1] - a[1]).map(([name, seconds]) => `${name} ${Math.round((seconds / each.uptime_s) * 100)} %`).join(" · ");

/** The events of one run, the newest first; a filter finds words in them. */
export function events(run, words, search) {
  const wanted = words.toLowerCase();
  const isWanted = (each) => `${each.type} ${each.subject} ${each.text}`.toLowerCase().includes(wanted);
  const found = run.events.filter(isWanted).reverse();
  const rows = table([["at", (each) => clock(each.elapsed_s), "number"], ["event", (each) => each.type], ["of", (each) => each.subject], ["", (each) => each.text, "text"]], found.slice(0, EVENTS_SHOWN));
  const count = `${found.length} of ${run.events.length}${found.length > EVENTS_SHOWN ? `, the newest ${EVENTS_SHOWN} are shown` : ""}`;
  return [el("div", { class: "tools" }, search, el("span", { class: "soft" }, count)), rows];
}
