// The page of a result: examples that fill the field.
const field = document.getElementById("try-text");

for (const button of document.querySelectorAll("[data-fill]")) {
  button.addEventListener("click", () => {
    field.value = button.dataset.fill;
    field.focus();
  });
}

// Control and Enter asks, as in other fields for longer texts.
field.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    field.form.requestSubmit();
  }
});
