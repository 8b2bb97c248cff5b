// Curves of several runs over one another. They are read once; a run that still learns is read again while the page is looked at.
import { smoothed, thinned } from "./charts.js";

const MOST_DRAWN = 1200;
const AGAIN_MS = 5000;
const DASHES = ["solid", "6px,3px", "2px,3px", "8px,3px,2px,3px", "10px,4px", "4px,2px", "1px,3px", "8px,3px,2px,3px,2px,3px"];
const WORDS = { samples: "examples", step: "steps", seconds: "seconds" };
const MARKED = ["eval_loss"]; // measured now and then: every point is shown, and nothing is smoothed

const figure = document.getElementById("compare");
const runs = JSON.parse(document.getElementById("compare-runs").textContent);
const place = figure.querySelector("#plot");
const state = { curve: "eval_loss", axis: "samples", smoothing: 0.8, log: false };

async function read(run) {
  try {
    const response = await fetch(`${run.series}?points=${MOST_DRAWN}&curves=loss,grad_norm,learning_rate,eval_loss`, { headers: { Accept: "application/json" } });
    if (!response.ok) return;
    const answer = await response.json();
    run.moved = run.last !== answer.last_seq;
    run.last = answer.last_seq;
    run.curves = answer.curves;
  } catch { /* what is drawn already stays */ }
}

function trace(run, number) {
  const curve = run.curves?.[state.curve];
  if (!curve) return null;
  const marked = MARKED.includes(state.curve);
  const calm = marked ? curve.value : smoothed(curve.value, state.smoothing);
  const places = thinned(calm, 0, calm.length, MOST_DRAWN);
  const colour = bonsai.colour(`chart-${number + 1}`);
  return {
    type: "scatter", mode: marked ? "lines+markers" : "lines", name: run.name.replaceAll("&", "&amp;").replaceAll("<", "&lt;"), connectgaps: false,
    x: places.map((at) => curve[state.axis][at]), y: places.map((at) => calm[at]), hovertemplate: "%{y:.4g}<extra>%{fullData.name}</extra>",
    line: { color: colour, width: 2, dash: DASHES[number] }, marker: { color: colour, size: 6 },
  };
}

function draw() {
  const traces = runs.map(trace).filter(Boolean);
  figure.querySelector(".plot-empty").hidden = traces.length > 0;
  const ink = bonsai.colour("ink-3");
  const line = bonsai.colour("line");
  Plotly.react(place, traces, {
    autosize: true, showlegend: false, hovermode: "x unified", uirevision: `${state.axis}-${state.curve}-${state.log}`,
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    margin: { l: 46, r: 14, t: 12, b: 40, pad: 0 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: ink },
    hoverlabel: { bgcolor: bonsai.colour("raised"), bordercolor: bonsai.colour("edge"), font: { color: bonsai.colour("ink") } },
    xaxis: { gridcolor: "rgba(0,0,0,0)", zeroline: false, showline: true, linecolor: line, ticks: "outside", tickcolor: line, separatethousands: true,
      rangemode: "tozero", title: { text: WORDS[state.axis], standoff: 8 } },
    yaxis: { gridcolor: line, zeroline: false, fixedrange: true, nticks: 6, type: state.log ? "log" : "linear" },
  }, { responsive: true, displayModeBar: false });
}

function choose(name, value) {
  state[name] = value;
  for (const button of figure.querySelectorAll(`[data-${name}]`)) button.setAttribute("aria-pressed", String(button.dataset[name] === value));
  draw();
}

for (const name of ["curve", "axis"]) {
  for (const button of figure.querySelectorAll(`[data-${name}]`)) button.addEventListener("click", () => choose(name, button.dataset[name]));
}
figure.querySelector("#smoothing").addEventListener("input", (event) => { state.smoothing = Number(event.target.value) / 100; draw(); });
figure.querySelector("#log-scale").addEventListener("change", (event) => { state.log = event.target.checked; draw(); });
document.addEventListener("bonsai:theme", draw);

async function refresh() {
  await Promise.all(runs.map(read));
  if (runs.some((run) => run.moved)) draw();
}

await refresh();
if (!runs.some((run) => run.curves?.eval_loss)) choose("curve", "loss");
setInterval(() => { if (document.visibilityState === "visible") refresh(); }, AGAIN_MS);
