// New run: keeps advice, estimate and faults true while a person types, without redrawing what they type into.
"use strict";

let running = null;

function wizardForm() {
  return document.querySelector("#wizard form.steps");
}

// Asks the studio what it makes of the form as it stands, and redraws only what follows from it.
async function stay(go) {
  const form = wizardForm();
  if (running) running.abort();
  running = new AbortController();
  const body = new FormData(form);
  body.set("go", go);
  form.setAttribute("aria-busy", "true");
  try {
    const answer = await fetch(form.action, { method: "POST", body, headers: { "HX-Request": "true" }, signal: running.signal });
    if (!answer.ok) return;
    redraw(new DOMParser().parseFromString(await answer.text(), "text/html"), go);
  } catch (error) {
    if (error.name !== "AbortError") bonsai.announce("The studio does not answer. What you typed is kept in this page.");
  } finally {
    form.removeAttribute("aria-busy");
  }
}

function redraw(fresh, go) {
  const active = document.activeElement;
  for (const dial of fresh.querySelectorAll("[data-dial]")) {
    const mine = document.getElementById(dial.id);
    const asked = go.startsWith("put-back:") && dial.querySelector(`[name="${CSS.escape(go.slice(9))}"]`);
    if (!mine || (mine.contains(active) && !asked)) continue;
    mine.classList.toggle("wrong", dial.classList.contains("wrong"));
    mine.classList.toggle("mine", dial.classList.contains("mine"));
    if (valueOf(mine) !== valueOf(dial) || asked) {
      mine.replaceWith(dial);
      if (asked) dial.querySelector("input:not([type=hidden]), select, textarea").focus();
    }
  }
  for (const part of fresh.querySelectorAll("[data-live]")) {
    const mine = document.getElementById(part.id);
    if (!mine || mine.isEqualNode(part)) continue;
    const focused = mine.contains(active) ? active.closest("[name]") : null;
    mine.replaceWith(part);
    if (focused) {
      const again = part.querySelector(`[name="${CSS.escape(focused.name)}"][value="${CSS.escape(focused.value)}"]`);
      if (again) again.focus();
    }
  }
}

function valueOf(dial) {
  return [...dial.querySelectorAll("input:not([type=hidden]), select, textarea")]
    .map((field) => (field.type === "checkbox" ? String(field.checked) : field.value)).join("\n");
}

document.addEventListener("change", (event) => {
  if (!event.target.closest("#wizard form.steps")) return;
  if (event.target.closest("[data-dial], [data-stay], .extras") || event.target.name === "name") stay("stay");
});

// A click on a card answers the question; arrow keys only move the choice, and Enter goes on.
let advanced = 0;
document.addEventListener("click", (event) => {
  const card = event.target.closest("#wizard [data-advance] label.choice");
  if (!card || event.detail === 0 || event.target.closest("a") || event.timeStamp - advanced < 500) return;
  advanced = event.timeStamp;
  setTimeout(() => wizardForm().querySelector('.step.open .actions [value="next"]').click()); // after the card is ticked
});

document.addEventListener("submit", (event) => {
  const go = event.submitter && event.submitter.name === "go" ? event.submitter.value : "";
  if (event.target !== wizardForm() || !go.startsWith("put-back:")) return;
  event.preventDefault();
  event.stopPropagation();
  stay(go);
}, true);

let open = [];
document.addEventListener("htmx:beforeSwap", () => {
  open = [...document.querySelectorAll("#wizard details[data-keep][open]")].map((fold) => fold.id);
});
document.addEventListener("htmx:afterSettle", () => { // only now does the new form answer to htmx
  const wizard = document.getElementById("wizard");
  if (!wizard || !wizard.dataset.focus) return; // some other part of the page was redrawn
  for (const id of open) document.getElementById(id)?.setAttribute("open", "");
  const faults = wizard.querySelector(".fault-list");
  const target = faults || document.getElementById(wizard.dataset.focus);
  delete wizard.dataset.focus;
  target.setAttribute("tabindex", "-1");
  target.focus({ preventScroll: true });
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  target.scrollIntoView({ block: faults ? "center" : "nearest", behavior: still ? "auto" : "smooth" });
});
