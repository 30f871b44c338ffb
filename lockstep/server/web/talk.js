// The conversation: what was said, what is asked next, and the one answer that may be on its way.

import { Answer } from "./answer.js";
import { ApiError, stream } from "./api.js";
import { byId, el, say } from "./dom.js";

const NO_TEMPLATE = /chat.?template|chat\/completions/i; // what servers say that cannot chat
const ENDS = { length: "at the limit", stop: "", abort: "aborted", tool_calls: "asked for a tool" };

export class Talk {
  /** shared: {model(), mode(), setMode(mode), sampling(), system(), needKey(message), changed()}. */
  constructor(shared) {
    this.shared = shared;
    this.history = []; // of the chat: {role, content}
    this.hanger = null; // aborts the answer that is on its way
    this.scroller = byId("scroller");
    this.log = byId("log");
    this.follow = true;
    this.scroller.addEventListener("scroll", () => {
      this.follow = this.scroller.scrollHeight - this.scroller.scrollTop - this.scroller.clientHeight < 60;
    });
  }

  get busy() {
    return this.hanger !== null;
  }

  /** Ask, and show the answer as it comes. Never throws. */
  async ask(text) {
    const mode = this.shared.mode();
    const messages = [...this.history, { role: "user", content: text }];
    const asked = mode === "chat" ? this.append(el("article", { className: "turn user" }, el("h3", { className: "who" }, "You"), el("div", { className: "text" }, text))) : null;
    const answer = new Answer(this.shared.model() || "model", mode === "chat" ? null : text);
    answer.onpaint = () => this.scroll();
    this.append(answer.node);
    this.follow = true;
    this.scroll();
    const again = () => {
      if (this.busy) return;
      asked?.remove();
      answer.node.remove();
      this.ask(text);
    };
    const ticker = setInterval(() => say(byId("figures"), answer.describe()), 200);
    this.hanger = new AbortController();
    this.shared.changed();
    const keep = () => {
      if (mode === "chat" && answer.node.isConnected) this.history = [...messages, { role: "assistant", content: answer.text }];
    };
    try {
      const reason = await this.receive(answer, mode, mode === "chat" ? messages : text);
      answer.end(ENDS[reason] ?? reason);
      keep();
      say(byId("said"), "The answer is complete.");
    } catch (error) {
      if (error.name === "AbortError") {
        answer.end("stopped");
        if (answer.text) keep();
        say(byId("said"), "Stopped.");
      } else if (mode === "chat" && error instanceof ApiError && [400, 404, 405, 501].includes(error.status) && NO_TEMPLATE.test(error.message)) {
        this.hanger = null;
        answer.end("failed");
        this.shared.setMode("complete");
        say(byId("said"), "This model does not chat: it completes texts.");
        again();
        return;
      } else {
        answer.fail(error.message || String(error), again);
        if (error.wantsKey) this.shared.needKey(error.message, again);
      }
    } finally {
      clearInterval(ticker);
      say(byId("figures"), "");
    }
    this.hanger = null;
    this.shared.changed();
    this.scroll();
  }

  /** Why the answer ended, once it has. */
  async receive(answer, mode, input) {
    const system = this.shared.system();
    const body = { model: this.shared.model() || undefined, ...this.shared.sampling() };
    if (mode === "chat") body.messages = system ? [{ role: "system", content: system }, ...input] : input;
    else body.prompt = input;
    let reason = "";
    for await (const event of stream(mode === "chat" ? "v1/chat/completions" : "v1/completions", body, this.hanger.signal)) {
      const choice = event.choices?.[0];
      const text = mode === "chat" ? (choice?.delta?.reasoning_content ?? "") + (choice?.delta?.content ?? "") : choice?.text;
      answer.add(text, event.usage);
      reason = choice?.finish_reason ?? reason;
    }
    return reason;
  }

  stop() {
    this.hanger?.abort();
  }

  clear() {
    this.stop();
    this.history = [];
    this.log.replaceChildren();
    this.shared.changed();
  }

  append(node) {
    this.log.append(node);
    return node;
  }

  scroll() {
    if (this.follow) this.scroller.scrollTop = this.scroller.scrollHeight;
  }
}
