"use strict";
// The page is whole without this, which folds the details away until their cell is clicked, and copies.
document.documentElement.classList.add("js");

const detailsOf = (key) => document.getElementById(key)?.closest("details");
const cellOf = (details) =>
  document.querySelector(`[aria-controls="${details.querySelector(":scope > div")?.id}"]`);

function select(element) {
  const range = document.createRange();
  range.selectNodeContents(element);
  getSelection().removeAllRanges();
  getSelection().addRange(range);
}

async function copy(button) {
  const label = (button.dataset.label ??= button.textContent);
  const source = button.previousElementSibling;
  let done = true;
  try {
    await navigator.clipboard.writeText(source.textContent);
  } catch {
    select(source);
    done = document.execCommand("copy");
  }
  button.textContent = done ? "Copied" : "Selected";
  setTimeout(() => (button.textContent = label), 1500);
}

function show(key) {
  const details = detailsOf(key);
  if (details) details.open = true;
}

function toggle(key) {
  const details = detailsOf(key);
  details.open = !details.open;
}

document.addEventListener("click", ({ target }) => {
  const cell = target.closest("[aria-controls]");
  if (cell) toggle(cell.getAttribute("aria-controls"));
  const button = target.closest(".copy");
  if (button) copy(button);
  const link = target.closest('a[href^="#"]');
  if (link) show(link.hash.slice(1)); // new browsers do this themselves
});

// However they were opened or closed, the cell tells; and the focus is never left in what is hidden.
document.addEventListener(
  "toggle",
  ({ target }) => {
    const cell = cellOf(target);
    cell?.setAttribute("aria-expanded", target.open);
    const lost = document.activeElement === document.body || target.contains(document.activeElement);
    if (cell && !target.open && lost) cell.focus();
  },
  true
);
