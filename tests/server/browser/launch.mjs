// The browser that setup.py installed, launched. It brings its own libraries and fonts: any Linux with glibc will do.

import { writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";

// Without one font at least a renderer ends at the first letter.
const FONTS = `<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd"><fontconfig>
<dir>${join(tmpdir(), "fonts")}</dir><dir>/usr/share/fonts</dir><cachedir>${join(tmpdir(), "fonts-cache")}</cachedir>
<alias><family>system-ui</family><prefer><family>Open Sans</family></prefer></alias>
<alias><family>sans-serif</family><prefer><family>Open Sans</family></prefer></alias>
<alias><family>monospace</family><prefer><family>DejaVu Sans Mono</family><family>Open Sans</family></prefer></alias>
</fontconfig>`;

function packages() {
  process.env.AWS_EXECUTION_ENV ??= "AWS_Lambda_nodejs20.x"; // has the package unpack and use its own libraries
  const require = createRequire(join(process.env.BROWSER_FOLDER, "package.json"));
  const packed = require("@sparticuz/chromium");
  const chromium = packed.default ?? packed;
  chromium.setGraphicsMode = false;
  return { chromium, driver: require("playwright-core").chromium };
}

/** The browser's path, unpacked if it was not. */
export const executable = () => packages().chromium.executablePath();

export async function launch() {
  const { chromium, driver } = packages();
  const executablePath = await chromium.executablePath();
  process.env.FONTCONFIG_FILE = join(tmpdir(), "fonts.conf");
  writeFileSync(process.env.FONTCONFIG_FILE, FONTS);
  const args = ["--no-sandbox", "--no-zygote", "--disable-gpu", "--disable-webgl", "--font-render-hinting=none"]; // its security stays on
  return driver.launch({ executablePath, args, headless: true });
}
