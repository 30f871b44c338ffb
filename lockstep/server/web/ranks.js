// The picture of the ranks: a card for each replica, in it a grid of pipeline stages (rows) by tensor ranks (columns).
// Asks `v1/cluster` once a second while somebody looks. The DOM is made when the shape changes and updated in place after.

import { getJson } from "./api.js";
import { byId, el, say, svg } from "./dom.js";

const EVERY = 1000; // ms
const HISTORY = 60; // points of the line
const SILENT = 5; // seconds without a sign of life, of which a rank gives several a second
const KINDS = { ready: "good", starting: "busy" }; // of a replica's state; every other state is one in which it does not run

/** Begin to watch; `wake` asks at once, also after giving up. */
export function watchRanks() {
  const picture = new Picture();
  let timer = null;
  let asking = false;
  const tick = async () => {
    clearTimeout(timer);
    if (asking || document.hidden) return;
    asking = true;
    let wait = EVERY;
    try {
      picture.show(await getJson("v1/cluster", 5000));
    } catch (error) {
      picture.miss(error);
      if (error.status === 404 || error.status === 401) wait = null; // asking again would bring the same
    }
    asking = false;
    if (wait !== null) timer = setTimeout(tick, wait);
  };
  document.addEventListener("visibilitychange", tick);
  tick();
  return { wake: tick };
}

class Picture {
  constructor() {
    this.shape = "";
    this.cells = new Map(); // "replica/rank" -> its nodes
    this.cards = new Map();
    this.rates = [];
    this.chosen = null;
  }

  show(cluster) {
    const replicas = (cluster.replicas ?? []).map((replica) => ({ ...replica, ranks: replica.ranks?.length ? replica.ranks : absent(replica, cluster.parallel) }));
    const shape = JSON.stringify(replicas.map((r) => [r.replica, r.ranks.map((k) => [k.rank, k.pp, k.tp])]));
    if (shape !== this.shape) this.build(replicas);
    this.shape = shape;
    for (const replica of replicas) this.update(replica);
    this.totals(replicas, cluster.totals ?? {});
    this.head(replicas);
    byId("ranks").classList.remove("stale");
    byId("ranks-note").hidden = true;
    this.describe(replicas);
  }

  /** No answer: the last picture stays, marked as old. */
  miss(error) {
    const words = { 404: "This server does not tell about its ranks.", 401: "The ranks are shown once there is a key." };
    byId("ranks").classList.add("stale");
    byId("ranks-note").hidden = false;
    say(byId("ranks-note"), words[error.status] ?? error.message);
    const kind = error.status === 404 ? ["good", "connected"] : error.status === 401 ? ["busy", "key needed"] : ["bad", error.status ? "engine down" : "no answer"];
    this.pill(...kind);
  }

  pill(kind, words) {
    byId("dot").dataset.kind = kind;
    say(byId("summary"), words);
  }

  build(replicas) {
    this.cells.clear();
    this.cards.clear();
    byId("ranks").replaceChildren(...replicas.map((replica) => this.card(replica)));
  }

  card(replica) {
    const ranks = [...(replica.ranks)].sort((a, b) => a.pp - b.pp || a.tp - b.tp);
    const width = Math.max(1, ...ranks.map((rank) => rank.tp + 1));
    const grid = el("div", { className: width > 4 ? "grid dense" : "grid" }, ...ranks.map((rank) => this.cell(replica, rank)));
    grid.style.setProperty("--columns", width);
    const nodes = { state: el("span", { className: "state" }), load: el("span", { className: "load" }), kv: el("span"), bar: el("i") };
    const meter = el("div", { className: "meter" }, nodes.bar);
    meter.setAttribute("aria-hidden", "true");
    nodes.node = el(
      "article",
      { className: "replica" },
      el("header", {}, el("h3", {}, `Replica ${replica.replica}`), nodes.state),
      grid,
      el("div", { className: "below" }, nodes.load, nodes.kv),
      meter,
    );
    this.cards.set(replica.replica, nodes);
    return nodes.node;
  }

  cell(replica, rank) {
    const key = `${replica.replica}/${rank.rank}`;
    const nodes = { name: el("b", {}, String(rank.rank)), step: el("span"), mark: el("em"), work: el("i"), wait: el("u") };
    const bar = el("span", { className: "split" }, nodes.work, nodes.wait);
    bar.setAttribute("aria-hidden", "true");
    nodes.node = el("button", { type: "button", className: "rank" }, el("span", { className: "top" }, nodes.name, nodes.mark), nodes.step, bar);
    nodes.node.style.gridColumn = rank.tp + 1;
    nodes.node.style.gridRow = rank.pp + 1;
    nodes.node.addEventListener("click", () => {
      this.chosen = this.chosen === key ? null : key;
      this.describe(this.last ?? []);
    });
    this.cells.set(key, nodes);
    return nodes.node;
  }

  update(replica) {
    const nodes = this.cards.get(replica.replica);
    const kind = stateKind(replica.state);
    nodes.node.dataset.kind = kind;
    const restarts = replica.restarts ? `, ${replica.restarts} ${replica.restarts === 1 ? "restart" : "restarts"}` : "";
    say(nodes.state, `${replica.state ?? "unknown"}${restarts}`);
    say(nodes.load, `${replica.running ?? 0} running, ${replica.waiting ?? 0} waiting`);
    const used = Math.min(1, Math.max(0, replica.kv_usage ?? 0));
    say(nodes.kv, `KV ${(100 * used).toFixed(used > 0 && used < 0.1 ? 1 : 0)} %`);
    nodes.bar.style.width = `${100 * used}%`;
    nodes.bar.classList.toggle("full", used > 0.9);
    for (const rank of replica.ranks) this.updateRank(replica, rank, kind);
  }

  updateRank(replica, rank, replicaKind) {
    const nodes = this.cells.get(`${replica.replica}/${rank.rank}`);
    const kind = rankKind(rank, replicaKind);
    const step = rank.step_ms ?? 0;
    const wait = Math.min(waits(rank), step);
    nodes.node.dataset.kind = kind;
    say(nodes.mark, { slow: "slow", bad: "down", busy: "…" }[kind] ?? "");
    say(nodes.step, kind === "bad" ? "–" : step ? `${short(step)} ms` : "idle");
    nodes.work.style.width = step ? `${(100 * (step - wait)) / step}%` : "0";
    nodes.wait.style.width = step ? `${(100 * wait) / step}%` : "0";
    nodes.node.setAttribute("aria-label", `Rank ${rank.rank}, stage ${rank.pp}, tensor rank ${rank.tp}, ${{ slow: "slow", bad: "down", busy: "starting" }[kind] ?? "well"}`);
  }

  totals(replicas, totals) {
    const sum = (name) => totals[name] ?? replicas.reduce((all, replica) => all + (replica[name] ?? 0), 0);
    const rate = sum("tokens_per_s");
    this.rates = [...this.rates.slice(1 - HISTORY), rate];
    byId("totals").hidden = false;
    const entry = (value, words) => el("div", {}, el("b", {}, value), el("span", {}, words));
    const median = (of) => (totals[of]?.p50 == null ? "–" : `${short(totals[of].p50)} ms`);
    byId("totals").replaceChildren(
      entry(short(rate), "tokens/s"),
      entry(median("ttft_ms"), "first token"),
      entry(median("itl_ms"), "per token"),
      line(this.rates),
    );
  }

  head(replicas) {
    this.last = replicas;
    const ranks = replicas.flatMap((replica) => (replica.ranks).map((rank) => rankKind(rank, stateKind(replica.state))));
    const span = (axis) => 1 + Math.max(0, ...replicas.flatMap((replica) => (replica.ranks).map((rank) => rank[axis] ?? 0)));
    say(byId("shape"), `DP ${replicas.length} × PP ${span("pp")} × TP ${span("tp")}`);
    const down = ranks.filter((kind) => kind === "bad").length;
    const slow = ranks.filter((kind) => kind === "slow").length;
    const bad = down || replicas.some((replica) => stateKind(replica.state) === "bad");
    const coming = replicas.some((replica) => stateKind(replica.state) === "busy");
    if (bad) this.pill("bad", down ? `${down} of ${ranks.length} ranks down` : "a replica is down");
    else if (coming) this.pill("busy", "starting");
    else if (slow) this.pill("slow", `${slow} slow of ${ranks.length}`);
    else this.pill("good", `${ranks.length} ${ranks.length === 1 ? "rank" : "ranks"} well`);
  }

  /** The facts of the rank that was clicked. */
  describe(replicas) {
    const found = replicas.flatMap((replica) => (replica.ranks).map((rank) => [`${replica.replica}/${rank.rank}`, rank])).find(([key]) => key === this.chosen);
    for (const [key, nodes] of this.cells) nodes.node.setAttribute("aria-pressed", String(key === this.chosen));
    byId("detail").hidden = !found;
    if (!found) return;
    const rank = found[1];
    const rows = [
      ["rank", `${rank.rank} (dp ${rank.dp}, pp ${rank.pp}, tp ${rank.tp})`],
      ["process", rank.pid ? String(rank.pid) : "none"],
      ["phase", rank.phase || "unknown"],
      ["step", `${short(rank.step_ms ?? 0)} ms, of it ${short(waits(rank))} ms waiting`],
      ["memory", bytes(rank.memory_bytes ?? 0)],
      ["last heartbeat", rank.heartbeat_age_s == null ? "none" : `${rank.heartbeat_age_s.toFixed(1)} s ago`],
    ];
    byId("detail").replaceChildren(...rows.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
  }
}

const stateKind = (state) => KINDS[state] ?? "bad";
const waits = (rank) => (rank.wait_ms ?? 0) + (rank.stage_wait_ms ?? 0);

function rankKind(rank, replicaKind) {
  if (replicaKind !== "good") return replicaKind;
  if ((rank.heartbeat_age_s ?? 0) > SILENT) return "bad";
  return rank.slow ? "slow" : "good";
}

/** Ranks that a replica which does not run tells nothing of, at their places. */
function absent(replica, { tp = 0, pp = 1 } = {}) {
  return Array.from({ length: tp * pp }, (_, rank) => ({ rank, dp: replica.replica, pp: Math.floor(rank / tp), tp: rank % tp }));
}

/** Tokens a second of the last minute. */
function line(values) {
  const most = Math.max(1, ...values);
  const at = (value, i) => `${((HISTORY - values.length + i) * 100) / (HISTORY - 1)},${22 - (20 * value) / most}`;
  const points = values.map(at).join(" ");
  const start = ((HISTORY - values.length) * 100) / (HISTORY - 1);
  const drawing = svg(
    "svg",
    { viewBox: "0 0 100 24", preserveAspectRatio: "none", class: "line", "aria-hidden": "true" },
    svg("polygon", { points: `${start},24 ${points} 100,24` }),
    svg("polyline", { points, "vector-effect": "non-scaling-stroke" }),
  );
  return drawing;
}

const short = (x) => (x >= 100 ? x.toFixed(0) : x >= 10 ? x.toFixed(1) : x > 0 ? x.toFixed(2) : "0");
const bytes = (n) => (n >= 2 ** 30 ? `${(n / 2 ** 30).toFixed(1)} GiB` : `${(n / 2 ** 20).toFixed(0)} MiB`);
