// The page put together: buttons, keys, and who tells whom.

import { getJson } from "./api.js";
import { byId, el, say } from "./dom.js";
import { watchRanks } from "./ranks.js";
import * as settings from "./settings.js";
import { apiKey, recall, remember, setApiKey } from "./store.js";
import { Talk } from "./talk.js";

const IDEAS = {
  chat: ["Explain tensor parallelism in three sentences.", "Write a Python function that merges two sorted lists.", "Name five uses for a paper clip."],
  complete: ["def is_prime(n):\n    if n < 2:", "import os\nimport sys\n\ndef main(", "The three laws of robotics are"],
};
const HINTS = { chat: "Write a message", complete: "Begin a text: the model goes on" };

const prompt = byId("prompt");
let model = "";
let afterKey = null;

const talk = new Talk({
  model: () => model,
  mode,
  setMode,
  sampling: settings.sampling,
  system: settings.systemPrompt,
  needKey: askKey,
  changed,
});

function mode() {
  return document.querySelector("input[name=mode]:checked").value;
}

function setMode(wanted) {
  document.querySelector(`input[name=mode][value=${wanted}]`).checked = true;
  modeChanged();
}

function modeChanged() {
  prompt.placeholder = HINTS[mode()];
  prompt.classList.toggle("raw", mode() === "complete");
  byId("ideas").replaceChildren(
    ...IDEAS[mode()].map((text) => {
      const button = el("button", { type: "button", className: mode() === "complete" ? "idea raw" : "idea" }, text);
      button.addEventListener("click", () => take(text));
      return button;
    }),
  );
}

function changed() {
  byId("send").hidden = talk.busy;
  byId("stop").hidden = !talk.busy;
  byId("welcome").hidden = talk.log.childElementCount > 0;
  byId("clear").disabled = talk.log.childElementCount === 0;
}

function take(text) {
  prompt.value = text;
  grow();
  prompt.focus();
}

function grow() {
  prompt.style.height = "auto";
  prompt.style.height = `${Math.min(prompt.scrollHeight, innerHeight * 0.35)}px`;
}

function send() {
  const text = mode() === "chat" ? prompt.value.trim() : prompt.value;
  if (!text.trim() || talk.busy) return;
  if (settings.sampling() === null) {
    openPanel(true);
    settings.complain();
    return;
  }
  take("");
  talk.ask(text);
}

// Beside the conversation the panel is there until it is closed; over it, on narrow screens, not until it is opened.
const narrow = matchMedia("(max-width: 960px)");
const panelOpen = () => (narrow.matches ? document.body.classList.contains("panel-open") : !document.body.classList.contains("panel-closed"));

function openPanel(open) {
  if (narrow.matches) document.body.classList.toggle("panel-open", open);
  else document.body.classList.toggle("panel-closed", !open);
  tellPanel();
}

function tellPanel() {
  byId("panel-toggle").setAttribute("aria-expanded", String(panelOpen()));
}

// --- the key ---

function askKey(why, then = null) {
  afterKey = then;
  say(byId("key-why"), why || "The key is kept until this tab is closed, and sent to this server only.");
  byId("key").value = apiKey();
  if (!byId("key-dialog").open) byId("key-dialog").showModal();
}

function setUpKey() {
  const close = (key) => {
    if (key !== undefined) setApiKey(key);
    byId("key-dialog").close();
    prompt.focus();
  };
  byId("key-open").addEventListener("click", () => askKey(""));
  byId("key-cancel").addEventListener("click", () => close());
  byId("key-forget").addEventListener("click", () => close(""));
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const then = afterKey;
    close(byId("key").value.trim());
    loadModel();
    ranks.wake();
    then?.();
  });
}

// --- appearance ---

function dark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function setUpTheme() {
  const tell = () => byId("theme").setAttribute("aria-pressed", String(dark()));
  byId("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = dark() ? "light" : "dark";
    remember("theme", document.documentElement.dataset.theme);
    tell();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", tell);
  tell();
}

async function loadModel() {
  try {
    model = (await getJson("v1/models")).data?.[0]?.id ?? "";
    say(byId("model"), model);
    document.title = model ? `${model} · lockstep` : "lockstep";
  } catch (error) {
    if (error.wantsKey) askKey(error.message);
  }
}

function setUp() {
  settings.setUp();
  setUpKey();
  setUpTheme();
  const before = recall("mode");
  setMode(before === "complete" ? "complete" : "chat");
  for (const input of document.querySelectorAll("input[name=mode]")) {
    input.addEventListener("change", () => {
      modeChanged();
      remember("mode", mode());
    });
  }
  prompt.addEventListener("input", grow);
  prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  byId("stop").addEventListener("click", () => {
    talk.stop();
    prompt.focus();
  });
  byId("clear").addEventListener("click", () => {
    talk.clear();
    prompt.focus();
  });
  byId("panel-toggle").addEventListener("click", () => openPanel(!panelOpen()));
  narrow.addEventListener("change", tellPanel);
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || byId("key-dialog").open) return;
    if (talk.busy) talk.stop();
    else if (narrow.matches && panelOpen()) {
      openPanel(false);
      byId("panel-toggle").focus();
    }
  });
  changed();
  tellPanel();
  loadModel();
}

const ranks = watchRanks();
setUp();
