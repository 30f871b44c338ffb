// The sampling settings: a form whose values are remembered, and what of them goes into a request.

import { byId } from "./dom.js";
import { recall, remember } from "./store.js";

const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
const DEFAULTS = { temperature: "", top_p: "", max_tokens: "512", seed: "", system: "" };
const SLIDER = { temperature: "1", top_p: "1" }; // where a slider stands while the server decides

const form = byId("settings");

export function setUp() {
  fill({ ...DEFAULTS, ...parsed(recall("settings")) });
  form.addEventListener("input", (event) => {
    const of = event.target.dataset.for;
    if (of) form.elements[of].value = event.target.value;
    moveSliders();
    remember("settings", JSON.stringify(values()));
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  byId("reset").addEventListener("click", () => {
    fill(DEFAULTS);
    remember("settings", null);
  });
}

/** The fields for a request; what was left empty is the server's to choose. Null, and the form says why, when one is impossible. */
export function sampling() {
  if (!form.checkValidity()) return null;
  const given = NUMBERS.filter((name) => form.elements[name].value !== "");
  return Object.fromEntries(given.map((name) => [name, Number(form.elements[name].value)]));
}

/** Take the user to what is wrong. */
export const complain = () => form.reportValidity();
export const systemPrompt = () => form.elements.system.value.trim();

const values = () => Object.fromEntries(Object.keys(DEFAULTS).map((name) => [name, form.elements[name].value]));

function fill(wanted) {
  for (const name of Object.keys(DEFAULTS)) form.elements[name].value = wanted[name];
  moveSliders();
}

function moveSliders() {
  for (const slider of form.querySelectorAll("[data-for]")) {
    const name = slider.dataset.for;
    slider.value = form.elements[name].value || SLIDER[name];
    slider.classList.toggle("unset", form.elements[name].value === "");
  }
}

function parsed(text) {
  try {
    const found = JSON.parse(text) ?? {};
    return Object.fromEntries(Object.entries(found).filter(([name, value]) => name in DEFAULTS && typeof value === "string"));
  } catch {
    return {};
  }
}
