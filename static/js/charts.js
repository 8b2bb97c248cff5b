// Curves of a run: a store of everything that was received, and a chart that draws it. Knows nothing of where events come from.

const DRAW_EVERY_MS = 250;
const MOST_DRAWN = 2400;
export const MOST_KEPT = 24000;

function column() {
  return { step: [], samples: [], seconds: [], value: [] };
}

function push(target, step, samples, seconds, value) {
  target.step.push(step);
  target.samples.push(samples);
  target.seconds.push(seconds);
  target.value.push(value);
}

/** Every point of a run: loss, gradient norm with and without chance, learning rate, held-out and general loss over steps, examples and seconds; and what the watchers said. */
export class Curves {
  constructor() {
    this.clear();
  }

  clear() {
    this.loss = column();
    this.norm = column();
    this.rate = column();
    this.pull = column(); // the gradient norm without what is chance
    this.held = column();
    this.general = column(); // on general text, which the run was not taught: what it forgets
    this.signals = [];
    this.lastStep = -1;
    this.thinned = false;
  }

  get length() {
    return this.loss.step.length;
  }

  /** The thinned-out series of the server, which replaces everything. */
  read(series) {
    this.clear();
    const curves = series.curves;
    if (curves.loss) this.loss = copy(curves.loss);
    if (curves.grad_norm) this.norm = copy(curves.grad_norm);
    if (curves.learning_rate) this.rate = copy(curves.learning_rate);
    if (curves.grad_norm_corrected) this.pull = copy(curves.grad_norm_corrected);
    if (curves.eval_loss) this.held = copy(curves.eval_loss);
    if (curves.general_loss) this.general = copy(curves.general_loss);
    for (const signal of series.signals) this.addSignal(signal.step, signal);
    this.lastStep = this.loss.step.at(-1) ?? -1;
    this.thinned = series.num_steps > this.loss.step.length;
  }

  /** One numbered event; answers whether a curve has changed. */
  add(event) {
    if (event.kind === "metric") return this.addRows(event.data.rows);
    if (event.kind === "evaluation") return this.addMeasurement(event.step, event.data);
    if (event.kind === "signal") return this.addSignal(event.step, event.data);
    return false;
  }

  addRows(rows) {
    for (const row of rows) {
      if (row.step <= this.lastStep) continue; // repeated after the log lost its end
      this.lastStep = row.step;
      push(this.loss, row.step, row.samples, row.seconds, row.loss);
      push(this.norm, row.step, row.samples, row.seconds, row.grad_norm);
      push(this.rate, row.step, row.samples, row.seconds, row.learning_rate ?? null);
      push(this.pull, row.step, row.samples, row.seconds, row.grad_norm_corrected ?? null);
    }
    return true;
  }

  addMeasurement(step, data) {
    push(this.held, step, data.samples ?? 0, this.secondsAt(step), data.eval_loss ?? null);
    if (data.general_loss !== undefined) push(this.general, step, data.samples ?? 0, this.secondsAt(step), data.general_loss);
    return true;
  }

  addSignal(step, data) {
    const place = Math.max(0, this.loss.step.findLastIndex((known) => known <= step));
    const samples = data.samples ?? this.loss.samples[place] ?? 0;
    this.signals.push({ step, samples, seconds: this.secondsAt(step), action: data.action, message: data.message });
    return true;
  }

  secondsAt(step) {
    const place = this.loss.step.findLastIndex((known) => known <= step);
    return place < 0 ? 0 : this.loss.seconds[place];
  }
}

function copy(curve) {
  return { step: [...curve.step], samples: [...curve.samples], seconds: [...curve.seconds], value: [...curve.value] };
}

/** Exponential moving average, corrected for its start; a missing value stays a hole. It begins anew where the examples do: at another trial. */
export function smoothed(values, weight, samples = []) {
  if (!weight) return values;
  let mean = 0;
  let mass = 0;
  return values.map((value, place) => {
    if (samples[place] < samples[place - 1]) mean = mass = 0;
    if (value === null) return null;
    mean = weight * mean + (1 - weight) * value;
    mass = weight * mass + (1 - weight);
    return mean / mass;
  });
}

/** Which points to draw: of each bucket the least, the greatest and the last, so that every spike stays. */
export function thinned(values, from, to, most) {
  const num = to - from;
  if (num <= most) return Array.from({ length: num }, (_, place) => from + place);
  const buckets = Math.floor(most / 3);
  const chosen = [];
  for (let bucket = 0; bucket < buckets; bucket += 1) {
    const start = from + Math.floor((num * bucket) / buckets);
    const end = from + Math.floor((num * (bucket + 1)) / buckets);
    let low = start;
    let high = start;
    for (let place = start; place < end; place += 1) {
      if (values[place] < values[low]) low = place;
      if (values[place] > values[high]) high = place;
    }
    chosen.push(...new Set([Math.min(low, high), Math.max(low, high), end - 1]));
  }
  return chosen;
}

/** A range that leaves out the rarest of the values, one of a hundred at each end, with a little air; null when there are too few to say what is rare. */
export function usual(values) {
  const known = values.filter((value) => value !== null && Number.isFinite(value)).sort((a, b) => a - b);
  if (known.length < 20) return null;
  const low = known[Math.floor(known.length * 0.01)];
  const high = known[Math.ceil(known.length * 0.99) - 1];
  const air = 0.05 * (high - low || Math.abs(high) || 1);
  return [low >= 0 ? Math.max(0, low - air) : low - air, high + air];
}

/** How much a measured curve has moved since its first value; `sign` turns it round. */
function since(curve, sign) {
  const start = curve.value.find((value) => value !== null);
  return curve.value.map((value) => (value === null || start === undefined ? null : sign * (value - start)));
}

export function spoken(value) {
  if (value === null || value === undefined) return "–";
  if (Math.abs(value) >= 100) return Math.round(value).toLocaleString("en-US");
  if (value !== 0 && Math.abs(value) < 0.001) return value.toExponential(1);
  return value.toFixed(3);
}

function extremes(values) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return values.length ? [low, high] : [1, 1];
}

function lines(text, width = 46) {
  const rows = [""];
  for (const word of text.split(/\s+/)) {
    if (rows.at(-1) && rows.at(-1).length + word.length > width) rows.push("");
    rows[rows.length - 1] += (rows.at(-1) ? " " : "") + word;
  }
  // Plotly reads tags and entities in labels; what a watcher says may quote somebody's data.
  return rows.map((row) => row.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;")).join("<br>");
}

const SIGNAL_COLOURS = { note: "ink-3", save: "ink-3", warn: "amber-ink", stop: "red-ink" };
const SIGNAL_WORDS = { note: "Note", save: "Saved", warn: "Warning", stop: "Stopped" };

/** The chart of one run: loss and held-out loss above, gradient norm below, over one axis. */
export class RunChart {
  constructor(place, curves, { window, totalSteps, ended }) {
    Object.assign(this, { place, curves, window, totalSteps, ended });
    this.axis = "samples";
    this.smoothing = 0.8;
    this.log = false;
    this.usual = false; // leave rare values out of sight
    this.below = "norm"; // what the lower chart shows: norm, rate or kept
    this.zoom = 0; // raised to forget what was zoomed
    this.drawn = 0;
    this.timer = null;
    this.zoomed = false;
    this.detail = null; // every step of the stretch on show, or as many as fit
    this.onread = () => {};
    this.onzoom = () => {};
    this.onlook = () => {};
    document.addEventListener("bonsai:theme", () => this.request(true));
  }

  set(change) {
    Object.assign(this, change);
    if (change.axis) this.whole();
    else this.request(true);
  }

  /** Forget what was zoomed and show everything. */
  whole() {
    this.zoom += 1;
    this.detail = null;
    this.showZoom(false);
    this.request(true);
  }

  showZoom(zoomed) {
    this.zoomed = zoomed;
    this.onzoom(zoomed);
  }

  /** Somebody looks at a stretch: show what is here at once, and ask for more where steps were left out and none will follow. */
  look() {
    const { loss, thinned: some } = this.curves;
    const { start, end } = this.stretch();
    this.showZoom(true);
    if (some && (this.ended || end < loss[this.axis].at(-1))) {
      this.onlook({ axis: this.axis, start, end });
    } else {
      this.detail = null;
      this.request(true);
    }
  }

  /** The stretch on show, in units of the axis. */
  stretch() {
    const size = this.unit().size;
    const [start, end] = this.place.layout.xaxis.range;
    return { start: start * size, end: end * size };
  }

  /** More of a stretch has come; it is drawn if that is still what somebody looks at. */
  showDetail({ axis, start, end }, series) {
    const now = this.stretch();
    if (!this.zoomed || axis !== this.axis || now.start !== start || now.end !== end) return;
    const { loss, grad_norm: norm, learning_rate: rate, grad_norm_corrected: pull } = series.curves;
    if (!loss) return;
    this.detail = { loss, norm: norm ?? column(), rate: rate ?? column(), pull: pull ?? column() };
    this.request(true);
  }

  /** The curves to draw: loss and gradient norm in detail where it is known. */
  shown() {
    return { ...this.curves, ...this.detail };
  }

  /** Draw soon, and never more often than four times a second. */
  request(now = false) {
    if (now) {
      clearTimeout(this.timer);
      this.timer = null;
      this.draw();
    } else if (this.timer === null) {
      this.timer = setTimeout(() => { this.timer = null; this.draw(); }, Math.max(0, this.drawn + DRAW_EVERY_MS - performance.now()));
    }
  }

  draw() {
    if (!this.curves.length && !this.curves.held.step.length) return;
    this.drawn = performance.now();
    const first = this.place.querySelector(".js-plotly-plot, .main-svg") === null;
    if (first) this.place.replaceChildren();
    const drawing = Plotly.react(this.place, this.traces(), this.layout(), { responsive: true, displayModeBar: false, doubleClick: false, showTips: false });
    if (first) drawing.then(() => this.listen());
  }

  listen() {
    this.place.on("plotly_hover", (event) => {
      this.onread(this.valuesAt(event.points[0].x));
    });
    this.place.on("plotly_unhover", () => this.onread(null));
    this.place.on("plotly_relayout", (change) => { if ("xaxis.range[0]" in change || "xaxis.range" in change) this.look(); });
    this.place.on("plotly_doubleclick", () => this.whole());
  }

  /** What the readouts say for a place on the axis. */
  valuesAt(x) {
    const scaled = x * this.unit().size;
    const at = (curve) => {
      const axis = curve[this.axis];
      let best = -1;
      for (let place = 0; place < axis.length; place += 1) {
        if (best < 0 || Math.abs(axis[place] - scaled) < Math.abs(axis[best] - scaled)) best = place;
      }
      return best < 0 ? null : curve.value[best];
    };
    const { loss, held, norm } = this.shown();
    return { x: `${spokenAxis(x)} ${this.unit().word}`, loss: at(loss), held: at(held), norm: at(norm) };
  }

  unit() {
    if (this.axis === "step") return { size: 1, word: "steps" };
    if (this.axis === "samples") return { size: 1, word: "examples" };
    const seconds = Math.max(this.curves.loss.seconds.at(-1) ?? 0, 1);
    if (seconds > 7200) return { size: 3600, word: "hours" };
    return seconds > 180 ? { size: 60, word: "minutes" } : { size: 1, word: "seconds" };
  }

  /** Where the axis ends: the plan, opened in five stages, so that a young curve is large and the axis still rests. */
  end() {
    const { loss } = this.curves;
    const last = loss[this.axis].at(-1) ?? 1;
    const done = loss.step.at(-1) ?? 1;
    if (this.ended || !this.totalSteps || done >= this.totalSteps) return last;
    const plan = (last / Math.max(done, 1)) * this.totalSteps;
    const stage = [0.2, 0.4, 0.6, 0.8].find((share) => done <= 0.85 * share * this.totalSteps) ?? 1;
    return plan * stage;
  }

  planned() {
    const { loss } = this.curves;
    const done = loss.step.at(-1);
    return done ? (loss[this.axis].at(-1) / done) * Math.max(this.totalSteps, done) : 0;
  }

  range(curve) {
    const shown = this.place.layout?.xaxis?.range;
    const axis = curve[this.axis];
    if (!shown || !this.zoomed) return [0, axis.length];
    const size = this.unit().size;
    const from = axis.findIndex((value) => value / size >= shown[0]);
    const to = axis.findLastIndex((value) => value / size <= shown[1]);
    return from < 0 || to < from ? [0, axis.length] : [Math.max(0, from - 1), Math.min(axis.length, to + 2)];
  }

  /** What a line goes through: places in the curve, -1 for a gap, and where they are drawn. */
  points(curve, values) {
    const size = this.unit().size;
    const places = [];
    for (const place of thinned(values, ...this.range(curve), MOST_DRAWN)) {
      const before = places.at(-1);
      if (before !== undefined && curve.samples[place] < curve.samples[before]) places.push(-1); // another trial of a search: no line leads there
      places.push(place);
    }
    const at = (column, unit) => places.map((place) => (place < 0 || column[place] === null ? null : column[place] / unit));
    return { places, x: at(curve[this.axis], size), y: at(values, 1) };
  }

  line(curve, values, style) {
    const { x, y } = this.points(curve, values);
    return { type: "scatter", mode: "lines", hoverinfo: "none", connectgaps: false, x, y, ...style };
  }

  traces() {
    const { loss, held, signals } = this.shown();
    const colour = (token) => bonsai.colour(token);
    const green = colour("chart-1");
    const blue = colour("chart-2");
    const pink = colour("chart-4");
    const soft = this.smoothing > 0 ? 0.3 : 1;
    const size = this.unit().size;
    const raw = (hue) => ({ line: { color: hue, width: this.smoothing > 0 ? 1 : 1.75 }, opacity: soft });
    const traces = [this.line(loss, loss.value, raw(green)), ...this.lower(raw(pink), pink)];
    if (this.smoothing > 0) {
      const calm = smoothed(loss.value, this.smoothing, loss.samples);
      traces.push(this.line(loss, calm, { line: { color: green, width: 2.5, shape: "linear" } }));
      if (!this.ended && !this.detail && calm.length) {
        traces.push({ type: "scatter", mode: "markers", hoverinfo: "none", cliponaxis: false, x: [loss[this.axis].at(-1) / size], y: [calm.at(-1)],
          marker: { color: green, size: 9, line: { color: colour("surface"), width: 2 } } });
      }
    }
    const best = held.value.length < 2 ? -1 : held.value.reduce((least, value, place) => (value !== null && (least < 0 || value < held.value[least]) ? place : least), -1);
    const { places } = this.points(held, held.value);
    const marked = (chosen, others) => places.map((place) => (place === best ? chosen : others));
    traces.push({
      ...this.line(held, held.value, { mode: "lines+markers", cliponaxis: false, line: { color: blue, width: 2, dash: "6px,3px" } }),
      marker: { color: marked(blue, colour("surface")), size: marked(11, 7), opacity: 1, symbol: marked("diamond", "circle"), line: { color: blue, width: 2 } },
    });
    traces.push({
      type: "scatter", mode: "markers", yaxis: "y3", cliponaxis: false, hoverinfo: "skip",
      x: signals.map((signal) => signal[this.axis] / size), y: signals.map(() => 0.985),
      marker: { symbol: "triangle-right", size: 13, color: signals.map((signal) => colour(SIGNAL_COLOURS[signal.action] ?? "ink-3")) },
    });
    return traces;
  }

  /** The lines of the lower chart. */
  lower(raw, pink) {
    const { norm, rate, pull, held, general } = this.shown();
    if (this.below === "rate") return [this.line(rate, rate.value, { line: { color: pink, width: 1.75, dash: "5px,2px" }, yaxis: "y2" })];
    if (this.below === "kept") {
      const marked = (colour, dash) => ({ mode: "lines+markers", yaxis: "y2", line: { color: colour, width: 2, dash }, marker: { color: colour, size: 6 } });
      return [
        this.line(held, since(held, -1), marked(bonsai.colour("chart-2"), "6px,3px")),
        this.line(general, since(general, 1), marked(bonsai.colour("chart-3"), "solid")),
      ];
    }
    const lines = [this.line(norm, norm.value, { ...raw, yaxis: "y2" })];
    if (this.smoothing > 0) lines.push(this.line(norm, smoothed(norm.value, this.smoothing, norm.samples), { line: { color: pink, width: 1.75, dash: "5px,2px" }, yaxis: "y2" }));
    if (this.knowsPull()) lines.push(this.line(pull, pull.value, { line: { color: bonsai.colour("chart-3"), width: 1.75 }, yaxis: "y2" }));
    return lines;
  }

  /** What the lower chart is called. */
  title() {
    if (this.below === "rate") return "Learning rate";
    if (this.below !== "kept") return this.knowsPull() ? `Gradient norm · <span style="color:${bonsai.colour("chart-3")}">without chance</span>` : "Gradient norm";
    return this.curves.general.value.length ? "Learned (dashed), forgotten (solid)" : "Learned since the start (dashed)";
  }

  knowsPull() {
    return this.curves.pull.value.some((value) => value !== null);
  }

  /** A vertical axis of the lower chart: from zero, except where changes may be negative. */
  lowerAxis() {
    const curve = { norm: this.curves.norm, rate: this.curves.rate }[this.below];
    if (!curve) return { zeroline: true, zerolinecolor: bonsai.colour("edge") };
    const range = this.usual && !this.log ? usual(curve.value) : null;
    if (range) return { range };
    return { type: this.log ? "log" : "linear", ...(this.log ? this.ticks(curve) : { rangemode: "tozero" }) };
  }

  /** The range of the upper chart when rare values are left out of sight. */
  upperAxis() {
    const { loss, held } = this.curves;
    const range = this.usual ? usual([...loss.value, ...held.value]) : null;
    if (range) return this.log ? { range: range.map((value) => Math.log10(Math.max(value, 1e-12))) } : { range };
    return this.log ? {} : { rangemode: "tozero" };
  }

  /** The chart as a picture file. */
  save(name) {
    const layout = { ...this.place.layout, paper_bgcolor: bonsai.colour("surface") }; // on the page the card behind it is its ground
    return Plotly.downloadImage({ data: this.place.data, layout }, { format: "png", width: 1280, height: 720, scale: 2, filename: name });
  }

  /** An empty label over each flag, which shows its sentence to whoever points at it. */
  notes() {
    const label = { bgcolor: bonsai.colour("raised"), bordercolor: bonsai.colour("edge"),
      font: { color: bonsai.colour("ink"), size: 13, family: getComputedStyle(document.body).fontFamily } };
    return this.curves.signals.map((signal) => ({
      text: "&nbsp;", width: 18, height: 18, showarrow: false, xref: "x", yref: "y3", x: signal[this.axis] / this.unit().size, y: 0.985, captureevents: true,
      hovertext: `<b>${SIGNAL_WORDS[signal.action] ?? "Note"}</b><br>${lines(signal.message)}`, hoverlabel: label,
    }));
  }

  /** The ticks of a logarithmic axis: 1, 2 and 5 of every power of ten that the values touch. */
  ticks(...curves) {
    const values = curves.flatMap((curve) => curve.value).filter((value) => value > 0);
    const low = Math.floor(Math.log10(Math.min(...extremes(values))));
    const high = Math.ceil(Math.log10(Math.max(...extremes(values))));
    const powers = Array.from({ length: Math.max(1, high - low + 1) }, (_, place) => low + place);
    const digits = powers.length > 4 ? [1] : [1, 2, 5];
    const found = powers.flatMap((power) => digits.map((digit) => Number(`${digit}e${power}`)));
    return { tickmode: "array", tickvals: found, ticktext: found.map((value) => String(value)) };
  }

  layout() {
    const colour = (token) => bonsai.colour(token);
    const narrow = this.place.clientWidth < 520;
    const unit = this.unit();
    const grid = { gridcolor: colour("line"), zeroline: false, fixedrange: true, nticks: 5, tickfont: { color: colour("ink-3") }, ticklabelstandoff: 4 };
    const pole = (signal) => ({
      type: "line", xref: "x", yref: "paper", x0: signal[this.axis] / unit.size, x1: signal[this.axis] / unit.size, y0: 0, y1: 1, layer: "below",
      line: { color: colour(SIGNAL_COLOURS[signal.action] ?? "ink-3"), width: 1, dash: "2px,3px" }, opacity: 0.75,
    });
    const edge = (this.planned() * this.window) / unit.size;
    const band = { type: "rect", xref: "x", yref: "paper", x0: 0, x1: edge, y0: 0, y1: 1, layer: "below", line: { width: 0 }, fillcolor: colour("ink"), opacity: 0.045 };
    const label = (text, y) => ({ text, x: 0, xref: "paper", y, yref: "paper", xanchor: "left", yanchor: "bottom", showarrow: false, font: { color: colour("ink-3"), size: 12 } });
    return {
      autosize: true, showlegend: false, uirevision: `${this.axis}-${this.zoom}`, hovermode: "x", hoverdistance: -1, spikedistance: -1,
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", selectdirection: "h",
      margin: { l: narrow ? 38 : 46, r: 14, t: 22, b: 40, pad: 0 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("ink-3") },
      xaxis: { range: [0, this.end() / unit.size], anchor: "y2", gridcolor: "rgba(0,0,0,0)", zeroline: false, nticks: narrow ? 4 : 8, ticks: "outside", ticklen: 4,
        tickcolor: colour("line"), linecolor: colour("line"), showline: true, separatethousands: true, rangemode: "nonnegative",
        title: { text: unit.word, font: { color: colour("ink-3"), size: 12 }, standoff: 8 },
        showspikes: true, spikemode: "across", spikesnap: "hovered data", spikethickness: 1, spikedash: "solid", spikecolor: colour("edge") },
      yaxis: { ...grid, domain: [0.37, 1], type: this.log ? "log" : "linear", ...(this.log ? this.ticks(this.curves.loss, this.curves.held) : {}), ...this.upperAxis() },
      yaxis2: { ...grid, domain: [0, 0.27], nticks: 3, ...this.lowerAxis() },
      yaxis3: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true },
      annotations: [label("Loss", 1.005), label(this.title(), 0.275), ...this.notes()],
      shapes: edge > 0 ? [band, ...this.curves.signals.map(pole)] : this.curves.signals.map(pole),
    };
  }
}

function spokenAxis(x) {
  return x >= 100 ? Math.round(x).toLocaleString("en-US") : x.toFixed(x >= 10 || Number.isInteger(x) ? 0 : 1);
}
