"use strict";
// All text comes from prompts, files and options that this page must not trust: nodes are built with text, never from markup.
const data = JSON.parse(document.getElementById("data").textContent);
const PAGE = 50;
const $ = id => document.getElementById(id);

function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "click") node.addEventListener("click", value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter(child => child !== null && child !== undefined));
  return node;
}

// Columns: numbers stand as they are, text as levels and codes.
const unpack = packed => (Array.isArray(packed) ? packed : packed.codes.map(code => packed.levels[code]));
const unpackAll = columns => Object.fromEntries(Object.entries(columns).map(([name, packed]) => [name, unpack(packed)]));
const scores = unpackAll(data.scores);
const table = data.table && unpackAll(data.table);
const sweep = data.sweep.map(run => ({name: run.name, columns: unpackAll(run.columns)}));
const N = scores.prompt_id.length;
const hasAttention = Object.keys(data.attention).length > 0;
const rowOf = new Map(scores.prompt_id.map((id, i) => [id, i]));

const words = name => String(name).replaceAll("_", " ");
const label = name => words(name) || "prompts";
const isNumber = x => typeof x === "number";
const minus = text => text.replace("-", "−");
const fixed = (x, digits = 2) => (isNumber(x) ? minus(x.toFixed(digits)).replace(/^−(?=0\.0*$)/, "") : "–");
const short = x => minus(x !== 0 && Math.abs(x) < 0.001 ? x.toExponential(1) : String(x));
const percent = (x, sign) => (isNumber(x) ? (sign && x > 0 ? "+" : "") + minus((100 * x).toFixed(0)) : "–");
const pValue = p => (isNumber(p) ? (p < 0.001 ? "<0.001" : p.toFixed(3)) : "–");
const yesNo = {True: "yes", False: "no"};
const show = x => (isNumber(x) ? short(x) : x === null || x === "" ? "–" : yesNo[x] || String(x));
const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
const interval = (value, low, high, sign, unit = "") =>
  percent(value, sign) + unit + (isNumber(low) && isNumber(high) ? ` [${percent(low, sign)}, ${percent(high, sign)}]` : "");

// ---- verdicts

const t = data.thresholds;
const band = percent(t.tau), half = percent(t.nu);
const SAYS = {
  model_fails: ["", "", "the model prefers the wrong answer: nothing to explain"],
  undecided: ["", "", `the effect is too small to divide by, or the draws disagree (standard error above ${t.max_se})`],
  overshoot: [`gives more than ${percent(1 + t.tau)}% of the effect`, "", "the knockout itself helps: not a success"],
  active: [`gives the effect back, within ${band}%`, `at least ${half}% of it is lost`, "this circuit is what the model uses"],
  redundant: [`gives the effect back, within ${band}%`, `less than ${half}% is lost`, "enough, but something else is too"],
  shortfall: [`gives less than ${percent(1 - t.tau)}%`, `at least ${half}% is lost`, "needed, but not enough"],
  rerouted: [`gives less than ${percent(1 - t.tau)}%`, `less than ${half}% is lost`, "not this circuit"],
};

function badge(verdict) {
  const swatch = el("span", {class: "swatch"});
  swatch.style.backgroundColor = data.verdict_colours[verdict] || "#ffffff";
  return el("span", {class: "verdict"}, swatch, words(verdict));
}

function count(values) {
  const counts = new Map();
  for (const value of values) counts.set(value, (counts.get(value) || 0) + 1);
  return counts;
}

const scrolling = (title, grid) => el("div", {class: "scroll", tabindex: 0, role: "region", "aria-label": title}, grid);
const head = names => el("thead", {}, el("tr", {}, names.map(name => el("th", {scope: "col"}, name))));

function drawKey() {
  const seen = count(scores.verdict);
  const rows = Object.entries(SAYS).map(([verdict, says]) => el("tr", {}, el("th", {scope: "row"}, badge(verdict)),
    says.map(text => el("td", {}, text)), el("td", {class: "number"}, (seen.get(verdict) || 0).toLocaleString("en"))));
  $("verdict-key").append(el("caption", {class: "hidden"}, "Key of the verdicts"),
    head(["Verdict", "The circuit alone", "Without the circuit", "So", "Prompts"]), el("tbody", {}, rows));
}

// ---- variants

function baseLine(i) {
  const active = `active on ${interval(table.active_share[i], table.active_low[i], table.active_high[i], false, "%")}`;
  return el("li", {}, "On base prompts the circuit is ", el("strong", {}, active),
    ` of the prompts that the model gets right (${table.n_right[i]} of ${table.n[i]}).`);
}

const GENERALISES = {
  yes: "Generalises: shown to be the same, or more, under every ablation that has a say",
  no: "Does not generalise: less often active under every ablation that has a say",
  "not shown": "Not shown either way: ablations disagree, or the data are too few",
};

function whatIsSaid(i) {
  if (table.generalises) return GENERALISES[table.generalises[i]] || table.generalises[i];
  return table.conclusion[i] + ({True: " (other ablations agree)", False: " (other ablations disagree)"}[table.same_across_ablations?.[i]] || "");
}

function variantsBySaying() {
  const groups = new Map();
  table.variant.forEach((variant, i) => {
    if (table.axis[i] === "base") return;
    const said = whatIsSaid(i), change = isNumber(table.difference[i]) ? ` ${percent(table.difference[i], true)}` : "";
    groups.set(said, [...(groups.get(said) || []), label(variant) + change]);
  });
  const order = Object.values(GENERALISES), place = said => (order.includes(said) ? order.indexOf(said) : SURE.test(said) ? 0 : 9);
  return [...groups].sort((a, b) => place(a[0]) - place(b[0]));
}

function drawSummary() {
  const verdicts = [...count(scores.verdict)].sort((a, b) => b[1] - a[1]).map(([v, k]) => `${words(v)} ${k.toLocaleString("en")}`);
  const lines = [el("li", {}, `${plural(N, "prompt")}: ${verdicts.join(", ")}.`)];
  if (table) {
    lines.unshift(...table.axis.map((axis, i) => (axis === "base" ? baseLine(i) : null)));
    lines.push(...variantsBySaying().map(([said, variants]) =>
      el("li", {}, el("strong", {}, said), ` (${plural(variants.length, "variant")}): ${variants.join(", ")}.`)));
  }
  $("summary").append(el("ul", {class: "found"}, lines));
  const note = "Numbers after a variant are differences in the share of active from the matched base prompts, in percentage points.";
  if (table) $("summary").append(el("p", {class: "note"}, note));
}

const SURE = /^(lower|higher|the same)/;
const numberCellOf = text => el("td", {class: "number"}, text);

function shareCell(verdict, share) {
  const cell = el("td", {class: "number share"}, isNumber(share) ? (share === 0 ? "·" : percent(share)) : "–");
  const colour = (data.verdict_colours[verdict] || "#999999") + "66", end = `${100 * share}%`;
  if (share > 0) cell.style.backgroundImage = `linear-gradient(to right, ${colour} ${end}, transparent ${end})`;
  return cell;
}

function agreeCell(agree, others) {
  return el("td", {class: "agree"}, show(agree), others ? el("span", {class: "reason"}, others) : null);
}

// A column of a table of variants: heading, the columns of generalization.csv that it needs, and its cell. What is of pairs is empty for the base.
const SHARES = [
  ["Model right", ["n_right", "n"], (right, n) => numberCellOf(`${show(right)}/${show(n)}`)],
  ["Templates", ["n_templates"], n => numberCellOf(show(n))],
  ["Active, % [95%]", ["active_share", "active_low", "active_high"], (x, low, high) => numberCellOf(interval(x, low, high))],
  ["Difference from base, points [95%]", ["difference", "difference_low", "difference_high"],
    (x, low, high) => numberCellOf(interval(x, low, high, true)), "pairs"],
  ["Adjusted p", ["p_adjusted"], p => numberCellOf(pValue(p)), "pairs"],
  ["Adjusted p of sameness", ["equivalence_p_adjusted"], p => numberCellOf(pValue(p)), "pairs"],
  ["Smallest difference it could see, points", ["smallest_difference"], x => numberCellOf(percent(x)), "pairs"],
  ["Conclusion", ["conclusion"], said => el("td", {}, SURE.test(said) ? el("strong", {}, said) : said), "pairs"],
  ["Generalises", ["generalises"], said => el("td", {}, said === "not shown" ? said : el("strong", {}, said)), "pairs"],
  ["Other ablations agree", ["same_across_ablations", "disagreements"], agreeCell, "pairs"],
];
const SIZES = [
  ["Ratio of means, LD(C) to LD(M)", ["ratio_of_means"], x => numberCellOf(fixed(x))],
  ["Mean of ratios", ["mean_of_ratios"], x => numberCellOf(fixed(x))],
  ["Gap, units of D [95%]", ["gap", "gap_low", "gap_high"], (...x) => numberCellOf(plainInterval(...x))],
  ["Gap, unlisted tokens restored [95%]", ["gap_restored", "gap_restored_low", "gap_restored_high"], (...x) => numberCellOf(plainInterval(...x))],
];
const REASON = ["Right for another reason, % [95%]", ["another_reason", "another_reason_low", "another_reason_high"],
  (x, low, high) => numberCellOf(interval(x, low, high))];
const LEFT_OUT = new Set(["axis", "variant", "base_active_share", "n_pairs", "interval", "p_value", "equivalence_p", "both_right", "variant_only",
  "base_only", "neither_right", "median_p_value"]);  // these are under "Every column"

const plainInterval = (x, low, high) => fixed(x) + (isNumber(low) && isNumber(high) ? ` [${fixed(low)}, ${fixed(high)}]` : "");
const there = columns => columns.filter(([, needs]) => needs[0] in table);
const verdictColumns = () => there(Object.keys(data.verdict_colours).map(v => [badge(v), [`share_${v}`], share => shareCell(v, share)]));

function otherColumns(shown) {
  const told = new Set(shown.flatMap(([, needs]) => needs));
  const plain = x => (isNumber(x) ? numberCellOf(show(x)) : el("td", {}, show(x)));
  const names = Object.keys(table).filter(name => !told.has(name) && !LEFT_OUT.has(name) && !/^(right|wrong)_/.test(name));
  return names.map(name => [words(name), [name], plain]);
}

function variantName(i) {
  const filters = {axis: table.axis[i], variant: table.variant[i]};
  const button = el("button", {type: "button", class: "link", title: "Show its prompts", click: () => filterBy(filters)}, label(table.variant[i]));
  return el("th", {scope: "row"}, button);
}

function variantRow(i, columns) {
  const cell = ([, needs, draw, pairs]) => {
    if (pairs && table.axis[i] === "base") return el("td", {}, needs[0] === "conclusion" ? "(reference)" : "");
    return draw(...needs.map(name => table[name]?.[i] ?? null));
  };
  return el("tr", {}, variantName(i), columns.map(cell));
}

function everyColumn(columns, name) {
  const names = Object.keys(columns), title = `Every column of ${name}`;
  const cell = value => el("td", {class: isNumber(value) ? "number" : ""}, show(value));
  const rows = columns[names[0]].map((_, i) => el("tr", {}, names.map(c => cell(columns[c][i]))));
  return el("details", {}, el("summary", {}, title), scrolling(title, el("table", {class: "small"}, head(names), el("tbody", {}, rows))));
}

function variantTable(id, caption, columns) {
  const body = el("tbody");
  table.axis.forEach((axis, i) => {
    const heading = el("tr", {class: "group"}, el("th", {scope: "rowgroup", colspan: columns.length + 1}, label(axis)));
    if (axis !== "base" && axis !== table.axis[i - 1]) body.append(heading);
    body.append(variantRow(i, columns));
  });
  const top = head(["Variant", ...columns.map(([title]) => title)]), last = body.lastElementChild.cells;
  [...top.rows[0].cells].forEach((cell, k) => cell.classList.toggle("right", last[k].classList.contains("number")));
  return columns.length ? scrolling(caption, el("table", {id, class: "variants"}, el("caption", {}, caption), top, body)) : null;
}

const ABOUT_VARIANTS = "Differences are over matched pairs on which the model is right twice; p is adjusted (Benjamini–Hochberg) over "
  + "the variants. A variant's name shows its prompts. ";
const ABOUT_GENERALISES = "“Generalises” is said where resample, mean and counterfactual ablation, of nodes at listed positions, all show "
  + "the share to be the same as on the base prompts, or higher; other ablations are shown and have no say.";

function drawVariants() {
  if (!table) {
    $("variants").hidden = true;
    document.querySelector("nav a[href='#variants']").hidden = true;
    return;
  }
  const shares = there(SHARES), verdicts = [...verdictColumns(), ...there([REASON])], sizes = there(SIZES);
  $("variants-body").append(el("p", {class: "note"}, ABOUT_VARIANTS, table.generalises ? ABOUT_GENERALISES : ""),
    ...[variantTable("variant-table", "Share of active, and its difference from the base prompts", shares),
      variantTable("verdict-table", "Verdicts, % of all prompts", verdicts),
      variantTable("size-table", "Other numbers", [...sizes, ...otherColumns([...shares, ...verdicts, ...sizes])]),
      everyColumn(table, "generalization.csv")].filter(Boolean));
}

// ---- tokens and their roles

const roleNames = data.roles ? Object.keys(data.roles) : [];
const stem = role => role.replace(/[+-]\d+$/, "");
const hues = [...new Set(roleNames.map(stem))];
const isNear = role => stem(role) !== role;  // IO+1: the token after IO
const roleClass = role => `role hue${hues.indexOf(stem(role)) % 8}${isNear(role) ? " near" : ""}`;
const roleSign = roles => el("span", {class: `${roleClass(roles[0])} sign`}, roles.join(" "));
const tokensOf = i => (data.tokens ? data.tokens.ids[i].map(id => data.tokens.vocabulary[id]) : null);

function rolesAt(i) {
  const at = new Map();
  for (const role of roleNames) {
    const k = data.roles[role][i];
    if (k >= 0) at.set(k, [...(at.get(k) || []), role]);
  }
  for (const roles of at.values()) roles.sort((a, b) => isNear(a) - isNear(b));
  return at;
}

function token(text, roles) {
  if (!roles?.length) return text;
  const body = text.trimStart();
  return [text.slice(0, text.length - body.length), el("span", {class: roleClass(roles[0])}, body || "␣", el("sub", {}, roles.join(" ")))];
}

function promptNodes(i, near = false) {
  const tokens = tokensOf(i);
  if (!tokens) return [scores.prompt[i]];
  const at = rolesAt(i);
  return tokens.flatMap((text, k) => token(text, at.get(k)?.filter(role => near || !isNear(role))));
}

function drawRoles() {
  if (!roleNames.length) { $("roles").hidden = true; return; }
  const used = roleNames.filter(role => data.roles[role].some(k => k >= 0));
  const signs = near => used.filter(role => isNear(role) === near).flatMap(role => [roleSign([role]), " "]);
  $("roles").append("Roles of tokens: ", ...signs(false));
  if (used.some(isNear)) $("roles").append(" In the details also the tokens beside them: ", ...signs(true));
}

// ---- one prompt in detail

const MEANING = {
  ld_model: "LD(M), whole model", ld_circuit: "LD(C), circuit alone", ld_complement: "LD without the circuit", ld_ablated: "LD(∅), all ablated",
  gap_raw: "LD(C) − LD(M)", gap: "the same in units of D", ld_restored: "LD(C), unlisted tokens restored", gap_restored: "its gap, in units of D",
  sufficiency: "sufficiency", necessity: "necessity", score: "score", s_se: "standard error of sufficiency", n_se: "standard error of necessity",
  kl: "KL(M‖C), nats", sign_agrees: "same sign as the model", profile_similarity: "head profile, r with base", p_value: "p against random circuits",
  engagement: "mean of the roles",
};
const GROUPS = [
  ["Logit differences", name => /^(ld|gap)(_|$)/.test(name)],
  ["Ratios", name => ["sufficiency", "s_se", "necessity", "n_se", "score"].includes(name)],
  ["Attention to what each role should read", name => name.startsWith("engagement")],
  ["Attention to what each head should read", name => name.startsWith("reads_")],
  ["Checks", name => ["kl", "sign_agrees", "profile_similarity", "p_value"].includes(name)],
  ["Other columns", () => true],
];
const TOLD = new Set(["prompt_id", "base_id", "axis", "variant", "template", "prompt", "answer", "distractor", "verdict", "reason", "active"]);
const IN_TABLE = new Set(["sufficiency", "necessity", "score", "ld_model", "ld_circuit"]);
const meaning = name => MEANING[name] || words(name.replace(/^(engagement|reads)_/, ""));

function grouped() {
  const left = Object.keys(scores).filter(name => !TOLD.has(name));
  return GROUPS.map(([title, belongs]) => {
    const mine = left.filter(belongs);
    mine.forEach(name => left.splice(left.indexOf(name), 1));
    return [title, mine];
  }).filter(([, names]) => names.length);
}

function numberLists(i) {
  return el("div", {class: "numbers"}, grouped().map(([title, names]) => {
    const bars = title.startsWith("Attention");
    const rows = names.map(name => {
      const value = scores[name][i], cell = el("dd", {class: bars && isNumber(value) ? "fill" : ""}, show(value));
      if (bars && isNumber(value)) cell.style.setProperty("--fill", `${100 * Math.min(1, Math.max(0, value))}%`);
      return [el("dt", {title: name}, meaning(name)), cell];
    });
    return el("div", {}, el("h4", {}, title), el("dl", {}, rows));
  }));
}

function otherAblations(i) {
  const runs = sweep.filter(run => run.columns.verdict[i]);
  if (!runs.length) return null;
  const ratio = (run, name) => el("td", {class: "number"}, fixed(run.columns[name]?.[i]));
  const rows = runs.map(run => el("tr", {}, el("th", {scope: "row"}, run.name), el("td", {}, badge(run.columns.verdict[i])),
    ratio(run, "sufficiency"), ratio(run, "necessity")));
  const grid = el("table", {class: "small"}, head(["Ablation", "Verdict", "Sufficiency", "Necessity"]), el("tbody", {}, rows));
  return el("div", {}, el("h4", {}, "Under other ablations"), scrolling("Under other ablations", grid));
}

function basePrompt(i) {
  const base = rowOf.get(scores.base_id?.[i]);
  if (base === undefined || base === i) return null;
  const link = el("button", {type: "button", class: "link", click: () => jumpTo(base)}, "show it");
  const text = el("span", {class: "text"}, promptNodes(base));
  return el("p", {class: "base"}, "Its base prompt (", badge(scores.verdict[base]), ", ", link, "): ", text);
}

function heatCell(weight, title, wanted) {
  const cell = el("td", {class: wanted ? "heat wanted" : "heat", title: `${title}: ${weight.toFixed(3)}`});
  cell.append(weight < 0.0005 ? "·" : weight.toFixed(3).replace(/^0/, ""));
  cell.style.backgroundColor = `rgba(0, 114, 178, ${(0.75 * weight).toFixed(3)})`;
  if (weight > 0.7) cell.classList.add("dark");
  return cell;
}

function attentionRow(row, tokens, roles) {
  const wanted = k => row.reads.some(role => roles.get(k)?.includes(role));
  const name = el("th", {scope: "row"}, el("span", {class: "headname"}, row.head), row.role ? ` ${row.role}` : "", ` at ${row.at}`);
  return el("tr", {}, name, tokens.map((text, k) => heatCell(row.weights[k] ?? 0, `${row.head} to ${text.trim()}`, wanted(k))));
}

function attentionTable(i) {
  const heads = data.attention[i];
  const elsewhere = ["Attention over all tokens was kept for a few prompts of each variant, marked ", el("span", {class: "eye"}, "◉"), "."];
  if (!heads) return hasAttention ? el("p", {class: "note"}, elsewhere) : null;
  const tokens = tokensOf(i), roles = rolesAt(i);
  const tops = tokens.map((text, k) => el("th", {scope: "col"}, el("span", {class: "word"}, text.trim() || "␣"),
    roles.has(k) ? roleSign(roles.get(k)) : ""));
  const top = el("thead", {}, el("tr", {}, el("th", {scope: "col"}, "Head, at its position"), tops));
  const grid = el("table", {class: "attention"}, top, el("tbody", {}, heads.map(row => attentionRow(row, tokens, roles))));
  const note = "Each row is one head at one of its positions; its attention over the tokens adds up to 1. "
    + "Framed: what the circuit says that it reads.";
  return el("div", {}, el("h4", {}, "Where the circuit's heads look"), el("p", {class: "note"}, note),
    scrolling("Attention of the circuit's heads", grid));
}

function identity(i) {
  const parts = [["answer", scores.answer], ["distractor", scores.distractor], ["template", scores.template], ["id", scores.prompt_id]];
  const told = parts.filter(([, column]) => column?.[i]);
  const tell = ([name, column]) => [el("span", {class: "name"}, name), " ", el("code", {}, String(column[i]).trim()), " "];
  return el("p", {class: "identity"}, told.map(tell));
}

function detailRow(i, columns) {
  const tokens = el("p", {class: "tokens text"}, promptNodes(i, true));
  const parts = [identity(i), tokens, basePrompt(i), attentionTable(i), numberLists(i), otherAblations(i)];
  return el("tr", {class: "detail", id: `detail-${i}`}, el("td", {colspan: columns}, parts));
}

// ---- the table of prompts: filters, order, pages; their state is in the address

const empty = () => ({axis: "", variant: "", verdict: "", q: "", attention: "", extra: "", sort: "", prompt: ""});
const FILTERS = ["axis", "variant", "verdict", "q", "extra"];
let state = empty(), page = 0, shown = [];
const open = new Set();
const ANY = "";
const NONE = "∅";  // how a select says: no axis, no variant

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  state = empty();
  for (const name of Object.keys(state)) state[name] = given.get(name) || "";
  if (!(state.sort.replace(/^-/, "") in scores)) state.sort = "";
  if (!(state.extra in scores)) state.extra = "";
  if (!rowOf.has(state.prompt)) state.prompt = "";
}

function writeAddress() {
  const given = new URLSearchParams();
  for (const [name, value] of Object.entries(state)) if (value) given.set(name, value);
  const hash = given.toString();
  if (hash !== location.hash.slice(1)) history.replaceState(null, "", hash ? `#${hash}` : location.href.split("#")[0]);
}

const haystack = Array.from({length: N}, (_, i) =>
  ["prompt", "prompt_id", "template", "answer", "distractor"].map(name => scores[name]?.[i] ?? "").join("\n").toLowerCase());
const chosen = (wanted, value) => wanted === ANY || (wanted === NONE ? value === "" : value === wanted);

function matches(i, needles) {
  return chosen(state.axis, scores.axis[i]) && chosen(state.variant, scores.variant[i]) && chosen(state.verdict, scores.verdict[i])
    && (!state.attention || data.attention[i]) && needles.every(needle => haystack[i].includes(needle));
}

function select() {
  const needles = state.q.toLowerCase().split(/\s+/).filter(Boolean);
  const found = [];
  for (let i = 0; i < N; i++) if (matches(i, needles)) found.push(i);
  const name = state.sort.replace(/^-/, ""), values = scores[name], sign = state.sort.startsWith("-") ? -1 : 1;
  if (values) {
    const missing = x => x === null || x === "";
    found.sort((a, b) => {
      const x = values[a], y = values[b];
      if (missing(x) || missing(y)) return missing(x) - missing(y) || a - b;
      return sign * (isNumber(x) && isNumber(y) ? x - y : String(x).localeCompare(String(y), "en")) || a - b;
    });
  }
  return found;
}

function columnsShown() {
  const columns = [["variant", "Variant"], ["prompt", "Prompt, and why this verdict"], ["verdict", "Verdict"], ["sufficiency", "Sufficiency"],
    ["necessity", "Necessity"], ["score", "Score"], ["ld_model", "LD(M)"], ["ld_circuit", "LD(C)"]];
  return state.extra ? [...columns, [state.extra, meaning(state.extra)]] : columns;
}

function nextOrder(name) {
  if (state.sort === name) return `-${name}`;
  return state.sort === `-${name}` ? "" : name;
}

function sortBy(name) {
  state.sort = nextOrder(name);
  page = 0;
  update();
  $(`sort-${name}`).focus();
}

function headCell([name, title]) {
  const order = state.sort === name ? "ascending" : state.sort === `-${name}` ? "descending" : "none";
  const arrow = el("span", {class: "arrow", "aria-hidden": "true"}, {ascending: "▲", descending: "▼", none: "↕"}[order]);
  const button = el("button", {type: "button", id: `sort-${name}`, title: `Sort by ${name}`, click: () => sortBy(name)}, title, " ", arrow);
  return el("th", {scope: "col", "aria-sort": order, class: name === "prompt" ? "wide" : ""}, button);
}

function drawHead() {
  const opener = el("th", {scope: "col", class: "opener"}, el("span", {class: "hidden"}, "Details"));
  $("scores").tHead.replaceChildren(el("tr", {}, opener, columnsShown().map(headCell)));
}

function numberCell(name, title, i) {
  const value = scores[name][i];
  return el("td", {class: "number", "data-label": title}, isNumber(value) ? fixed(value) : show(value));
}

function promptCell(i) {
  const eye = data.attention[i] ? el("span", {class: "eye", title: "attention was kept"}, " ◉") : null;
  return el("td", {class: "wide"}, el("span", {class: "text"}, promptNodes(i)), eye, el("span", {class: "reason"}, scores.reason[i]));
}

function promptRow(i, columns) {
  const opened = open.has(i), id = scores.prompt_id[i];
  const opener = el("button", {type: "button", class: "open", "aria-expanded": String(opened), "aria-controls": `detail-${i}`,
    "aria-label": `Details of ${id}`}, "▸");
  const axis = scores.axis[i] && scores.axis[i] !== scores.variant[i] ? el("span", {class: "axis"}, label(scores.axis[i])) : null;
  const row = el("tr", {class: opened ? "prompt opened" : "prompt", id: `row-${i}`, "data-prompt": id}, el("td", {class: "opener"}, opener),
    el("td", {class: "variant"}, axis, label(scores.variant[i])), promptCell(i), el("td", {class: "says"}, badge(scores.verdict[i])),
    columns.slice(3).map(([name, title]) => numberCell(name, title, i)));
  row.addEventListener("click", event => {
    if (event.target.closest(".open") || (!event.target.closest("button") && !String(getSelection()))) toggle(i);
  });
  return row;
}

function toggle(i) {
  const opening = !open.delete(i);
  if (opening) open.add(i);
  state.prompt = opening ? scores.prompt_id[i] : "";
  writeAddress();
  const row = $(`row-${i}`), columns = columnsShown(), fresh = promptRow(i, columns);
  $(`detail-${i}`)?.remove();
  row.replaceWith(fresh);
  if (opening) fresh.after(detailRow(i, columns.length + 1));
  fresh.querySelector(".open").focus({preventScroll: true});
}

function drawRows() {
  const columns = columnsShown();
  const detail = i => (open.has(i) ? [detailRow(i, columns.length + 1)] : []);
  const rows = shown.slice(page * PAGE, (page + 1) * PAGE).flatMap(i => [promptRow(i, columns), ...detail(i)]);
  if (!rows.length) rows.push(el("tr", {}, el("td", {colspan: columns.length + 1, class: "nothing"}, "No prompt fits these filters.")));
  $("scores").tBodies[0].replaceChildren(...rows);
  const pages = Math.max(1, Math.ceil(shown.length / PAGE));
  for (const end of ["", "-end"]) {
    $(`page${end}`).textContent = `page ${page + 1} of ${pages}`;
    $(`previous${end}`).disabled = page === 0;
    $(`next${end}`).disabled = page >= pages - 1;
  }
}

function options(select, any, values, wanted) {
  select.replaceChildren(el("option", {value: ANY}, any), ...[...values].map(([value, k]) =>
    el("option", {value: value || NONE}, `${label(value)} (${k.toLocaleString("en")})`)));
  select.value = wanted;
  return select.value === wanted;
}

function drawFilters() {
  const inAxis = scores.variant.filter((_, i) => chosen(state.axis, scores.axis[i]));
  if (!options($("axis"), "all axes", count(scores.axis), state.axis)) { state.axis = ANY; return drawFilters(); }
  if (!options($("variant"), "all variants", count(inAxis), state.variant)) { state.variant = ANY; return drawFilters(); }
  if (!options($("verdict"), "all verdicts", count(scores.verdict), state.verdict)) { state.verdict = ANY; return drawFilters(); }
  if ($("q").value !== state.q) $("q").value = state.q;
  $("extra").value = state.extra;
  $("attention").checked = Boolean(state.attention);
}

function update() {
  drawFilters();
  shown = select();
  page = Math.min(page, Math.max(0, Math.ceil(shown.length / PAGE) - 1));
  $("count").textContent = shown.length === N ? `${plural(N, "prompt")}` : `${shown.length.toLocaleString("en")} of ${plural(N, "prompt")}`;
  drawHead();
  drawRows();
  writeAddress();
}

function filterBy(filters) {
  Object.assign(state, empty(), filters);
  page = 0;
  update();
  $("prompts").scrollIntoView();
}

function jumpTo(i) {
  if (!shown.includes(i)) { state = empty(); update(); }
  page = Math.floor(shown.indexOf(i) / PAGE);
  open.add(i);
  state.prompt = scores.prompt_id[i];
  writeAddress();
  drawRows();
  $(`row-${i}`).scrollIntoView();
  $(`row-${i}`).querySelector(".open").focus({preventScroll: true});
}

function goByAddress() {
  if (location.hash && !location.hash.includes("=")) return;  // a link to a section
  readAddress();
  const wanted = rowOf.get(state.prompt);
  page = 0;
  update();
  if (wanted !== undefined) jumpTo(wanted);
}

function listen() {
  for (const name of FILTERS) $(name).addEventListener("input", () => {
    if (name === "axis") state.variant = ANY;
    state[name] = $(name).value;
    page = 0;
    update();
  });
  $("attention").addEventListener("change", () => { state.attention = $("attention").checked ? "1" : ""; page = 0; update(); });
  $("reset").addEventListener("click", () => { state = empty(); open.clear(); page = 0; update(); });
  $("filters").addEventListener("submit", event => event.preventDefault());
  for (const end of ["", "-end"]) for (const [name, step] of [["previous", -1], ["next", 1]])
    $(name + end).addEventListener("click", () => { page += step; drawRows(); if (end) $("filters").scrollIntoView(); });
  for (const link of document.querySelectorAll("a[href^='#']")) link.addEventListener("click", event => {
    event.preventDefault();  // the address holds the filters, so it cannot hold the section too
    const target = $(link.getAttribute("href").slice(1));
    target.scrollIntoView();
    target.setAttribute("tabindex", "-1");
    target.focus({preventScroll: true});
  });
  addEventListener("hashchange", goByAddress);
}

// ---- what was measured

const given = values => values.filter(value => value !== null && value !== undefined && value !== "" && value !== false);

function facts() {
  const m = data.manifest || {}, o = m.options || {}, hashes = m.hashes || {}, constants = data.constants;
  const heads = new Set(Object.values(data.attention).flat().map(row => row.head + (row.role ? ` (${row.role})` : "")));
  return [
    ["Model", o.model ?? constants.model, hashes.model && `weights ${hashes.model}`],
    ["Circuit", constants.circuit, hashes.circuit && `claim ${hashes.circuit}`],
    ["Heads of the circuit", [...heads].sort().join(", ")],
    ["Task", o.task ?? constants.task],
    ["Prompts", `${plural(N, "prompt")} of ${plural(new Set(scores.variant).size, "variant")}`],
    ["Seed", o.seed ?? constants.seed],
    ["Headline ablation", constants.ablation, o.n_draws && plural(o.n_draws, "draw")],
    ["Other ablations", sweep.map(run => run.name).join(", ")],
    ["p-values", m.p_values],
    ["BOS before each prompt", {true: "yes", false: "no"}[m.prepended_bos]],
    ["Time", isNumber(m.seconds) && `${m.seconds} s`],
    ["Code", m.commit && `commit ${m.commit}`],
    ["Versions", Object.entries(m.versions || {}).map(([name, version]) => `${name} ${version}`).join(", "), m.python && `Python ${m.python}`],
  ];
}

const factList = list => el("dl", {class: "facts"}, list.map(([name, ...values]) => [el("dt", {}, name), el("dd", {}, given(values).join("; "))]));

function drawManifest() {
  $("manifest").append(factList(facts().filter(([, ...values]) => given(values).length)));
  const constants = Object.entries(data.constants);
  if (constants.length) $("manifest").append(el("details", {}, el("summary", {}, "Columns of scores.csv with one value only"), factList(constants)));
  const text = JSON.stringify(data.manifest, null, 1);
  if (data.manifest) $("manifest").append(el("details", {}, el("summary", {}, "manifest.json"), el("pre", {tabindex: 0}, text)));
}

function drawExtras() {
  const names = Object.keys(scores).filter(name => !TOLD.has(name) && !IN_TABLE.has(name));
  if (scores.template) names.push("template");
  $("extra").append(el("option", {value: ""}, "none"), ...names.map(name => el("option", {value: name}, name)));
  $("attention-label").hidden = !hasAttention;
}

drawSummary();
drawKey();
drawVariants();
drawRoles();
drawManifest();
drawExtras();
listen();
goByAddress();
if (!shown.length && location.hash && !location.hash.includes("=")) update();
