// The page: what it shows and what its buttons do. Everything heavy is in the worker.

import { camera } from "./camera.js";
import { PageError } from "./core/errors.js";
import { microBatch, neededBytes, preferred } from "./core/plan.js";
import { heldOut, stepsOf } from "./core/train.js";
import { Pictures } from "./pictures.js";
import { at, curve, draw, duration, guesses, mib, percent, save, show } from "./view.js";
import { Work } from "./work.js";

const SEED = 0;
const SGD_TIMES = 100; // SGD's default rate is so many times AdamW's
// Of a runtime that has loaded nothing: it begins with so much.
const RUNTIME_BYTES = 20 * 2 ** 20;

// What can't be changed while it trains.
const FROZEN =
  "#settings input:not([name=variant]), #settings select, #classes input, #classes .row button, #add-class, #remove, " +
  "#try-buttons button, #try-file, #take button";

let opened, manifest, pictures; // of the folder
let running = false;
let kept = null; // what this browser keeps, in short
let losses = [];

const work = new Work(told);

function say(error) {
  const notice = at("notice");
  notice.textContent = error.message ?? String(error);
  show(notice, true);
  notice.scrollIntoView({ block: "nearest" });
  if (!(error instanceof PageError)) console.error(error);
  if (error.fatal) restart();
}

// A worker whose runtime gave up is replaced; what was kept each epoch is offered again.
async function restart() {
  work.start();
  setRunning(false);
  show(at("try-buttons"), false);
  show(at("take"), false);
  try {
    opened = await work.call("open");
    offerKept(opened.kept);
  } catch (error) {
    at("model").textContent = error.message;
  }
}

// A button's work: what goes wrong is said, and the last message goes away.
function doing(action) {
  return async (event) => {
    event?.preventDefault();
    show(at("notice"), false);
    try {
      await action(event);
    } catch (error) {
      say(error);
    }
  };
}

// ------------------------------------------------------------------------------------------------------------- opening

async function open() {
  opened = await work.call("open");
  manifest = opened.manifest;
  const { shape, preprocess } = manifest;
  at("model").textContent =
    `Model: ${manifest.model.includes(":") ? manifest.architecture : manifest.model}, ${shape.depth} blocks, pictures of ${preprocess.width_px} × ${preprocess.height_px} ` +
    `pixels, up to ${shape.classes} classes.`;
  const cap = `Memory cap: ${mib(opened.capBytes)}${opened.page.device ? ` (${opened.page.device})` : ""}`;
  at("isolation").textContent = self.crossOriginIsolated
    ? `${cap}. Threads: ${opened.threads}.`
    : `${cap}. One thread: this page is not isolated (its server sends no COOP and COEP headers, or it is not localhost or HTTPS).`;
  pictures = new Pictures(manifest, {
    prepare: (file) => work.call("prepare", { blob: file, name: file.name }),
    failed: say,
    begun: () => show(at("notice"), false),
    changed: () => pictures && plan(),
    shoot: (taken) => doing(() => camera(taken))(),
  });
  show(at("prunes-row"), manifest.adaptive !== null);
  choices();
  offerKept(opened.kept);
  setRate();
  plan();
}

function choices() {
  for (const variant of manifest.variants) {
    const row = document.createElement("div");
    row.className = "choice";
    const input = document.createElement("input");
    Object.assign(input, { type: "radio", name: "variant", value: variant.name, id: `variant-${variant.name}` });
    input.onchange = () => {
      at("variants").dataset.chosen = "yes";
      plan();
    };
    const label = document.createElement("label");
    label.htmlFor = input.id;
    const about = document.createElement("span");
    about.className = "quiet";
    about.id = `about-${variant.name}`;
    label.append(inWords(variant), about);
    row.append(input, label);
    at("variants").append(row);
  }
}

function inWords({ split_block: split, embeddings_train: embeddings }) {
  const above = manifest.shape.depth - split;
  if (embeddings) return "Everything, the embeddings too";
  if (split === 0) return "All blocks and the classifier";
  if (above === 0) return "The classifier alone";
  return `The upper ${above} blocks and the classifier`;
}

function setRate() {
  const peak = manifest.schedule.peak_rate;
  at("rate").value = at("optimizer").value === "sgd" ? +(peak * SGD_TIMES).toPrecision(3) : peak;
}

// ------------------------------------------------------------------------------------------------------------ settings

function settings() {
  const chosen = document.querySelector("[name=variant]:checked");
  const learnt = learning();
  const batch = Math.max(1, Math.min(Math.trunc(Number(at("batch").value)) || 1, Math.max(1, learnt)));
  return {
    variant: chosen?.value,
    epochs: Math.max(1, Math.trunc(Number(at("epochs").value)) || 1),
    optimizer: at("optimizer").value,
    rate: Number(at("rate").value),
    batch,
    prunes: at("prunes").checked && manifest.adaptive !== null,
    seed: SEED,
  };
}

// How many pictures are learnt from: the others are kept aside.
function learning() {
  const labels = pictures.items.map((item) => item.label);
  return labels.length - heldOut(labels, SEED).size;
}

// What fits under the cap, and why training can't begin yet.
function plan() {
  const wanted = settings();
  const given = { ...wanted, pictures: pictures.items.length, roomBytes: opened.capBytes - RUNTIME_BYTES };
  const fits = new Map(manifest.variants.map((variant) => [variant.name, microBatch(manifest, variant, given)]));
  for (const variant of manifest.variants) {
    const [input, about] = [at(`variant-${variant.name}`), at(`about-${variant.name}`)];
    const bytes = neededBytes(manifest, variant, { ...given, microBatch: fits.get(variant.name) || 1 });
    input.disabled = running || fits.get(variant.name) === 0;
    if (bytes === null) about.textContent = "memory was not measured";
    else if (fits.get(variant.name) === 0) about.textContent = `needs about ${mib(bytes + RUNTIME_BYTES)}, over the cap`;
    else about.textContent = `about ${mib(bytes + RUNTIME_BYTES)}${variant.split_block ? "; what lies below is computed once" : ""}`;
  }
  if (!at("variants").dataset.chosen || !fits.get(wanted.variant)) {
    const best = preferred(manifest.variants, (variant) => fits.get(variant.name) > 0);
    at(`variant-${best.name}`).checked = true;
    wanted.variant = best.name;
  }
  const lacking = pictures.lacking || (fits.get(wanted.variant) ? "" : "No part of this model fits under the cap.");
  const { perEpoch, total } = stepsOf(learning(), wanted);
  const size = fits.get(wanted.variant);
  const cut = size < wanted.batch ? `, in parts of ${size} to fit the cap` : "";
  at("plan").textContent =
    lacking || `${total} steps, ${perEpoch} in each epoch, of ${wanted.batch} pictures at most${cut}.`;
  at("train").disabled = running || lacking !== "";
  return { ...wanted, microBatch: Math.max(1, size) };
}

// ------------------------------------------------------------------------------------------------------------ training

function setRunning(now) {
  running = now;
  show(at("stop"), now);
  show(at("train"), !now);
  show(at("go-on"), !now && goesOn());
  for (const control of document.querySelectorAll(FROZEN)) control.disabled = now;
  at("bring-back").disabled = at("forget").disabled = now;
  plan();
}

const goesOn = () => kept?.items !== undefined && kept.step < kept.totalSteps && kept.items.length > 0;

async function trainNow(asked, items, classNames, from) {
  losses = from ? losses : [];
  setRunning(true);
  show(at("kept"), false);
  show(at("guess"), false); // of other parameters
  show(at("running"), true);
  show(at("curve-figure"), false);
  at("phase").textContent = "Loading the runtime";
  at("progress").removeAttribute("value");
  try {
    const plain = items.map(({ id, name, label, rgb }) => ({ id, name, label, rgb }));
    const done = await work.call("train", { items: plain, classNames, settings: asked, goesOn: from });
    if (done === null) {
      at("phase").textContent = "Stopped before the first step";
      return;
    }
    kept = { ...done, items: plain };
    at("phase").textContent = done.stopped ? `Stopped after step ${done.step} of ${done.totalSteps}` : "Trained";
    at("said").textContent = at("phase").textContent;
    ready(done);
    if (done.noteKept) say(new PageError(done.noteKept));
  } catch (error) {
    at("phase").textContent = "Training ended early";
    throw error;
  } finally {
    at("progress").value = at("progress").value || 0;
    setRunning(false);
  }
}

function told(event) {
  if (event.told === "frozen") {
    at("phase").textContent = `Computing the frozen part: picture ${event.done} of ${event.total}`;
    at("progress").value = event.done / event.total;
  }
  if (event.told === "step") {
    losses.push(event.loss);
    at("phase").textContent = `Epoch ${event.epoch}, step ${event.step} of ${event.total}`;
    at("progress").value = event.step / event.total;
    at("loss").textContent = Number.isFinite(event.loss) ? event.loss.toFixed(4) : "no number";
    at("tokens").textContent = percent(event.kept);
    at("left").textContent = duration(event.secondsLeft);
    show(at("curve-figure"), curve(at("curve"), at("curve-text"), losses));
  }
  if (event.told === "epoch") {
    if (event.right !== null) at("right").textContent = `${event.right} of ${event.aside}`;
    at("said").textContent = `Epoch ${event.epoch} done, loss ${losses.at(-1)?.toFixed(2)}.`;
    at("saved").textContent = event.saved
      ? `Parameters of epoch ${event.epoch} are kept in this browser.`
      : "This browser keeps nothing (a private window, or its disk is full): download the parameters before you leave.";
  }
  at("heap").textContent = `${mib(event.heapBytes)} heap of ${mib(event.capBytes)}`;
  at("heap-more").textContent = `, and ${mib(event.heldBytes)} of pictures and features`;
  at("heap-meter").value = (event.heapBytes + event.heldBytes) / event.capBytes;
}

// There are parameters: to predict with, to download.
function ready({ variant, right, aside }) {
  if (right !== null && right !== undefined) at("right").textContent = `${right} of ${aside}`;
  show(at("try-help"), false);
  show(at("try-buttons"), true);
  show(at("take-help"), false);
  show(at("take"), true);
  at("import-line").textContent =
    `edgetune import-params parameters-${variant}.bin --artifacts THIS_FOLDER --variant ${variant} --labels labels.txt --output model`;
}

// ---------------------------------------------------------------------------------------------------------------- kept

function offerKept(found) {
  kept = found;
  show(at("kept"), found !== null);
  if (found === null) return;
  const when = new Date(found.savedAt).toLocaleString();
  at("kept-text").textContent =
    `A training of ${found.classNames.join(", ")} (${found.variant}): step ${found.step} of ${found.totalSteps}, ${when}.`;
}

async function bringBack() {
  const found = await work.call("bringBack");
  kept = found;
  if (found.items.length > 0) pictures.restore(found.classNames, found.items);
  at("variants").dataset.chosen = "yes";
  at(`variant-${found.variant}`).checked = true;
  for (const name of ["epochs", "optimizer", "rate", "batch"]) at(name).value = found.settings[name];
  at("prunes").checked = found.settings.prunes;
  show(at("kept"), false);
  ready(found);
  at("saved").textContent = `Parameters of step ${found.step} were brought back.`;
  setRunning(false);
}

// ------------------------------------------------------------------------------------------------------------- wiring

async function guess(file) {
  show(at("guess"), false);
  const found = await work.call("predict", { blob: file, name: file.name });
  draw(at("guess-canvas"), found.rgb, manifest.preprocess);
  const best = guesses(at("guess-list"), found.classNames, found.shares);
  at("guess-text").textContent = `${found.classNames[best]} (${percent(found.shares[best])})`;
  show(at("guess"), true);
}

at("settings").addEventListener("submit", doing(() => trainNow(plan(), pictures.items, pictures.names, false)));
at("go-on").onclick = doing(() => trainNow(kept.settings, kept.items, kept.classNames, true));
at("stop").onclick = doing(async () => {
  at("phase").textContent = "Stopping after this step";
  await work.call("stop");
});
at("bring-back").onclick = doing(bringBack);
at("forget").onclick = doing(async () => {
  await work.call("forget");
  offerKept(null);
});
at("optimizer").onchange = () => {
  setRate();
  plan();
};
for (const name of ["epochs", "rate", "batch", "prunes"]) at(name).oninput = () => plan();
at("try-file").onchange = doing(async ({ target }) => {
  const [file] = target.files;
  target.value = "";
  if (file) await guess(file);
});
at("try-camera").onclick = doing(() => {
  const finish = (file) => {
    at("camera").close();
    return doing(() => guess(file))();
  };
  return camera(finish);
});
at("download").onclick = doing(async () => {
  const { values, variant } = await work.call("parameters");
  save(`parameters-${variant}.bin`, values, "application/octet-stream");
});
at("download-labels").onclick = doing(async () => {
  const record = await work.call("record");
  save("labels.txt", record.classNames.map((name) => `${name}\n`).join(""), "text/plain");
});
at("download-record").onclick = doing(async () => {
  save("training.json", JSON.stringify(await work.call("record"), null, 1), "application/json");
});

open().catch((error) => {
  at("model").textContent = "";
  say(error);
});
