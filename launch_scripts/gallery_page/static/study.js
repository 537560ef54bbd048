"use strict";
// The preference study: one prompt at a time, all methods side by side, one pick each. STUDY comes from data.js; it names no method.

const STORE = `study-${STUDY.study}`;
const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
const page = document.getElementById("study");
let cameras = new Cameras();
let stages = [];
let state = restored() ?? fresh();

/** picks: asset by row, null where there is none yet; at: row that is shown, -1 the introduction, number of rows the summary. */
function fresh() {
  const drawn = crypto.getRandomValues(new Uint8Array(6));
  return {
    participant: Array.from(drawn, (byte) => byte.toString(16).padStart(2, "0")).join(""),
    picks: STUDY.rows.map(() => null),
    at: -1,
    saved: false,
  };
}

function restored() {
  try {
    const found = JSON.parse(localStorage.getItem(STORE));
    return found && typeof found.participant === "string" && found.picks.length === STUDY.rows.length ? found : null;
  } catch {
    return null; // storage is off, or holds something else
  }
}

function keep() {
  try {
    localStorage.setItem(STORE, JSON.stringify(state));
  } catch {
    // Without storage a reload starts again; the study itself goes on.
  }
}

/** Numbers in [0, 1) that depend only on the text: FNV-1a as the seed of mulberry32. */
function random(text) {
  let seed = 2166136261;
  for (const character of text) seed = Math.imul(seed ^ character.codePointAt(0), 16777619);
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let mixed = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
}

/** A row's options in the order in which this participant sees them: Fisher and Yates's shuffle. */
function shown(row) {
  const next = random(`${STUDY.seed}/${state.participant}/${row}`);
  const options = [...STUDY.rows[row].options];
  for (let last = options.length - 1; last > 0; last--) {
    const other = Math.floor(next() * (last + 1));
    [options[last], options[other]] = [options[other], options[last]];
  }
  return options;
}

function letterOf(row, asset) {
  return LETTERS[shown(row).findIndex((option) => option.asset === asset)];
}

function go(at) {
  state.at = at;
  keep();
  show();
}

function show() {
  for (const stage of stages) {
    nearby.unobserve(stage.place);
    stage.unmount();
  }
  stages = [];
  cameras = new Cameras();
  document.title = STUDY.title;
  if (state.at < 0) introduction();
  else if (state.at < STUDY.rows.length) question(state.at);
  else summary();
  scrollTo(0, 0);
  page.querySelector("h1").focus();
}

function heading(text) {
  return element("h1", { tabindex: "-1" }, text);
}

function introduction() {
  const count = STUDY.rows.length;
  page.replaceChildren(
    element(
      "div",
      { class: "text" },
      heading(STUDY.title),
      element(
        "p",
        {},
        `You will see ${count} ${count === 1 ? "text" : "texts, one after the other"}. For each there are ${STUDY.rows[0].options.length} models that were made from it. Pick the one that you find best.`,
      ),
      element(
        "p",
        {},
        "Drag to turn the models: they turn together. Click a model, then scroll or pinch to zoom. With the keyboard: Tab to it, arrow keys to turn, Page Up and Page Down to zoom.",
      ),
      element(
        "p",
        {},
        "At the end you save a small file and send it to whoever asked you. It holds your picks and a random number, nothing else about you.",
      ),
      element("p", {}, element("button", { type: "button", class: "main", id: "start", onclick: () => go(0) }, "Start")),
    ),
  );
}

function question(row) {
  const { prompt } = STUDY.rows[row];
  const count = STUDY.rows.length;
  const next = element(
    "button",
    { type: "button", class: "main", id: "next", onclick: () => go(row + 1), disabled: state.picks[row] === null },
    row + 1 < count ? "Next" : "Finish",
  );
  const buttons = new Map();
  const mark = () => {
    for (const [asset, button] of buttons) {
      const picked = asset === state.picks[row];
      button.setAttribute("aria-pressed", picked);
      button.textContent = `${picked ? "✓ " : ""}${button.dataset.letter} is best`;
      button.closest(".option").classList.toggle("picked", picked);
    }
    next.disabled = state.picks[row] === null;
  };
  const options = shown(row).map((option, index) => {
    const stage = new Stage(option, `Model ${LETTERS[index]}: ${prompt}`, String(row), cameras);
    stages.push(stage);
    const pick = () => {
      state.picks[row] = option.asset;
      state.saved = false;
      keep();
      mark();
    };
    const button = element("button", { type: "button", "data-letter": LETTERS[index], onclick: pick });
    buttons.set(option.asset, button);
    return element("li", { class: "option" }, stage.place, button);
  });
  page.replaceChildren(
    element(
      "div",
      { class: "question" },
      heading(`Which is the best “${prompt}”?`),
      element("span", { class: "quiet number", id: "progress" }, `${row + 1} / ${count}`),
    ),
    element("progress", { max: count, value: row + 1, "aria-label": "Progress" }),
    element("ul", { class: "options", style: `--columns: ${columnsFor(options.length)}` }, ...options),
    element(
      "div",
      { class: "steps" },
      element("button", { type: "button", id: "back", onclick: () => go(row - 1) }, "Back"),
      element("button", { type: "button", onclick: () => cameras.reset() }, "Reset cameras"),
      next,
    ),
  );
  mark();
  for (const stage of stages) nearby.observe(stage.place);
}

/** At most five side by side, in rows as even as can be. */
function columnsFor(count) {
  return Math.ceil(count / Math.ceil(count / 5));
}

function summary() {
  const open = state.picks.findIndex((pick) => pick === null);
  if (open >= 0) return go(open);
  const name = `study-${STUDY.study}-${state.participant}.json`;
  const again = element(
    "button",
    { type: "button", id: "again", disabled: !state.saved, onclick: () => ((state = fresh()), go(-1)) },
    "Next participant",
  );
  const save = () => {
    download(new Blob([JSON.stringify(result(), null, 1)], { type: "application/json" }), name);
    state.saved = true;
    keep();
    again.disabled = false;
  };
  const lines = STUDY.rows.map(({ prompt }, row) =>
    element(
      "li",
      {},
      `${prompt}: ${letterOf(row, state.picks[row])}`,
      element("button", { type: "button", "aria-label": `Change the pick for ${prompt}`, onclick: () => go(row) }, "change"),
    ),
  );
  page.replaceChildren(
    element(
      "div",
      { class: "text" },
      heading("Thank you. Please save your picks."),
      element("p", {}, "Save the file ", element("code", {}, name), " and send it to whoever asked you."),
      element(
        "div",
        { class: "steps" },
        element("button", { type: "button", class: "main", id: "save", onclick: save }, "Download my picks"),
        again,
      ),
      element("h3", {}, "Your picks"),
      element("ol", { class: "summary" }, ...lines),
    ),
  );
}

function result() {
  const picks = STUDY.rows.map((_, row) => ({ row, pick: state.picks[row], shown: shown(row).map((option) => option.asset) }));
  return { format: "threestudio_pgc study result", study: STUDY.study, participant: state.participant, seed: STUDY.seed, picks };
}

show();
