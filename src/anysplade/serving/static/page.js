"use strict";
// Hits as one types, and the keyboard: / to the field, arrows between hits, Enter opens why.
const field = document.querySelector("input[data-live]");
const results = document.getElementById("results");
let newest = 0;
let timer = 0;

async function refresh() {
  const number = ++newest;
  const parameters = new URLSearchParams({ q: field.value });
  results.setAttribute("aria-busy", "true");
  try {
    const answer = await fetch("/results?" + parameters, { headers: { accept: "text/html" } });
    const text = await answer.text();
    if (number !== newest) return; // a later one is on its way
    const page = new DOMParser().parseFromString(text, "text/html");
    const part = page.querySelector("main") || page.body;
    results.replaceChildren(...part.childNodes);
    history.replaceState(null, "", field.value ? "/?" + parameters : "/");
  } catch {
    if (number !== newest) return;
    const said = document.createElement("p");
    said.className = "error";
    said.textContent = "The server does not answer. Your query is still here: try again in a moment.";
    results.replaceChildren(said);
  }
  results.removeAttribute("aria-busy");
}

if (field && results) {
  field.setSelectionRange(field.value.length, field.value.length); // to go on typing where the query ends
  field.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(refresh, 120);
  });
}

document.addEventListener("keydown", (event) => {
  const into = document.querySelector("input[type=search], textarea");
  const typing = event.target instanceof HTMLElement && event.target.matches("input, textarea, select");
  if (event.key === "/" && !typing && into) {
    event.preventDefault();
    into.focus();
    return;
  }
  if (event.key === "Escape" && into) into.focus();
  if (event.key !== "ArrowDown" && event.key !== "ArrowUp") return;
  if (event.target instanceof HTMLElement && event.target.matches("textarea, select")) return;
  const stops = [...document.querySelectorAll("ol.hits summary")];
  if (!stops.length) return;
  const at = stops.indexOf(document.activeElement);
  const next = event.key === "ArrowDown" ? at + 1 : at - 1;
  event.preventDefault();
  if (next < 0) into?.focus();
  else stops[Math.min(next, stops.length - 1)].focus();
});
