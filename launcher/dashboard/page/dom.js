// Elements and texts of the page. All text goes in as text: nothing here or elsewhere reads it as markup.

const SVG = "http://www.w3.org/2000/svg";

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** An HTML element. Children that are strings become text. */
export const el = (tag, attributes = {}, ...children) => filled(document.createElement(tag), attributes, children);

/** An SVG element. */
export const svg = (tag, attributes = {}, ...children) => filled(document.createElementNS(SVG, tag), attributes, children);

/** The element with styles that are set by name, which the Content-Security-Policy allows. */
export function styled(element, styles) {
  for (const [name, value] of Object.entries(styles)) element.style.setProperty(name, value);
  return element;
}

export const swatch = (colour) => styled(el("span", { class: "swatch" }), { background: colour });

/** A number in few characters. */
export function short(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1e9) return `${trimmed(value / 1e9)}G`;
  if (size >= 1e6) return `${trimmed(value / 1e6)}M`;
  if (size >= 1e4) return `${trimmed(value / 1e3)}k`;
  if (size !== 0 && size < 1e-3) return value.toExponential(1).replace("e-0", "e-");
  return trimmed(value);
}

const trimmed = (value) => String(Number(value.toPrecision(3)));

/** Seconds as h:mm:ss. */
export function clock(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const whole = Math.max(0, Math.round(seconds));
  const [h, m, s] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  return h ? `${h}:${String(m).padStart(2, "0")}:${String(s).padStart(2, "0")}` : `${m}:${String(s).padStart(2, "0")}`;
}

/** A table. Columns are [title, row => text or element, class]. */
export function table(columns, rows) {
  const head = el("tr", {}, columns.map(([title, , kind]) => el("th", { class: kind }, title)));
  const body = rows.map((row) => el("tr", {}, columns.map(([, of, kind]) => el("td", { class: kind }, of(row)))));
  return el("div", { class: "wide" }, el("table", {}, el("thead", {}, head), el("tbody", {}, body)));
}

/** What the server answers at a path, as JSON. Throws its words where it refuses. */
export async function ask(path, fields) {
  const reply = await fetch(`${path}?${new URLSearchParams(fields)}`);
  if (!reply.ok) throw new Error((await reply.text()) || `status ${reply.status}`);
  return reply.json();
}
