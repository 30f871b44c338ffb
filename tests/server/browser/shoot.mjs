// Pictures of the page for the manual: `node shoot.mjs URL FOLDER`, light and dark, after answers have been streamed.

import { join } from "node:path";
import { launch } from "./launch.mjs";

const [base, folder] = process.argv.slice(2);
const PROMPTS = ["import os\nimport sys\n\ndef main(", "def is_prime(n):\n    if n < 2:"];

const browser = await launch();
for (const scheme of ["light", "dark"]) {
  const page = await browser.newPage({ viewport: { width: 1280, height: 832 }, colorScheme: scheme, deviceScaleFactor: 1.5 });
  await page.goto(base);
  await page.waitForFunction(() => document.getElementById("model").textContent);
  await page.check("input[value=complete]");
  await page.fill("#temperature", "0.6");
  await page.fill("#seed", "7");
  for (const [i, text] of PROMPTS.entries()) {
    await page.fill("#max_tokens", i ? "60" : "72");
    await page.fill("#prompt", text);
    await page.press("#prompt", "Enter");
    await page.waitForSelector(".growing");
    await page.waitForSelector("#stop", { state: "hidden" });
    await page.waitForTimeout(800); // the picture of the ranks catches up
  }
  await page.locator("#prompt").blur();
  const path = join(folder, `playground-${scheme}.png`);
  await page.screenshot({ path });
  console.log(JSON.stringify({ path }));
}
await browser.close();
