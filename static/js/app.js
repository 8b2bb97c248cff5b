// What every page can do beyond plain links and forms. Everything here is an addition: the pages work without it.
"use strict";

const bonsai = {
  // Says a sentence to screen readers.
  announce(sentence) {
    const live = document.getElementById("live");
    live.textContent = "";
    requestAnimationFrame(() => { live.textContent = sentence; });
  },

  // A colour token as "rgb(…)", for libraries that do not read OKLCH. Call again after the event "bonsai:theme".
  colour(token) {
    const probe = document.createElement("canvas");
    probe.width = probe.height = 1;
    const reader = document.createElement("span");
    reader.style.color = `var(--${token})`;
    document.body.append(reader);
    const pen = probe.getContext("2d", { willReadFrequently: true });
    pen.fillStyle = getComputedStyle(reader).color;
    reader.remove();
    pen.fillRect(0, 0, 1, 1);
    const [red, green, blue] = pen.getImageData(0, 0, 1, 1).data;
    return `rgb(${red}, ${green}, ${blue})`;
  },

  remember(key, value) {
    try {
      if (value === null) localStorage.removeItem(key);
      else localStorage.setItem(key, value);
    } catch { /* Without storage the choice lasts until the page is left. */ }
  },

  recall(key) {
    try { return localStorage.getItem(key); } catch { return null; }
  },
};
window.bonsai = bonsai;

// --- Theme -----------------------------------------------------------------------------------------------------------
function showTheme() {
  const chosen = document.documentElement.dataset.theme || "system";
  for (const button of document.querySelectorAll("[data-theme-choice]")) {
    button.setAttribute("aria-pressed", String(button.dataset.themeChoice === chosen));
  }
  document.dispatchEvent(new CustomEvent("bonsai:theme"));
}

function chooseTheme(choice) {
  if (choice === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = choice;
  bonsai.remember("theme", choice === "system" ? null : choice);
  showTheme();
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);

// --- Keyboard --------------------------------------------------------------------------------------------------------
let afterG = 0;

function typing(target) {
  // A dialog that has just been closed keeps the focus until the next frame; the key pressed then is meant for the page.
  return target.closest("input, textarea, select, [contenteditable], dialog[open]") !== null;
}

function go(address) {
  location.href = address;
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
  if (typing(event.target) || bonsai.recall("shortcuts") === "off") return;
  const waiting = Date.now() - afterG < 1200;
  afterG = 0;
  if (waiting) {
    const place = document.querySelector(`[data-key="${CSS.escape(event.key)}"]`);
    if (place) { event.preventDefault(); go(place.href); }
    return;
  }
  if (event.key === "g") afterG = Date.now();
  else if (event.key === "n") go(document.querySelector("[data-new]").href);
  else if (event.key === "/") {
    event.preventDefault();
    document.getElementById("search").focus();
  } else if (event.key === "?") document.getElementById("shortcuts").showModal();
});

// --- Clicks ----------------------------------------------------------------------------------------------------------
document.addEventListener("click", (event) => {
  const target = event.target.closest("[data-dialog], [data-theme-choice], [data-copy], [data-shortcuts]");
  if (event.target instanceof HTMLDialogElement) event.target.close(); // the veil around it
  if (!target) return;
  if (target.dataset.dialog) {
    const dialog = document.getElementById(target.dataset.dialog);
    if (dialog) { event.preventDefault(); dialog.showModal(); }
  } else if (target.dataset.themeChoice) {
    chooseTheme(target.dataset.themeChoice);
  } else if (target.dataset.copy) {
    copyText(target);
  } else if (target.dataset.shortcuts) {
    bonsai.remember("shortcuts", target.dataset.shortcuts === "off" ? "off" : null);
    showShortcuts();
  }
});

function showShortcuts() {
  const now = bonsai.recall("shortcuts") === "off" ? "off" : "on";
  for (const button of document.querySelectorAll("[data-shortcuts]")) {
    button.setAttribute("aria-pressed", String(button.dataset.shortcuts === now));
  }
}

async function copyText(button) {
  const source = document.getElementById(button.dataset.copy);
  try {
    await navigator.clipboard.writeText(source.value ?? source.textContent);
    bonsai.announce("Copied.");
    const label = button.querySelector("span");
    if (label) {
      const before = label.textContent;
      label.textContent = "Copied";
      setTimeout(() => { label.textContent = before; }, 1500);
    }
  } catch {
    const range = document.createRange();
    range.selectNodeContents(source);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    bonsai.announce("Selected. Press Control and C to copy.");
  }
}

// --- Search: arrow keys walk through what was found --------------------------------------------------------------------
document.addEventListener("keydown", (event) => {
  const form = event.target.closest(".search");
  if (!form || !["ArrowDown", "ArrowUp", "Escape"].includes(event.key)) return;
  const links = [form.querySelector("input"), ...form.querySelectorAll(".found a")];
  if (event.key === "Escape") {
    form.querySelector(".found").replaceChildren();
    links[0].blur();
    return;
  }
  event.preventDefault();
  const next = links.indexOf(document.activeElement) + (event.key === "ArrowDown" ? 1 : -1);
  links[(next + links.length) % links.length].focus();
});

// --- Polling rests while nobody looks ----------------------------------------------------------------------------------
document.addEventListener("htmx:beforeRequest", (event) => {
  const polls = (event.detail.elt.getAttribute("hx-trigger") || "").startsWith("every");
  if (polls && document.visibilityState !== "visible") event.preventDefault();
});

showTheme();
showShortcuts();
