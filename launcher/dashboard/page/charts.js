// Charts over the steps of runs, as SVG. A chart with one run has a colour for each line, with several one for each run.

import { el, short, styled, svg, swatch } from "./dom.js";

const HEIGHT = 190;
const EDGE = { left: 46, right: 10, top: 8, bottom: 22 };
const DASHES = ["", "6 3", "2 3", "8 3 2 3"];
const colour = (index) => `var(--c${index % 8})`;

/** The lines of a chart in these runs, with those of its family. */
export function seriesOf(chart, runs) {
  const [before, after] = chart.family.split("*");
  const names = chart.family ? [...new Set(runs.flatMap((run) => [...run.metrics.keys()]))] : [];
  const found = names.filter((name) => name.startsWith(before) && name.endsWith(after) && name.length >= chart.family.length);
  return [...chart.series, ...found.sort().map((metric) => ({ metric, label: metric.slice(before.length, metric.length - after.length) }))];
}

/** Whether a run of these has something to draw. */
export const hasData = (chart, runs) => runs.some((run) => seriesOf(chart, runs).some((each) => run.series(each.metric)));

/** Draw a chart into its figure, which is made at the first call. Stacked ones are for one run. */
export function draw(figure, chart, runs, smoothing) {
  const lines = chart.kind === "stacked" ? stackedLines(chart, runs[0]) : plainLines(chart, runs, smoothing);
  const legend = runs.length > 1 ? dashKeys(lines) : lines.filter((line) => line.label).map((line) => el("span", { class: "key" }, swatch(line.colour), line.label));
  const caption = el("figcaption", {}, el("h3", {}, chart.title), el("span", { class: "about" }, chart.about));
  const width = Math.max(260, figure.clientWidth - 28);
  const picture = plotted(lines, bandsOf(chart, runs), width, chart);
  figure.replaceChildren(caption, el("div", { class: "legend" }, legend), picture.element);
  addTip(figure, picture, lines);
}

/** Of several runs: what each dash means. The colours of the runs are at the top of the page. */
function dashKeys(lines) {
  const dashes = new Map(lines.filter((line) => line.label).map((line) => [line.of, line]));
  return [...dashes].map(([of, line]) => {
    const stroke = svg("line", { class: "dash", x1: 0, x2: 24, y1: 4, y2: 4, "stroke-dasharray": line.dash || null });
    const dots = line.points ? [svg("circle", { class: "dash", cx: 12, cy: 4, r: 2 })] : [];
    return el("span", { class: "key" }, svg("svg", { width: 24, height: 8, "aria-hidden": "true", class: "sample" }, stroke, dots), of);
  });
}

function plainLines(chart, runs, smoothing) {
  const lines = [];
  const several = runs.length > 1;
  runs.forEach((run, place) => {
    seriesOf(chart, runs).forEach((each, index) => {
      const found = run.series(each.metric);
      if (!found) return;
      const style = { colour: several ? colour(place) : colour(index), dash: several ? DASHES[index % 4] : "" };
      const label = several ? `${run.name}: ${each.label}` : each.label;
      if (smoothing > 0) lines.push({ ...found, ...style, label: "", faint: true });
      lines.push({ steps: found.steps, values: smoothed(found.values, smoothing), ...style, label, of: each.label });
    });
    const evaluated = run.evaluated(chart.evaluated);
    if (evaluated.steps.length) {
      const label = several ? `${run.name}: held out` : "held out";
      lines.push({ ...evaluated, colour: several ? colour(place) : colour(3), dash: "2 3", label, of: "held out", points: true });
    }
  });
  return lines;
}

function stackedLines(chart, run) {
  const found = chart.series.map((each) => [each, run.series(each.metric)]).filter(([, series]) => series);
  const steps = [...new Set(found.flatMap(([, series]) => series.steps))].sort((a, b) => a - b);
  let below = steps.map(() => 0);
  return found.map(([each, series]) => {
    let place = -1;
    const own = steps.map((step) => {
      while (place + 1 < series.steps.length && series.steps[place + 1] <= step) place += 1;
      return place < 0 ? 0 : series.values[place];
    });
    const line = { steps, values: own.map((value, index) => value + below[index]), below, own, colour: `var(--${each.label})`, label: each.label };
    below = line.values;
    return line;
  });
}

function smoothed(values, strength) {
  if (!strength) return values;
  let [sum, weight] = [0, 0];
  return values.map((value) => {
    sum = sum * strength + value;
    weight = weight * strength + 1;
    return sum / weight;
  });
}

function bandsOf(chart, runs) {
  if (!chart.band) return [];
  return runs.flatMap((run, place) => {
    const [low, high] = chart.band.map((name) => run.series(name));
    if (!low || !high || low.steps.length !== high.steps.length) return [];
    return [{ steps: low.steps, low: low.values, high: high.values, colour: colour(place) }];
  });
}

function plotted(lines, bands, width, chart) {
  const element = svg("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": `${chart.title}: ${chart.about}` });
  const scale = scaled(lines, bands, width, chart.kind === "stacked");
  for (const value of scale.rows) {
    const y = scale.y(value);
    element.append(svg("line", { class: "grid", x1: EDGE.left, x2: width - EDGE.right, y1: y, y2: y }));
    element.append(svg("text", { x: EDGE.left - 6, y: y + 4, "text-anchor": "end" }, short(value)));
  }
  for (const step of scale.columns) {
    element.append(svg("text", { x: scale.x(step), y: HEIGHT - 6, "text-anchor": "middle" }, short(step)));
  }
  for (const band of bands) {
    element.append(area(band.steps, band.low, band.high, scale, band.colour, 0.16));
  }
  for (const line of lines) {
    if (line.below) element.append(area(line.steps, line.below, line.values, scale, line.colour, 0.75));
    else element.append(...strokes(line, scale, width));
  }
  return { element, scale, width };
}

function scaled(lines, bands, width, fromZero) {
  let [first, last, low, high] = [Infinity, -Infinity, Infinity, -Infinity];
  const see = (steps, values) => {
    for (const step of steps) [first, last] = [Math.min(first, step), Math.max(last, step)];
    for (const value of values) [low, high] = [Math.min(low, value), Math.max(high, value)];
  };
  for (const line of lines) see(line.steps, line.values);
  for (const band of bands) [band.low, band.high].forEach((values) => see(band.steps, values));
  if (first > last) [first, last, low, high] = [0, 1, 0, 1];
  if (low >= 0 && (fromZero || low < 0.6 * high || high === low)) low = 0;
  if (high === low) high = low + 1;
  const room = (high - low) * 0.05;
  [low, high] = [low === 0 ? 0 : low - room, high + room];
  const span = Math.max(1, last - first);
  const x = (step) => EDGE.left + ((step - first) / span) * (width - EDGE.left - EDGE.right);
  const y = (value) => EDGE.top + ((high - value) / (high - low)) * (HEIGHT - EDGE.top - EDGE.bottom);
  const stepAt = (place) => first + ((place - EDGE.left) / (width - EDGE.left - EDGE.right)) * span;
  return { x, y, stepAt, rows: ticks(low, high, 4, 0), columns: ticks(first, last, Math.min(6, width / 70), 1) };
}

function ticks(low, high, count, smallest) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough || 1));
  const by = Math.max(smallest, [1, 2, 5, 10].find((each) => each * power >= rough) * power);
  const found = [];
  for (let value = Math.ceil(low / by) * by; value <= high + by * 1e-9; value += by) found.push(Number(value.toPrecision(12)));
  return found;
}

const point = (x, y) => `${x.toFixed(1)} ${y.toFixed(1)}`;

function strokes(line, scale, width) {
  const found = thinned(line.steps, line.values, width);
  const path = found.map(([step, value], index) => `${index ? "L" : "M"}${point(scale.x(step), scale.y(value))}`).join("");
  const stroke = svg("path", { d: path, fill: "none", "stroke-width": line.faint ? 1 : 1.6, "stroke-dasharray": line.dash || null, "stroke-linejoin": "round" });
  styled(stroke, { stroke: line.colour, opacity: line.faint ? 0.25 : 1 });
  const dots = line.points || found.length === 1 ? found : [];
  return [stroke, ...dots.map(([step, value]) => styled(svg("circle", { cx: scale.x(step), cy: scale.y(value), r: 3 }), { fill: line.colour }))];
}

/** Of more points than pixels the lowest and the highest of each pixel, so that no peak is lost. */
function thinned(steps, values, width) {
  if (steps.length <= 2 * width) return steps.map((step, index) => [step, values[index]]);
  const found = [];
  const each = steps.length / width;
  for (let pixel = 0; pixel < width; pixel += 1) {
    let low = Math.floor(pixel * each);
    let high = low;
    for (let index = low; index < Math.min(steps.length, Math.floor((pixel + 1) * each)); index += 1) {
      if (values[index] < values[low]) low = index;
      if (values[index] > values[high]) high = index;
    }
    for (const index of [...new Set([Math.min(low, high), Math.max(low, high)])]) found.push([steps[index], values[index]]);
  }
  return found;
}

function area(steps, low, high, scale, fill, opacity) {
  const every = Math.max(1, Math.floor(steps.length / 1000));
  const kept = steps.map((_, index) => index).filter((index) => index % every === 0 || index === steps.length - 1);
  const upper = kept.map((index) => point(scale.x(steps[index]), scale.y(high[index])));
  const lower = kept.map((index) => point(scale.x(steps[index]), scale.y(low[index]))).reverse();
  return styled(svg("path", { d: `M${[...upper, ...lower].join("L")}Z` }), { fill, opacity });
}

function addTip(figure, picture, lines) {
  const mark = svg("line", { class: "mark", y1: EDGE.top, y2: HEIGHT - EDGE.bottom, visibility: "hidden" });
  picture.element.append(mark);
  const tip = el("div", { class: "tip", hidden: true });
  figure.append(tip);
  const leave = () => {
    tip.hidden = true;
    mark.setAttribute("visibility", "hidden");
  };
  picture.element.addEventListener("pointerleave", leave);
  picture.element.addEventListener("pointermove", (event) => {
    const box = picture.element.getBoundingClientRect();
    const step = nearest(lines, picture.scale.stepAt(((event.clientX - box.left) / box.width) * picture.width));
    if (step === null) return;
    const x = picture.scale.x(step);
    for (const name of ["x1", "x2"]) mark.setAttribute(name, x);
    mark.setAttribute("visibility", "visible");
    const rows = lines.filter((line) => line.label && line.steps.includes(step)).map((line) => {
      const values = line.own ?? line.values;
      return el("div", {}, swatch(line.colour), line.label, el("b", {}, short(values[line.steps.indexOf(step)])));
    });
    tip.replaceChildren(el("div", {}, `step ${step}`), ...rows);
    tip.hidden = false;
    const left = event.clientX - figure.getBoundingClientRect().left;
    const room = figure.clientWidth - tip.offsetWidth - 8;
    styled(tip, { left: `${Math.max(4, Math.min(left + 14, room))}px`, top: `${box.top - figure.getBoundingClientRect().top + 6}px` });
  });
}

function nearest(lines, wanted) {
  let found = null;
  for (const line of lines) {
    for (const step of line.steps) if (found === null || Math.abs(step - wanted) < Math.abs(found - wanted)) found = step;
  }
  return found;
}

/** A small line without axes: the course of one metric. */
export function sparkline(series) {
  const [width, height] = [160, 34];
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, "aria-hidden": "true" });
  if (!series) return picture;
  const found = thinned(series.steps, series.values, width);
  const values = found.map(([, value]) => value);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const x = (index) => 2 + (index / Math.max(1, found.length - 1)) * (width - 4);
  const y = (value) => height - 3 - ((value - low) / (high - low || 1)) * (height - 6);
  const path = values.map((value, index) => `${index ? "L" : "M"}${point(x(index), y(value))}`).join("");
  picture.append(styled(svg("path", { d: path, fill: "none", "stroke-width": 1.6 }), { stroke: "var(--c0)" }));
  return picture;
}
