"use strict";
// The gallery's table and its details. GALLERY comes from data.js.

const cameras = new Cameras();
const many = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
const shortMesh = (mesh) =>
  mesh
    .replace(/^builtin:/, "")
    .split(/[\\/]/)
    .pop();
const short = (value) =>
  value === 0 || (Math.abs(value) >= 1e-3 && Math.abs(value) < 1e5) ? String(Number(value.toPrecision(4))) : value.toExponential(1);

function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

function facts(cell) {
  const parts = [];
  if (cell.seconds !== null) parts.push(duration(cell.seconds));
  if (cell.steps !== null) parts.push(many(cell.steps, "step"));
  return parts.join(" · ");
}

function gallery() {
  document.title = GALLERY.title;
  document.getElementById("title").textContent = GALLERY.title;
  document.getElementById("extent").textContent = `${many(GALLERY.rows.length, "prompt")}, ${many(GALLERY.methods.length, "method")}`;
  const head = element("thead", {}, element("tr", {}, ...GALLERY.methods.map((method) => element("th", { scope: "col" }, method))));
  document.getElementById("rows").append(element("table", { class: "gallery" }, head, ...GALLERY.rows.map(rowOf)));

  const together = document.getElementById("together");
  together.addEventListener("change", () => cameras.setTogether(together.checked));
  cameras.setTogether(together.checked); // a browser keeps the box as it was over a reload
  document.getElementById("reset").addEventListener("click", () => cameras.reset());
  const wide = matchMedia(`(min-width: ${GALLERY.methods.length * 11 + 3}rem)`);
  const fit = () => document.body.classList.toggle("narrow", !wide.matches);
  wide.addEventListener("change", fit);
  fit();
}

function rowOf(row, index) {
  const mesh = row.mesh ? element("span", { class: "quiet" }, ` · ${shortMesh(row.mesh)}`) : null;
  const head = element("th", { scope: "rowgroup", colspan: GALLERY.methods.length }, element("h2", {}, row.prompt, mesh));
  return element(
    "tbody",
    {},
    element("tr", {}, head),
    element("tr", {}, ...row.cells.map((cell, column) => cellOf(row, index, cell, column))),
  );
}

function cellOf(row, index, cell, column) {
  const method = GALLERY.methods[column];
  const name = element("div", { class: "of-method" }, method);
  if (!cell) return element("td", {}, name, element("div", { class: "stage empty" }, element("p", {}, "no run")));
  let stage;
  if (cell.asset) {
    stage = new Stage(cell, `${row.prompt}, ${method}`, String(index), cameras).place;
    nearby.observe(stage);
  } else {
    stage = element("div", { class: "stage empty" }, element("p", {}, cell.problem));
  }
  const open = element(
    "button",
    { type: "button", "aria-label": `Details of ${row.prompt}, ${method}`, onclick: () => details(row, cell, method) },
    "Details",
  );
  return element("td", {}, name, stage, element("div", { class: "below" }, element("span", { class: "quiet number" }, facts(cell)), open));
}

function details(row, cell, method) {
  const dialog = document.getElementById("details");
  const close = element("button", { type: "button", onclick: () => dialog.close() }, "Close");
  const title = element(
    "div",
    {},
    element("h2", { id: "details-title" }, method),
    element("div", { class: "quiet" }, [row.prompt, facts(cell)].filter(Boolean).join(" · ")),
  );
  dialog.replaceChildren(
    element("div", { class: "title" }, title, close),
    ...(cell.problem ? [element("p", {}, cell.problem)] : []),
    ...comparison(row, method),
    ...media(cell, row, method),
    ...statistics(cell.statistics),
    ...saving(cell, row, method),
    element("h3", {}, "All settings"),
    element("details", {}, element("summary", {}, "configs/parsed.yaml"), element("pre", {}, cell.yaml)),
  );
  dialog.showModal();
  dialog.scrollTop = 0;
}

/** The settings in which the methods of the row differ. */
function comparison(row, method) {
  if (row.methods.length < 2) return [];
  if (!row.settings.length) return [element("h3", {}, "Settings that differ in this row"), element("p", { class: "quiet" }, "none")];
  const own = (name) => (name === method ? { class: "own" } : {});
  const head = element(
    "tr",
    {},
    element("th", { scope: "col" }, "setting"),
    ...row.methods.map((name) => element("th", { scope: "col", ...own(name) }, name)),
  );
  const lines = row.settings.map(([key, values]) =>
    element(
      "tr",
      {},
      element("th", { scope: "row" }, key),
      ...values.map((value, index) => element("td", own(row.methods[index]), value ?? "–")),
    ),
  );
  const table = element("table", {}, element("thead", {}, head), element("tbody", {}, ...lines));
  return [element("h3", {}, "Settings that differ in this row"), element("div", { class: "scroll", tabindex: "0" }, table)];
}

function media(cell, row, method) {
  const label = `${row.prompt}, ${method}`;
  const figures = [];
  if (cell.video) {
    const turntable = cell.video.endsWith(".gif")
      ? element("img", { class: "turntable", src: cell.video, alt: `Turntable of ${label}` })
      : element("video", {
          src: cell.video,
          loop: true,
          muted: true,
          autoplay: true,
          playsinline: true,
          controls: true,
          "aria-label": `Turntable of ${label}`,
        });
    turntable.muted = true; // the attribute counts only in a page's source
    figures.push(element("figure", {}, turntable, element("figcaption", {}, "Turntable")));
  }
  if (cell.sheet)
    figures.push(
      element("figure", {}, element("img", { src: cell.sheet, alt: `Views of ${label}` }), element("figcaption", {}, "Contact sheet")),
    );
  return figures.length ? [element("h3", {}, "Views"), element("div", { class: "media" }, ...figures)] : [];
}

function saving(cell, row, method) {
  if (!cell.asset) return [];
  const name = `${row.prompt}-${method}`.replace(/[^\p{L}\p{N}.+=-]+/gu, "-").replace(/^-|-$/g, "");
  const failed = element("span", { role: "alert" });
  const save = () =>
    loadAsset(cell.asset).then(
      (blob) => download(blob, `${name}.glb`),
      (error) => (failed.textContent = ` ${error.message}`),
    );
  return [
    element("h3", {}, "Model"),
    element("p", {}, element("button", { type: "button", onclick: save }, `Download GLB (${megabytes(cell.bytes)})`), failed),
  ];
}

function megabytes(bytes) {
  return bytes < 1e5 ? `${Math.max(1, Math.round(bytes / 1e3))} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

const MEANING = {
  share_clipped: "share of pixels clipped",
  norm_p50: "norm of the gradient per pixel, median",
  norm_p99: "99 % quantile",
  norm_max: "largest",
  threshold: "threshold",
  nonfinite_pixels: "pixels that were not finite",
  loss_sds: "loss",
};

/** Gradient statistics over the run: two drawings and the last values. */
function statistics(found) {
  const heading = element("h3", {}, "Gradient per pixel");
  if (!Object.keys(found).length) return [heading, element("p", { class: "quiet" }, "This run logged none.")];
  const charts = element("div", { class: "charts" });
  if (found.share_clipped) {
    const percent = found.share_clipped.map(([step, value]) => [step, 100 * value]);
    charts.append(chart("Pixels clipped, %", [{ name: "clipped", kind: "s1", points: percent }], false));
  }
  const norms = [
    ["p50", "s1", found.norm_p50],
    ["p99", "s2", found.norm_p99],
    ["max", "s3", found.norm_max],
    ["c", "limit", found.threshold],
  ];
  const series = norms
    .filter(([, , points]) => points)
    .map(([name, kind, points]) => ({ name, kind, points: points.filter(([, value]) => value > 0) }));
  if (series.some(({ kind, points }) => kind !== "limit" && points.length)) {
    charts.append(
      chart(
        "Norm per pixel before clipping (c: threshold)",
        series.filter(({ points }) => points.length),
        true,
      ),
    );
  }
  const lines = Object.entries(found).map(([name, points]) =>
    element(
      "tr",
      {},
      element("th", { scope: "row" }, MEANING[name]),
      element("td", { class: "number" }, lastValue(name, points.at(-1)[1])),
      element("td", { class: "number quiet" }, `step ${points.at(-1)[0]}`),
    ),
  );
  const table = element("div", { class: "scroll" }, element("table", {}, element("tbody", {}, ...lines)));
  return [heading, charts, element("p", { class: "quiet" }, "Last values"), table];
}

function lastValue(name, value) {
  return name === "share_clipped" ? `${(100 * value).toFixed(1)} %` : short(value);
}

/** A line drawing. series: [{name, kind (class of its colour and dashes), points: [[step, value]]}]; all are numbers or names of ours. */
function chart(label, series, logarithmic) {
  const [width, height, left, right, top, bottom] = [460, 230, 52, 58, 26, 40];
  const all = series.flatMap(({ points }) => points);
  const steps = all.map(([step]) => step);
  const [first, last] = [Math.min(...steps), Math.max(...steps)];
  const x = (step) => left + (width - left - right) * (first === last ? 0.5 : (step - first) / (last - first));
  const scale = logarithmic ? Math.log10 : (value) => value;
  const ticks = logarithmic ? decades(all.map(([, value]) => value)) : rounded(Math.max(...all.map(([, value]) => value)));
  const [low, high] = [scale(ticks[0]), scale(ticks.at(-1))];
  const y = (value) => height - bottom - ((height - top - bottom) * (scale(value) - low)) / (high - low);
  const parts = [
    `<text x="${left}" y="14">${label}</text>`,
    `<path class="axis" d="M${left} ${top}V${height - bottom}H${width - right}"/>`,
  ];
  for (const tick of ticks) {
    parts.push(
      `<path class="axis" d="M${left} ${y(tick)}H${width - right}"/><text x="${left - 6}" y="${y(tick) + 4}" text-anchor="end">${short(tick)}</text>`,
    );
  }
  for (const step of new Set([first, last]))
    parts.push(`<text x="${x(step)}" y="${height - bottom + 16}" text-anchor="middle">${step}</text>`);
  parts.push(`<text x="${(left + width - right) / 2}" y="${height - 6}" text-anchor="middle">step</text>`);
  const ends = [];
  for (const { name, kind, points } of series) {
    const corners = points.map(([step, value]) => `${x(step).toFixed(1)} ${y(value).toFixed(1)}`);
    parts.push(
      points.length > 1
        ? `<path class="series ${kind}" d="M${corners.join("L")}"/>`
        : `<circle class="${kind}" cx="${x(points[0][0])}" cy="${y(points[0][1])}" r="4"/>`,
    );
    ends.push({ name, kind, y: y(points.at(-1)[1]) + 4 });
  }
  ends.sort((one, other) => one.y - other.y);
  ends.forEach((end, index) => {
    if (index) end.y = Math.max(end.y, ends[index - 1].y + 13); // names do not cover each other
    parts.push(`<text class="${end.kind}" x="${width - right + 6}" y="${end.y}">${end.name}</text>`);
  });
  const box = element("div");
  box.innerHTML = `<svg class="chart" viewBox="0 0 ${width} ${height}" role="img" aria-label="${label}, over steps ${first} to ${last}">${parts.join("")}</svg>`;
  return box;
}

/** Powers of ten around the values, at most six of them. */
function decades(values) {
  const low = Math.floor(Math.log10(Math.min(...values)));
  const high = Math.max(low + 1, Math.ceil(Math.log10(Math.max(...values))));
  const stride = Math.ceil((high - low) / 5);
  const count = Math.ceil((high - low) / stride);
  return Array.from({ length: count + 1 }, (_, index) => 10 ** (low + index * stride));
}

/** Round numbers from 0 to at least `largest`. */
function rounded(largest) {
  if (!(largest > 0)) return [0, 1];
  const power = 10 ** Math.floor(Math.log10(largest / 4));
  const stride = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size * 4 >= largest);
  return Array.from({ length: Math.ceil(largest / stride) + 1 }, (_, index) => index * stride);
}

gallery();
