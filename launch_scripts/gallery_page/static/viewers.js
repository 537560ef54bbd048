"use strict";
// What the gallery and the study share: models that load from disk, viewers that exist only while they are near the screen, and
// cameras that move together.

/** An element with attributes (or, with a leading "on", listeners) and children, which may be text. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const loading = new Map(); // asset -> promise of its blob
const received = new Map();

/** Called by each file assets/ASSET.js with the model as base64. */
function receiveAsset(asset, base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let index = 0; index < text.length; index++) bytes[index] = text.charCodeAt(index);
  received.set(asset, new Blob([bytes], { type: "model/gltf-binary" }));
}

/** The GLB as a blob. It comes as a script because a page on disk may run one beside it, but may not fetch a file. */
function loadAsset(asset) {
  if (!loading.has(asset)) {
    const script = element("script", { src: `assets/${asset}.js` });
    const promise = new Promise((resolve, reject) => {
      script.addEventListener("load", () =>
        received.has(asset) ? resolve(received.get(asset)) : reject(new Error(`assets/${asset}.js is damaged`)),
      );
      script.addEventListener("error", () => reject(new Error(`assets/${asset}.js cannot be read`)));
    }).finally(() => {
      // Nothing is kept here: whoever asked owns the blob, so that a long page does not hold all of its models.
      script.remove();
      received.delete(asset);
      loading.delete(asset);
    });
    loading.set(asset, promise);
    document.head.append(script);
  }
  return loading.get(asset);
}

/** Saves a blob as a file of this name. */
function download(blob, name) {
  const address = URL.createObjectURL(blob);
  const link = element("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 60000);
}

const DEFAULT_VIEW = { theta: 0, phi: (75 * Math.PI) / 180, zoom: null, fov: null, pan: [0, 0, 0] };

/** Cameras of rows: those of one row move together, and with `together` those of all rows. */
class Cameras {
  constructor() {
    this.together = false;
    this.views = new Map(); // row -> view; see Stage.view
    this.stages = new Set(); // those whose model is loaded
  }

  viewOf(row) {
    return this.views.get(row) ?? DEFAULT_VIEW;
  }

  moved(stage) {
    const view = stage.view();
    for (const row of this.together ? this.rows() : [stage.row]) this.views.set(row, view);
    for (const other of this.stages) if (other !== stage && (this.together || other.row === stage.row)) other.show(view);
    this.last = view;
  }

  setTogether(together) {
    this.together = together;
    if (!together || !this.last) return;
    for (const row of this.rows()) this.views.set(row, this.last);
    for (const stage of this.stages) stage.show(this.last);
  }

  reset() {
    this.views.clear();
    this.last = undefined;
    for (const stage of this.stages) stage.show(DEFAULT_VIEW);
  }

  rows() {
    return [...new Set([...document.querySelectorAll(".stage[data-row]")].map((place) => place.dataset.row))];
  }
}

/** One model: a still picture until its viewer, made when it comes near the screen, has loaded. */
class Stage {
  /** option: {asset, front (degrees), still}; label: what a screen reader says; row: text, the same for cameras that move together. */
  constructor(option, label, row, cameras) {
    Object.assign(this, { option, label, row, cameras, viewer: null, turn: null });
    this.place = element(
      "div",
      { class: "stage", "data-row": row },
      option.still ? element("img", { src: option.still, alt: "", loading: "lazy" }) : null,
    );
    this.place.stage = this;
  }

  async mount() {
    if (this.viewer) return;
    const turn = (this.turn = {}); // a later mount or unmount takes it away
    await new Promise((resolve) => setTimeout(resolve, 100)); // not for a row that is only scrolled past
    if (this.turn !== turn) return;
    this.place.querySelector(".message")?.remove();
    try {
      const blob = await loadAsset(this.option.asset);
      if (this.turn === turn) this.create(blob);
    } catch (error) {
      if (this.turn === turn) this.fail(error.message);
    }
  }

  create(blob) {
    this.address = URL.createObjectURL(blob);
    // A viewer that was dropped while it loaded still says so.
    const own = (act) => (event) => event.currentTarget === this.viewer && act(event);
    this.viewer = element("model-viewer", {
      src: this.address,
      alt: this.label,
      loading: "eager",
      "camera-controls": true,
      "disable-zoom": true,
      "touch-action": "pan-y",
      "interaction-prompt": "none",
      "environment-image": "neutral",
      "shadow-intensity": "0",
      "camera-orbit": `${this.option.front}deg 75deg auto`,
      // A wheel that is turned over a page of models scrolls the page; one that is turned over the model in focus zooms.
      onfocusin: own(() => (this.viewer.disableZoom = false)),
      onfocusout: own(() => (this.viewer.disableZoom = true)),
      onload: own(() => this.loaded()),
      onerror: own(() => this.fail("This model cannot be shown.")),
      "oncamera-change": own((event) => event.detail.source === "user-interaction" && this.cameras.moved(this)),
    });
    this.place.append(this.viewer);
  }

  unmount() {
    this.turn = null;
    if (!this.viewer) return;
    this.cameras.stages.delete(this);
    const viewer = this.viewer;
    this.viewer = null;
    viewer.src = null; // stops what is being loaded
    viewer.remove(); // the element frees its part of the one WebGL context that all of them share
    this.place.classList.remove("loaded");
    URL.revokeObjectURL(this.address);
  }

  loaded() {
    const target = this.viewer.getCameraTarget();
    this.own = { radius: this.viewer.getCameraOrbit().radius, target: [target.x, target.y, target.z] };
    this.place.classList.add("loaded");
    this.cameras.stages.add(this);
    const view = this.cameras.viewOf(this.row);
    if (view !== DEFAULT_VIEW) this.show(view);
  }

  fail(message) {
    this.unmount();
    this.place.append(element("div", { class: "message", role: "alert" }, message));
  }

  /** The camera in terms that hold for models of any size: angles from the front in radians, lengths in radii of the first camera. */
  view() {
    const { theta, phi, radius } = this.viewer.getCameraOrbit();
    const target = this.viewer.getCameraTarget();
    const pan = [target.x, target.y, target.z].map((value, axis) => (value - this.own.target[axis]) / this.own.radius);
    const front = (this.option.front * Math.PI) / 180;
    return { theta: theta - front, phi, zoom: radius / this.own.radius, fov: this.viewer.getFieldOfView(), pan };
  }

  show(view) {
    const front = (this.option.front * Math.PI) / 180;
    const radius = view.zoom === null ? "auto" : `${view.zoom * this.own.radius}m`;
    this.viewer.cameraOrbit = `${view.theta + front}rad ${view.phi}rad ${radius}`;
    this.viewer.fieldOfView = view.fov === null ? "auto" : `${view.fov}deg`;
    this.viewer.cameraTarget = view.pan.some(Boolean)
      ? view.pan.map((value, axis) => `${value * this.own.radius + this.own.target[axis]}m`).join(" ")
      : "auto auto auto";
    this.viewer.jumpCameraToGoal();
  }
}

// Browsers stop a page that holds too many models: only those within half a screen of what is seen exist.
const nearby = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) isIntersecting ? target.stage.mount() : target.stage.unmount();
  },
  { rootMargin: "50% 0px" },
);

// An address of a blob is used once, so a model that left the screen is not to be kept for the next use.
customElements.whenDefined("model-viewer").then((kind) => (kind.modelCacheSize = 0));
