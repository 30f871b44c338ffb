// What people do on the page, one function each. `node scenarios.mjs URL [NAME ...]` prints a JSON line for each.

import assert from "node:assert/strict";
import { launch } from "./launch.mjs";

const WIDE = { width: 1280, height: 800 };
const PHONE = { width: 360, height: 640 };

const send = async (page, text) => {
  await page.fill("#prompt", text);
  await page.press("#prompt", "Enter");
};
const answer = (page) => page.locator(".answer").last();
const done = async (page) => {
  await page.waitForSelector("#stop", { state: "hidden" });
  return answer(page);
};
const fake = async (page) => page.evaluate(async () => (await fetch("/fake")).json());
const until = async (what, check) => {
  for (let i = 0; i < 100; i++) {
    if (await check()) return;
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  assert.fail(`not within 5 s: ${what}`);
};
const overflows = (page) =>
  page.evaluate(() => {
    const wide = [...document.querySelectorAll("body *")].filter((node) => {
      const box = node.getBoundingClientRect();
      return box.width > 0 && box.right > innerWidth + 0.5 && !node.closest("pre") && !node.closest(".hidden");
    });
    return { page: document.documentElement.scrollWidth - innerWidth, nodes: wide.map((node) => node.id || node.className) };
  });

const scenarios = {
  async streams({ page }) {
    assert.equal(await page.locator("#model").textContent(), "tiny");
    await send(page, "tell me");
    await page.waitForSelector(".growing");
    const early = await answer(page).locator(".text").textContent();
    const node = await done(page);
    const text = await node.locator(".text").textContent();
    assert.ok(early.length < text.length, "the text was there all at once");
    assert.equal(text.trim().split(" ").length, 200); // the fake stops there; the setting is 512
    const figures = await node.locator(".figures").textContent();
    assert.match(figures, /first\stoken\s\d+.*tokens\/s.*200\stokens.*at\sthe\slimit/);
    assert.equal(await node.getAttribute("aria-busy"), null);
    assert.equal(await page.locator("#log").getAttribute("aria-live"), "polite");
    await send(page, "more");
    await done(page);
    const { last } = await fake(page);
    assert.deepEqual(last.messages.map((m) => m.role), ["user", "assistant", "user"]);
    assert.equal(last.messages[1].content, text);
    await page.click("#clear");
    assert.equal(await page.locator(".turn").count(), 0);
    await page.waitForSelector("#welcome");
  },

  async stops({ page }) {
    const before = (await fake(page)).hung_up;
    for (const stop of [() => page.click("#stop"), () => page.keyboard.press("Escape")]) {
      await send(page, "slow please");
      await until("a few words", async () => (await answer(page).locator(".text").textContent()).includes("word3"));
      await stop();
      const node = await done(page);
      assert.match(await node.locator(".figures").textContent(), /stopped/);
      const text = await node.locator(".text").textContent();
      await page.waitForTimeout(100);
      assert.equal(await node.locator(".text").textContent(), text);
    }
    await until("the server notices", async () => (await fake(page)).hung_up === before + 2);
  },

  async settings({ page }) {
    await page.fill("#temperature", "0.3");
    await page.fill("#top_p", "0.9");
    await page.fill("#max_tokens", "7");
    await page.fill("#seed", "42");
    await page.fill("#system", "Be brief.");
    assert.equal(await page.locator("[data-for=temperature]").inputValue(), "0.3");
    await send(page, "hello");
    const node = await done(page);
    assert.equal((await node.locator(".text").textContent()).trim().split(" ").length, 7);
    const { last } = await fake(page);
    const { temperature, top_p, max_tokens, seed, stream, model, messages } = last;
    assert.deepEqual({ temperature, top_p, max_tokens, seed, stream, model }, { temperature: 0.3, top_p: 0.9, max_tokens: 7, seed: 42, stream: true, model: "tiny" });
    assert.deepEqual(messages[0], { role: "system", content: "Be brief." });
    await page.reload();
    assert.equal(await page.inputValue("#seed"), "42"); // remembered
    await page.click("#reset");
    assert.equal(await page.inputValue("#seed"), "");
    await send(page, "hello");
    await done(page);
    assert.deepEqual(Object.keys((await fake(page)).last).sort(), ["max_tokens", "messages", "model", "stream", "stream_options"]);
    await page.fill("#temperature", "9"); // impossible: nothing is sent
    await send(page, "never sent");
    assert.equal(await page.locator(".turn.user").count(), 1);
    assert.equal(await page.evaluate(() => document.activeElement.id), "temperature");
  },

  async text_never_becomes_html({ page }) {
    const attack = 'hostile <img src=x onerror="document.title=1"><b>x</b>';
    await send(page, attack);
    const node = await done(page);
    assert.equal(await page.locator(".user .text").textContent(), attack);
    assert.match(await node.locator(".text").textContent(), /<img src=x onerror=/);
    assert.equal(await node.locator("pre code").textContent(), '<script>document.title="owned"</script>');
    assert.equal(await node.locator("strong").textContent(), "bold");
    assert.equal(await page.locator("#log img, #log b, #log script").count(), 0);
    assert.match(await page.title(), /tiny/);
    const refused = await page.evaluate(() => {
      try {
        document.body.innerHTML = "<img>";
        return "";
      } catch (error) {
        return error.name;
      }
    });
    assert.equal(refused, "TypeError"); // the policy: even our own code could not
  },

  async falls_back_to_completions({ page }) {
    await send(page, "plain text goes on");
    const node = await done(page);
    assert.equal(await page.locator("input[name=mode]:checked").inputValue(), "complete");
    assert.equal(await page.locator(".turn").count(), 1);
    assert.equal(await node.locator(".given").textContent(), "plain text goes on");
    assert.match(await node.locator(".new").textContent(), /^word0 /);
    assert.equal((await fake(page)).last.prompt, "plain text goes on");
  },

  async errors_are_readable({ page }) {
    for (const [prompt, words] of [
      ["busy", /the queue is full\. Try again in 3 s\./],
      ["wrong", /answered 422/],
      ["break", /connection ended before the answer did/],
      ["fail", /rank 1 died/],
    ]) {
      await send(page, prompt);
      const node = await done(page);
      assert.match(await node.locator("[role=alert]").textContent(), words);
    }
    await page.route("**/v1/chat/completions", (route) => route.abort());
    await send(page, "nobody there");
    assert.match(await (await done(page)).locator("[role=alert]").textContent(), /does not answer/);
    await page.unroute("**/v1/chat/completions");
    await answer(page).getByRole("button", { name: "Try again" }).click();
    assert.match(await (await done(page)).locator(".figures").textContent(), /tokens/);
  },

  async asks_for_the_key({ page, reopen }) {
    await page.waitForSelector("#key-dialog[open]");
    assert.match(await page.locator("#key-why").textContent(), /missing or wrong/);
    assert.equal(await page.evaluate(() => document.activeElement.id), "key");
    await page.keyboard.type("wrong");
    await page.keyboard.press("Enter");
    await page.waitForSelector("#key-dialog[open]"); // asked again
    await page.fill("#key", "right-key");
    await page.keyboard.press("Enter");
    await page.waitForSelector("#key-dialog", { state: "hidden" });
    await until("the model's name", async () => (await page.locator("#model").textContent()) === "tiny");
    await page.waitForSelector(".rank");
    await send(page, "hello");
    assert.match(await (await done(page)).locator(".figures").textContent(), /tokens/);
    const kept = await page.evaluate(() => [Object.values(sessionStorage), Object.values(localStorage), document.cookie]);
    assert.deepEqual(kept[0], ["right-key"]);
    assert.ok(!JSON.stringify(kept.slice(1)).includes("right-key"));
    const other = await reopen(); // another tab knows nothing of it
    await other.waitForSelector("#key-dialog[open]");
  },

  async shows_the_ranks({ page }) {
    await page.waitForSelector(".rank");
    assert.equal(await page.locator(".replica").count(), 2);
    assert.equal(await page.locator(".rank").count(), 8);
    assert.equal(await page.locator("#shape").textContent(), "DP 2 × PP 2 × TP 2");
    assert.deepEqual(await page.locator(".rank").evaluateAll((all) => all.map((node) => node.dataset.kind)), ["good", "good", "slow", "good", "bad", "bad", "bad", "bad"]);
    assert.match(await page.locator("#summary").textContent(), /4 of 8 ranks down/);
    const [first, second] = await page.locator(".replica").allTextContents();
    assert.match(first, /ready.*3 running, 1 waiting.*KV 42 %/s);
    assert.match(second, /waiting, 2 restarts/);
    const places = await page.locator(".replica").first().locator(".rank").evaluateAll((all) => all.map((node) => [node.getBoundingClientRect().x, node.getBoundingClientRect().y]));
    assert.ok(places[0][0] < places[1][0] && places[0][1] === places[1][1] && places[0][1] < places[2][1] && places[0][0] === places[2][0], "stages are rows");
    await page.locator(".rank").nth(2).click();
    assert.match(await page.locator("#detail").textContent(), /4002.*step 902.*12\.5 ms, of it 0\.90 ms waiting.*512 MiB/);
    let asked = 0;
    page.on("request", (request) => (asked += request.url().endsWith("/v1/cluster") ? 1 : 0));
    await page.waitForTimeout(2300);
    assert.ok(asked === 2 || asked === 3, `asked ${asked} times in 2.3 s`);
    assert.equal(await page.locator(".rank[aria-pressed=true]").count(), 1); // updated in place
  },

  async lives_without_the_ranks({ page }) {
    await page.route("**/v1/cluster", (route) => route.fulfill({ status: 404, body: "{}" }));
    let asked = 0;
    page.on("request", (request) => (asked += request.url().endsWith("/v1/cluster") ? 1 : 0));
    await page.reload();
    await until("the note", async () => /does not tell/.test(await page.locator("#ranks-note").textContent()));
    await page.waitForTimeout(1300);
    assert.equal(asked, 1);
    await send(page, "hello");
    assert.match(await (await done(page)).locator(".figures").textContent(), /tokens/);
  },

  async light_and_dark({ page }) {
    const colours = () => page.evaluate(() => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]);
    const light = await colours();
    await page.emulateMedia({ colorScheme: "dark" });
    const dark = await colours();
    assert.notDeepEqual(light, dark);
    await page.click("#theme"); // the button beats the system
    assert.deepEqual(await colours(), light);
    await page.reload();
    assert.deepEqual(await colours(), light);
    assert.equal(await page.locator("#theme").getAttribute("aria-pressed"), "false");
    await send(page, "hostile");
    await done(page);
    await page.waitForSelector(".rank");
    for (const scheme of ["light", "dark"]) {
      await page.evaluate((wanted) => (document.documentElement.dataset.theme = wanted), scheme);
      assert.deepEqual(await page.evaluate(weakContrasts), [], scheme);
    }
  },

  async keyboard_alone({ page }) {
    assert.equal(await page.evaluate(() => document.activeElement.id), "prompt");
    await page.keyboard.type("one");
    await page.keyboard.press("Shift+Enter");
    await page.keyboard.type("two");
    assert.equal(await page.inputValue("#prompt"), "one\ntwo");
    await page.keyboard.press("Enter");
    await done(page);
    assert.equal(await page.locator(".user .text").textContent(), "one\ntwo");
    const seen = [];
    await page.evaluate(() => document.body.focus());
    await page.focus("#panel-toggle");
    for (let i = 0; i < 40; i++) {
      const found = await page.evaluate(() => {
        const node = document.activeElement;
        const box = node.getBoundingClientRect();
        const name = node.getAttribute("aria-label") || node.labels?.[0]?.textContent || node.textContent.trim();
        return { id: node.id || node.name || node.className || node.tagName, name, seen: box.width > 0 && box.height > 0, ring: getComputedStyle(node).outlineStyle !== "none" };
      });
      if (found.id === "BODY") break;
      seen.push(found);
      await page.keyboard.press("Tab");
    }
    assert.deepEqual(seen.filter((node) => !node.name || !node.seen), []);
    const order = seen.map((node) => node.id).filter((id) => ["panel-toggle", "theme", "prompt", "mode", "send", "temperature", "system"].includes(id));
    assert.deepEqual(order, ["panel-toggle", "theme", "prompt", "mode", "send", "temperature", "system"]);
    await page.focus("#prompt");
    await page.keyboard.type("slow");
    await page.keyboard.press("Enter");
    await page.waitForSelector(".growing");
    await page.keyboard.press("Escape");
    await done(page);
    assert.equal(await page.evaluate(() => document.activeElement.id), "prompt");
  },

  async narrow_screen({ page }) {
    await send(page, "hostile " + "averyveryverylongwordwithoutanybreak".repeat(8));
    await done(page);
    assert.deepEqual(await overflows(page), { page: 0, nodes: [] });
    assert.ok(!(await page.locator("#panel").isVisible()));
    await page.click("#panel-toggle");
    assert.ok(await page.locator("#panel").isVisible());
    assert.equal(await page.locator("#panel-toggle").getAttribute("aria-expanded"), "true");
    await page.waitForSelector(".rank");
    assert.deepEqual(await overflows(page), { page: 0, nodes: [] });
    await page.keyboard.press("Escape");
    assert.ok(!(await page.locator("#panel").isVisible()));
  },

  async reduced_motion({ page }) {
    await page.emulateMedia({ reducedMotion: "reduce" });
    await send(page, "slow");
    await page.waitForSelector(".growing .text p");
    assert.equal(await page.evaluate(() => document.getAnimations().filter((one) => one.playState === "running").length), 0);
    await page.keyboard.press("Escape");
    await done(page);
  },

  async copies({ page, context }) {
    await context.grantPermissions(["clipboard-read", "clipboard-write"]);
    await send(page, "hello");
    const node = await done(page);
    await node.getByRole("button", { name: "Copy" }).click();
    await until("copied", async () => (await node.getByRole("button").first().textContent()) === "Copied");
    assert.match(await page.evaluate(() => navigator.clipboard.readText()), /^word0 word1 /);
  },

  // For a real server: whatever model, through the whole engine.
  async real({ page }) {
    await until("the model's name", async () => (await page.locator("#model").textContent()) !== "");
    await page.check("input[value=complete]");
    await page.fill("#max_tokens", "48");
    await page.fill("#temperature", "0");
    await send(page, "def is_prime(n):\n    if n < 2:");
    const node = await done(page);
    assert.equal(await page.locator("[role=alert]").count(), 0);
    assert.ok((await node.locator(".new").textContent()).length > 20);
    assert.match(await node.locator(".figures").textContent(), /first\stoken.*tokens\/s/);
    assert.match(await page.locator("#summary").textContent(), /connected|ranks? well|slow/);
  },
};

const EXPECTED_NOISE = /Failed to load resource/; // the browser's own line for 4xx and aborted requests
const NOISY = new Set(["errors_are_readable", "asks_for_the_key", "lives_without_the_ranks", "falls_back_to_completions", "real"]);
const POLICY_NOISE = /TrustedHTML/; // text_never_becomes_html breaks the policy on purpose

// Texts whose contrast with what is behind them is below 4.5 (WCAG 2.2, AA). Runs in the page.
function weakContrasts() {
  const parse = (colour) => {
    const canvas = (globalThis.canvas ??= new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true }));
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour[3] > 250) return colour;
    }
    return [255, 255, 255];
  };
  const weak = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!own || !node.checkVisibility({ opacityProperty: true }) || node.matches(":disabled") || node.closest(".hidden")) continue;
    const [a, b] = [luminance(parse(getComputedStyle(node).color)), luminance(behind(node))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) weak.push(`${node.className || node.tagName} "${node.textContent.slice(0, 20)}" ${contrast.toFixed(2)}`);
  }
  return weak;
}

async function run(browser, base, name) {
  const context = await browser.newContext({
    viewport: name === "narrow_screen" ? PHONE : WIDE,
    colorScheme: "light",
    userAgent: name === "asks_for_the_key" ? "needs-key" : "test",
  });
  if (name === "real") await context.addInitScript(() => sessionStorage.setItem("lockstep.key", "right-key"));
  const page = await context.newPage();
  page.setDefaultTimeout(8000);
  const complaints = [];
  const reopen = async () => {
    const opened = await context.newPage();
    await opened.goto(base);
    return opened;
  };
  const origin = new URL(base).origin;
  context.on("request", (request) => {
    if (new URL(request.url()).origin !== origin) complaints.push(`asked another host: ${request.url()}`);
  });
  page.on("pageerror", (error) => complaints.push(`threw ${error.message}`));
  page.on("console", (message) => {
    const fine = (EXPECTED_NOISE.test(message.text()) && NOISY.has(name)) || (name === "text_never_becomes_html" && POLICY_NOISE.test(message.text()));
    if (["error", "warning"].includes(message.type()) && !fine) complaints.push(`console: ${message.text()}`);
  });
  const result = { name, ok: true, error: "" };
  try {
    await page.goto(base);
    await scenarios[name]({ page, context, reopen });
    assert.deepEqual(complaints, []);
  } catch (error) {
    Object.assign(result, { ok: false, error: `${error.stack}\n${complaints.join("\n")}` });
  }
  await context.close();
  console.log(JSON.stringify(result));
}

const [base, ...names] = process.argv.slice(2);
const browser = await launch();
for (const name of names) await run(browser, base, name);
await browser.close();
