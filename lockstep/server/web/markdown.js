// A little Markdown, made of DOM nodes: fenced code, headings, lists, **bold**, `code`. No HTML is ever parsed: text stays text.

import { el } from "./dom.js";

/** The nodes of `text`. An open fence is code up to the end, so that a text may be shown while it grows. */
export function markdown(text) {
  const nodes = [];
  let plain = [];
  let code = null;
  const flush = () => {
    nodes.push(...blocks(plain.join("\n")));
    plain = [];
  };
  for (const line of text.split("\n")) {
    const fence = /^\s*```\s*([\w+#.-]*)\s*$/.exec(line);
    if (code !== null && fence && !fence[1]) {
      nodes.push(codeBlock(code));
      code = null;
    } else if (code !== null) code.lines.push(line);
    else if (fence) {
      flush();
      code = { language: fence[1], lines: [] };
    } else plain.push(line);
  }
  if (code !== null) nodes.push(codeBlock(code));
  flush();
  return nodes;
}

function codeBlock({ language, lines }) {
  const block = el("pre", { className: "code", tabIndex: 0 }, el("code", {}, lines.join("\n")));
  if (language) block.dataset.language = language;
  return block;
}

function blocks(text) {
  return text
    .split(/\n{2,}/)
    .filter((part) => part.trim())
    .map((part) => {
      const lines = part.replace(/^\n+|\n+$/g, "").split("\n");
      const heading = /^(#{1,6})\s+(.*)$/.exec(lines[0]);
      if (heading && lines.length === 1) return el("p", { className: "title" }, ...inline(heading[2]));
      if (lines.every((line) => /^\s*[-*]\s+/.test(line))) return list("ul", lines, /^\s*[-*]\s+/);
      if (lines.every((line) => /^\s*\d+[.)]\s+/.test(line))) return list("ol", lines, /^\s*\d+[.)]\s+/);
      return el("p", {}, ...inline(lines.join("\n")));
    });
}

function list(kind, lines, mark) {
  return el(kind, {}, ...lines.map((line) => el("li", {}, ...inline(line.replace(mark, "")))));
}

function inline(text) {
  return text
    .split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/)
    .filter(Boolean)
    .map((part) => {
      if (part.length > 2 && part.startsWith("`") && part.endsWith("`")) return el("code", {}, part.slice(1, -1));
      if (part.length > 4 && part.startsWith("**") && part.endsWith("**")) return el("strong", {}, part.slice(2, -2));
      return part;
    });
}
