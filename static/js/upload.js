// Drop zone: the same form as without a script, sent with progress.
"use strict";

for (const zone of document.querySelectorAll("[data-drop]")) {
  const form = zone.closest("form");
  const input = zone.querySelector('input[type="file"]');
  const busy = zone.querySelector(".busy");
  const faults = form.querySelector("[data-faults]");
  let request = null;

  for (const name of ["dragenter", "dragover"]) {
    zone.addEventListener(name, (event) => {
      event.preventDefault();
      zone.classList.add("over");
    });
  }
  for (const name of ["dragleave", "drop"]) zone.addEventListener(name, () => zone.classList.remove("over"));
  zone.addEventListener("drop", (event) => {
    event.preventDefault();
    if (event.dataTransfer.files.length) send(event.dataTransfer.files[0]);
  });
  input.addEventListener("change", () => { if (input.files.length) send(input.files[0]); });
  form.addEventListener("submit", (event) => {
    if (!input.files.length) return;
    event.preventDefault();
    send(input.files[0]);
  });
  busy.querySelector("button").addEventListener("click", () => request && request.abort());

  function show(sentence, share) {
    busy.hidden = false;
    busy.querySelector("[data-says]").textContent = sentence;
    const bar = busy.querySelector("progress");
    if (share === null) bar.removeAttribute("value");
    else bar.value = share;
  }

  function end() {
    busy.hidden = true;
    zone.removeAttribute("aria-busy");
    input.value = "";
    request = null;
  }

  function refuse(list) {
    faults.replaceChildren(...list.map((fault) => {
      const item = document.createElement("li");
      item.className = "note error";
      for (const [tag, text] of [["strong", fault.what], ["p", fault.why], ["p", fault.way_out]]) {
        if (!text) continue;
        const line = document.createElement(tag);
        line.textContent = text;
        item.append(line);
      }
      return item;
    }));
    faults.focus();
  }

  function send(file) {
    if (request) return;
    const body = new FormData(form);
    body.set("file", file);
    faults.replaceChildren();
    zone.setAttribute("aria-busy", "true");
    request = new XMLHttpRequest();
    request.open("POST", form.action);
    request.setRequestHeader("Accept", "application/json");
    request.upload.addEventListener("progress", (event) => {
      const share = event.lengthComputable ? event.loaded / event.total : null;
      if (share === 1) show(`Looking at ${file.name} …`, null);
      else show(`Sending ${file.name}${share === null ? "" : `, ${Math.round(100 * share)} %`}`, share);
    });
    request.addEventListener("load", () => {
      let answer = null;
      try { answer = JSON.parse(request.responseText); } catch { /* not ours: a proxy or a limit answered in plain text */ }
      if (answer && answer.next) {
        bonsai.announce(`${file.name} is uploaded.`);
        location.href = answer.next;
        return;
      }
      const why = request.responseText.length < 400 && !request.responseText.startsWith("<") ? request.responseText : "The studio gave no reason.";
      refuse(answer ? answer.faults : [{ what: "The upload was refused.", why, way_out: "Try again, or send a smaller file." }]);
      end();
    });
    request.addEventListener("error", () => {
      refuse([{ what: "The upload broke off.", why: "The connection to the studio was lost.", way_out: "Check that it still runs, then try again." }]);
      end();
    });
    request.addEventListener("abort", () => {
      bonsai.announce("Upload cancelled.");
      end();
    });
    show(`Sending ${file.name}`, 0);
    request.send(body);
  }
}
