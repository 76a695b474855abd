"use strict";
// Updates the hits while the user types. Keys: / moves to the query field, arrows move between hits, Enter explains a hit.
const field = document.querySelector("input[data-live]");
const results = document.getElementById("results");
let newest = 0;
let timer = 0;

async function refresh() {
  const number = ++newest;
  const parameters = new URLSearchParams({ q: field.value });
  results.setAttribute("aria-busy", "true");
  try {
    const response = await fetch("/results?" + parameters, { headers: { accept: "text/html" } });
    const text = await response.text();
    if (number !== newest) return; // a later request will replace the hits
    const page = new DOMParser().parseFromString(text, "text/html");
    const part = page.querySelector("main") || page.body;
    results.replaceChildren(...part.childNodes);
    history.replaceState(null, "", field.value ? "/?" + parameters : "/");
  } catch {
    if (number !== newest) return;
    const message = document.createElement("p");
    message.className = "error";
    message.textContent = "The server does not respond. Your query is kept; try again in a moment.";
    results.replaceChildren(message);
  }
  results.removeAttribute("aria-busy");
}

if (field && results) {
  field.setSelectionRange(field.value.length, field.value.length); // so that typing continues at the end of the query
  field.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(refresh, 120);
  });
}

document.addEventListener("keydown", (event) => {
  const input = document.querySelector("input[type=search], textarea");
  const typing = event.target instanceof HTMLElement && event.target.matches("input, textarea, select");
  if (event.key === "/" && !typing && input) {
    event.preventDefault();
    input.focus();
    return;
  }
  if (event.key === "Escape" && input) input.focus();
  if (event.key !== "ArrowDown" && event.key !== "ArrowUp") return;
  if (event.target instanceof HTMLElement && event.target.matches("textarea, select")) return;
  const summaries = [...document.querySelectorAll("ol.hits summary")];
  if (!summaries.length) return;
  const current = summaries.indexOf(document.activeElement);
  const next = event.key === "ArrowDown" ? current + 1 : current - 1;
  event.preventDefault();
  if (next < 0) input?.focus();
  else summaries[Math.min(next, summaries.length - 1)].focus();
});
