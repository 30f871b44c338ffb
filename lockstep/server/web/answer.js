// One answer as it comes: its text on the page, its tokens counted, its times taken.

import { el, say } from "./dom.js";
import { markdown } from "./markdown.js";

const PLAIN_FROM = 20_000; // characters; longer answers are laid out once, at their end

/** The answer's article, its figures, and its buttons. prompt: what a completion goes on from; null for a chat's answer. */
export class Answer {
  constructor(who, prompt = null) {
    this.text = "";
    this.tokens = 0;
    this.prompt = prompt;
    this.started = performance.now();
    this.first = null;
    this.last = null;
    this.body = el("div", { className: prompt === null ? "text" : "text raw" });
    this.figures = el("span", { className: "figures" });
    this.tools = el("span", { className: "tools" });
    this.node = el(
      "article",
      { className: "turn answer" },
      el("h3", { className: "who" }, who),
      this.body,
      el("footer", {}, this.figures, this.tools),
    );
    this.node.setAttribute("aria-busy", "true");
    this.node.classList.add("growing");
    this.rest = el("span", { className: "new" });
    if (prompt !== null) this.body.append(el("span", { className: "given" }, prompt), this.rest);
  }

  /** Take what one event brought. */
  add(text, usage) {
    if (text) {
      this.last = performance.now();
      this.first ??= this.last;
      this.text += text;
      this.tokens += 1;
      this.draw();
    }
    if (usage?.completion_tokens) this.tokens = usage.completion_tokens;
  }

  /** At most once a frame. */
  draw() {
    this.frame ??= requestAnimationFrame(() => this.paint());
  }

  paint() {
    this.frame = null;
    if (this.prompt !== null) say(this.rest, this.text);
    else if (this.text.length > PLAIN_FROM && this.node.classList.contains("growing")) say(this.body, this.text);
    else this.body.replaceChildren(...markdown(this.text));
    this.onpaint?.();
  }

  /** "first token 84 ms  ·  118 tokens/s  ·  256 tokens", each part kept on one line. */
  describe() {
    if (this.first === null) return `waiting ${seconds(performance.now() - this.started)}`;
    const took = this.last - this.first;
    const rate = this.tokens > 1 && took > 0 ? [`${format((1000 * (this.tokens - 1)) / took)} tokens/s`] : [];
    const parts = [`first token ${seconds(this.first - this.started)}`, ...rate, `${this.tokens} ${this.tokens === 1 ? "token" : "tokens"}`];
    return parts.map((part) => part.replaceAll(" ", "\u00a0")).join("  ·  ");
  }

  /** Nothing more comes. how: a word about its end, where it is no plain one. */
  end(how) {
    if (this.frame) cancelAnimationFrame(this.frame);
    this.node.classList.remove("growing");
    this.node.removeAttribute("aria-busy");
    this.paint();
    if (this.text || how !== "failed") say(this.figures, how ? `${this.describe()}  ·  ${how.replaceAll(" ", "\u00a0")}` : this.describe());
    if (this.text) this.tools.append(copyButton(() => this.text));
  }

  /** Show why it failed, and offer to try again. */
  fail(message, retry) {
    this.end("failed");
    const again = el("button", { type: "button", className: "quiet" }, "Try again");
    again.addEventListener("click", retry);
    const box = el("div", { className: "error" }, el("p", {}, message), again);
    box.setAttribute("role", "alert");
    this.node.insertBefore(box, this.node.lastChild);
  }
}

function copyButton(text) {
  const button = el("button", { type: "button", className: "quiet" }, "Copy");
  button.addEventListener("click", async () => {
    say(button, (await copy(text())) ? "Copied" : "Could not copy");
    setTimeout(() => say(button, "Copy"), 1500);
  });
  return button;
}

/** Pages that came over plain HTTP from another host have no clipboard: those select the text and ask the browser. */
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const holder = el("textarea", { value: text, className: "hidden" });
    document.body.append(holder);
    holder.select();
    const done = document.execCommand("copy");
    holder.remove();
    return done;
  }
}

const format = (x) => (x >= 100 ? x.toFixed(0) : x.toFixed(1));
const seconds = (ms) => (ms < 1000 ? `${ms.toFixed(0)} ms` : `${(ms / 1000).toFixed(1)} s`);
