// The page of a run while it runs: events arrive by socket, or by asking every two seconds; curves and sentences follow.
import { Curves, MOST_KEPT, RunChart, spoken } from "./charts.js";

const POLL_MS = 2000;
const REFRESH_MS = 1200;
const SILENCE_MS = 10000;
const PATIENCE_MS = 20000; // a line that fell silent would never answer
const LAST_WORDS = ["succeeded", "failed", "cancelled"];
const DRAWN = "curves=loss,grad_norm,learning_rate,grad_norm_corrected,eval_loss,general_loss";
const STRETCH_POINTS = 1200; // more than a chart has pixels
const CLOSED_FOR_GOOD = [4403, 4404];

const request = (address, kind) => fetch(address, { headers: { Accept: kind }, signal: AbortSignal.timeout(PATIENCE_MS) });

/** Numbered events without a hole. Goes on from the last number it saw, whatever happens to the connection. */
class Feed {
  constructor({ socket, events, series, onEvents, onSeries, onState }) {
    Object.assign(this, { socket, events, series, onEvents, onSeries, onState });
    this.last = 0;
    this.tries = 0;
    this.link = null;
    this.polling = null;
    this.asking = null;
    this.syncing = false;
    this.stopped = false;
    this.finishing = null;
    this.heard = 0;
    addEventListener("online", () => this.retry());
    document.addEventListener("visibilitychange", () => { if (document.visibilityState === "visible") this.retry(); });
  }

  async start() {
    this.poll(); // until the socket is open
    await this.resync();
    this.connect();
    this.watch = setInterval(() => {
      // A network that vanished without a word leaves the socket open: after a silence it is worth asking.
      if (this.link && performance.now() - this.heard > SILENCE_MS) this.ask();
    }, SILENCE_MS / 2);
  }

  stop() {
    if (this.stopped) return;
    this.stopped = true;
    clearInterval(this.polling);
    clearInterval(this.watch);
    clearTimeout(this.timer);
    this.link?.close();
    this.onState("over");
  }

  /** The run is over: hear the rest of it, however often that fails, and stop. */
  finish() {
    this.finishing ??= this.insist(async () => {
      await this.asking; // began before the end was known
      return this.ask();
    });
    return this.finishing;
  }

  /** Try until it is done, or nobody listens any more; then there is nothing left to hear. */
  async insist(task) {
    while (!this.stopped && !await task()) await new Promise((go) => { setTimeout(go, POLL_MS); });
    this.stop();
  }

  /** How the line is doing; after the end there is nothing more to say about it. */
  say(state) {
    if (!this.stopped) this.onState(state);
  }

  connect() {
    if (this.stopped || this.link) return;
    const address = new URL(this.socket, location.href);
    address.protocol = address.protocol.replace("http", "ws");
    address.searchParams.set("after", this.last);
    const link = new WebSocket(address);
    this.link = link;
    link.onopen = () => { this.tries = 0; this.rest(); this.say("live"); };
    link.onmessage = (message) => { this.heard = performance.now(); this.hear(JSON.parse(message.data)); };
    link.onclose = (event) => {
      this.link = null;
      if (this.stopped) return;
      if (CLOSED_FOR_GOOD.includes(event.code)) { this.stop(); this.onState("gone"); return; }
      this.poll();
      const wait = Math.min(15000, 500 * 2 ** this.tries) * (0.75 + Math.random() / 2);
      this.tries += 1;
      this.timer = setTimeout(() => this.connect(), wait);
    };
  }

  /** The tab is back, or the network: do not wait for the next try. */
  retry() {
    if (this.stopped || this.link) return;
    clearTimeout(this.timer);
    this.tries = 0;
    this.connect();
  }

  poll() {
    if (this.polling || this.stopped) return;
    this.polling = setInterval(() => this.ask(), POLL_MS);
    this.say("polling");
  }

  rest() {
    clearInterval(this.polling);
    this.polling = null;
  }

  hear(message) {
    if (message.type === "resync") this.resync();
    else this.take(message.events);
  }

  /** Take events in order; a gap is closed by asking for what is missing. */
  take(events) {
    if (this.syncing) return; // asked for again once it is known where to go on
    const fresh = events.filter((event) => event.seq > this.last);
    const row = fresh.findIndex((event, place) => event.seq !== this.last + 1 + place);
    const whole = row < 0 ? fresh : fresh.slice(0, row);
    if (whole.length) {
      this.last = whole.at(-1).seq;
      this.onEvents(whole);
    }
    if (row >= 0) this.ask();
  }

  /** Ask for everything after the last number, once at a time. Answers whether everything has come. */
  ask() {
    if (this.syncing) return null;
    this.asking ??= this.askOn().finally(() => { this.asking = null; });
    return this.asking;
  }

  async askOn() {
    try {
      for (;;) {
        const answer = await this.get(`${this.events}?after=${this.last}&limit=1000`);
        if (!answer) return false;
        if (answer.resync) return await this.resync();
        const before = this.last;
        this.take(answer.events);
        if (this.link === null) this.say("polling");
        if (this.last >= answer.last_seq) return true;
        if (this.last === before) return false;
      }
    } catch {
      this.say("offline"); // the next look tries again
      return false;
    }
  }

  /** Read the thinned-out curves anew and go on from where they end. Answers whether they have come. */
  async resync() {
    if (this.syncing) return false;
    this.syncing = true;
    try {
      const series = await this.get(`${this.series}?${DRAWN}`);
      if (!series) return false;
      this.last = series.last_seq;
      this.onSeries(series);
      return true;
    } catch {
      this.say("offline");
      return false;
    } finally {
      this.syncing = false;
    }
  }

  /** The curves of one stretch; null when there is no answer, for what is drawn already will do. */
  async detail({ axis, start, end }) {
    try {
      return await this.get(`${this.series}?${DRAWN}&points=${STRETCH_POINTS}&axis=${axis}&start=${start}&end=${end}`);
    } catch {
      return null;
    }
  }

  async get(address) {
    const response = await request(address, "application/json");
    if (response.ok) return response.json();
    if ([401, 403, 404].includes(response.status)) { this.stop(); this.onState(response.status === 401 ? "signed-out" : "gone"); return null; }
    throw new Error(`The studio answered ${response.status}.`);
  }
}

/** The sentences of the page. The server writes them, so that there is one truth; only what has changed is replaced. */
class Parts {
  constructor(root, address, onStatus) {
    Object.assign(this, { root, address, onStatus });
    this.timer = null;
    this.loading = false;
    this.again = false; // something happened while an answer was under way, which may not know of it
    this.shown = 0;
    this.milestone = root.dataset.milestone;
    document.addEventListener("visibilitychange", () => { if (document.visibilityState === "visible" && this.late) this.refresh(); });
  }

  refresh() {
    this.late = document.visibilityState !== "visible";
    this.again = this.loading;
    if (this.late || this.timer !== null) return;
    this.timer = setTimeout(() => this.load(), Math.max(0, this.shown + REFRESH_MS - performance.now()));
  }

  async load() {
    this.loading = true;
    this.again = false;
    let html = null;
    try {
      const response = await request(this.address, "text/html");
      if (response.ok && !response.redirected) html = await response.text();
      this.again ||= response.status >= 500;
    } catch {
      this.again = true; // the line beside the curve says that the studio does not answer; what happened is still to be told
    }
    this.shown = performance.now();
    this.timer = null;
    this.loading = false;
    if (this.again) this.refresh();
    if (html !== null) this.show(html);
  }

  show(html) {
    const fresh = new DOMParser().parseFromString(html, "text/html");
    const state = fresh.querySelector("[data-run-state]").dataset;
    document.title = state.title;
    for (const part of fresh.querySelectorAll("[data-part]")) {
      const old = this.root.querySelector(`[data-part="${part.dataset.part}"]`);
      if (!old || old.dataset.key === part.dataset.key) continue;
      const focused = old.contains(document.activeElement) ? document.activeElement.id : "";
      if (old.querySelector("dialog[open]") && old.dataset.steady === part.dataset.steady) continue; // somebody is reading it
      const open = [...old.querySelectorAll("details[open][id]")].map((fold) => fold.id);
      old.replaceWith(part);
      for (const id of open) document.getElementById(id)?.setAttribute("open", "");
      if (focused) document.getElementById(focused)?.focus();
    }
    if (state.milestone !== this.milestone) {
      this.milestone = state.milestone;
      bonsai.announce(state.says);
    }
    this.root.dataset.status = state.status;
    this.onStatus(state.status);
  }
}

const CONNECTION = {
  live: ["live", "Live"],
  polling: ["slow", "Looking every two seconds"],
  offline: ["off", "The studio does not answer. The run goes on without this page; trying again."],
  over: ["over", ""],
  gone: ["off", "This run can no longer be followed here. Reload the page to see why."],
  "signed-out": ["off", "You were signed out. Reload the page to sign in again; the run goes on."],
};

function showConnection(state) {
  const line = document.getElementById("connection");
  const [kind, text] = CONNECTION[state];
  line.dataset.kind = kind;
  line.querySelector("span").textContent = text;
}

function showProgress(root, { done_steps: done, total_steps: total }) {
  const bar = root.querySelector("progress");
  if (!bar || !total) return;
  bar.max = total;
  bar.value = done;
  const percent = done >= total ? 100 : Math.floor((100 * done) / total);
  const word = root.querySelector("[data-percent]");
  if (word) word.textContent = `${percent} %`;
  const line = root.querySelector(".lede");
  line.textContent = line.textContent.replace(/^\d+ %/, `${percent} %`);
  document.title = document.title.replace(/^\d+ %/, `${percent} %`);
}

function showReadouts(figure, values) {
  for (const [name, value] of Object.entries({ loss: values.loss, held: values.held, norm: values.norm })) {
    figure.querySelector(`[data-readout="${name}"]`).textContent = spoken(value);
  }
  figure.querySelector("[data-readout-at]").textContent = values.x ? `at ${values.x}` : "";
}

function newest(curves) {
  return { loss: curves.loss.value.at(-1), held: curves.held.value.at(-1), norm: curves.norm.value.at(-1), x: "" };
}

function controls(figure, chart) {
  const recall = (key, otherwise) => bonsai.recall(`curve-${key}`) ?? otherwise;
  const choose = (axis) => {
    for (const button of figure.querySelectorAll("[data-axis]")) button.setAttribute("aria-pressed", String(button.dataset.axis === axis));
    chart.set({ axis });
  };
  for (const button of figure.querySelectorAll("[data-axis]")) {
    button.addEventListener("click", () => { bonsai.remember("curve-axis", button.dataset.axis); choose(button.dataset.axis); });
  }
  const slider = figure.querySelector("#smoothing");
  const smooth = () => chart.set({ smoothing: Number(slider.value) / 100 });
  slider.value = recall("smoothing", slider.value);
  slider.addEventListener("input", () => { bonsai.remember("curve-smoothing", slider.value); smooth(); });
  const log = figure.querySelector("#log-scale");
  log.checked = recall("log", "no") === "yes";
  log.addEventListener("change", () => { bonsai.remember("curve-log", log.checked ? "yes" : "no"); chart.set({ log: log.checked }); });
  const usual = figure.querySelector("#usual-values");
  usual.addEventListener("change", () => chart.set({ usual: usual.checked }));
  for (const button of figure.querySelectorAll("[data-below]")) {
    button.addEventListener("click", () => {
      for (const other of figure.querySelectorAll("[data-below]")) other.setAttribute("aria-pressed", String(other === button));
      chart.set({ below: button.dataset.below });
    });
  }
  figure.querySelector("[data-save]").addEventListener("click", () => chart.save(document.title.replace(/[^\w]+/g, "-").toLowerCase()));
  const whole = figure.querySelector("[data-whole]");
  whole.addEventListener("click", () => chart.whole());
  chart.onzoom = (zoomed) => { whole.hidden = !zoomed; };
  Object.assign(chart, { smoothing: Number(slider.value) / 100, log: log.checked });
  const axis = recall("axis", "samples");
  choose(figure.querySelector(`[data-axis="${CSS.escape(axis)}"]`) ? axis : "samples");
}

function begin(root) {
  const figure = root.querySelector(".curve");
  const { socket, events, series, parts, window: early, total, status } = root.dataset;
  const curves = new Curves();
  const over = LAST_WORDS.includes(status);
  const chart = new RunChart(root.querySelector("#plot"), curves, { window: Number(early), totalSteps: Number(total), ended: over });
  const ended = () => {
    if (chart.ended) return;
    chart.ended = true;
    feed.stop();
    chart.request();
  };
  // The end may also be among what came with the curves, as no event of its own.
  const sentences = new Parts(root, parts, (now) => { if (LAST_WORDS.includes(now)) feed.finish().then(ended); });
  let hovered = false;
  chart.onread = (values) => { hovered = values !== null; showReadouts(figure, values ?? newest(curves)); };
  controls(figure, chart);

  const drawn = () => {
    if (!curves.length && !curves.held.step.length) return;
    figure.dataset.empty = "no";
    if (!hovered) showReadouts(figure, newest(curves));
    chart.request();
  };
  const feed = new Feed({
    socket, events, series, onState: showConnection,
    onSeries(answer) {
      curves.read(answer);
      drawn();
      if (!over) sentences.refresh(); // what happened before these curves is in them, and no event will tell of it
    },
    onEvents(batch) {
      let changed = false;
      for (const event of batch) {
        changed = curves.add(event) || changed;
        if (event.kind === "child" && event.data.total_steps) chart.totalSteps = event.data.total_steps;
        if (event.kind === "progress") showProgress(root, event.data);
        if (event.kind !== "metric") sentences.refresh();
        if (event.kind === "status" && LAST_WORDS.includes(event.data.to)) ended();
      }
      if (changed) drawn();
      if (curves.length > MOST_KEPT) feed.resync(); // a long run: let the server thin it out
    },
  });
  chart.onlook = async (stretch) => {
    const more = await feed.detail(stretch);
    if (more) chart.showDetail(stretch, more);
  };
  Object.assign(root, { curves, feed, chart });
  if (over) feed.insist(() => feed.resync());
  else feed.start();
}

const root = document.getElementById("run");
if (root) begin(root);
