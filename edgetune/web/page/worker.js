// Everything heavy, away from the page: decoding, the frozen part, training, prediction. It answers messages
// {id, task, ...} with {id, value} or {id, error}, and tells {told, ...} of a training on its way.

import { PageError, inWords } from "./core/errors.js";
import { checkedFile, hex, readManifest, streamFloats, variantNamed } from "./core/manifest.js";
import { Budget, capRuntimeMemory } from "./core/memory.js";
import { normalise } from "./core/preprocess.js";
import { openPrefix, openTraining, softmax } from "./core/session.js";
import { heldOut, joined, scheduleOf, train } from "./core/train.js";
import { pixelsOf } from "./images.js";
import { forget, keep, kept } from "./keep.js";

const ROOT = new URL("./", import.meta.url);
const PREFIX_BATCH = 4;
const MOST_THREADS = 4;

let page, manifest, key, budget, ort; // of the folder; `ort` is loaded when it is first needed
let prefix = null; // {variant, ...} of openPrefix
let session = null; // of openTraining
let trained = null; // {variant, classNames, settings, epoch, ...}: what the session's parameters are
let stopWanted = false;
const cache = new Map(); // variant and picture -> what enters the suffix

async function fetched(path) {
  const response = await fetch(new URL(path, ROOT)).catch(() => null);
  if (response === null) throw new PageError(`${path} can't be loaded: is the server still running?`);
  if (!response.ok) throw new PageError(`${path} is missing (${response.status}). Copy the whole folder, or export it again.`);
  return new Uint8Array(await response.arrayBuffer());
}

const files = (path) => checkedFile(manifest, path, fetched);

async function runtime() {
  if (ort) return ort;
  capRuntimeMemory(budget);
  let loaded;
  try {
    loaded = await import(new URL("ort/ort.training.wasm.min.mjs", ROOT).href);
  } catch {
    throw new PageError(
      "The page's runtime can't be loaded (folder ort). `edgetune serve` prints the two lines that get and add it.",
      { fatal: true },
    );
  }
  loaded.env.wasm.wasmPaths = {
    mjs: new URL("runtime.js", ROOT).href,
    wasm: new URL("ort/ort-training-wasm-simd-threaded.wasm", ROOT).href,
  };
  loaded.env.wasm.numThreads = threads();
  ort = loaded;
  return ort;
}

function threads() {
  const asked = Number(new URL(self.location.href).searchParams.get("threads"));
  if (!self.crossOriginIsolated) return 1;
  return asked >= 1 ? Math.min(asked, MOST_THREADS) : Math.min(MOST_THREADS, Math.ceil(navigator.hardwareConcurrency / 2));
}

const memory = () => ({ heapBytes: budget.heapBytes, heldBytes: budget.heldBytes, capBytes: budget.capBytes });

// ------------------------------------------------------------------------------------------------------------- streams

async function prefixOf(variant) {
  if (prefix?.variant !== variant.name) {
    await prefix?.release();
    prefix = null;
    prefix = { variant: variant.name, ...(await openPrefix(await runtime(), files, manifest, variant, { budget })) };
  }
  return prefix;
}

async function releaseAll() {
  await prefix?.release();
  await session?.release();
  prefix = session = trained = null;
}

function imagesOf(pictures) {
  const floats = 3 * manifest.preprocess.height_px * manifest.preprocess.width_px;
  const images = new Float32Array(pictures.length * floats);
  pictures.forEach((rgb, place) => normalise(rgb, manifest.preprocess, images, place * floats));
  return images;
}

// What enters the suffix, for each picture: computed once, kept while the page is open.
async function cached(items, variant, told) {
  const wanted = new Set(items.map((item) => `${variant.name} ${item.id}`));
  for (const [name, stream] of cache) {
    if (wanted.has(name)) continue;
    cache.delete(name);
    budget.release(stream.byteLength);
  }
  const missing = items.filter((item) => !cache.has(`${variant.name} ${item.id}`));
  const floats = streamFloats(manifest, variant);
  for (let start = 0; start < missing.length; start += PREFIX_BATCH) {
    if (stopWanted) return;
    const some = missing.slice(start, start + PREFIX_BATCH);
    const found = await (await prefixOf(variant)).features(imagesOf(some.map((item) => item.rgb)));
    for (const [place, item] of some.entries()) {
      budget.hold(floats * 4, "what the frozen part makes of the pictures");
      cache.set(`${variant.name} ${item.id}`, found.slice(place * floats, (place + 1) * floats));
    }
    await told({ told: "frozen", done: start + some.length, total: missing.length, ...memory() });
  }
}

// ------------------------------------------------------------------------------------------------------------ training

// `goesOn`: from where the kept training ended, with its pictures and settings.
async function trainOn({ items, classNames, settings, goesOn }) {
  stopWanted = false;
  const variant = variantNamed(manifest, settings.variant);
  const tell = async (message) => {
    postMessage(message);
    await new Promise((resolve) => setTimeout(resolve)); // so that a wish to stop is heard
  };
  const start = goesOn ? await kept("parameters", key) : null;
  if (goesOn && !start) throw new PageError("What was kept in this browser is gone. Start a new training.");
  await runtime();
  await releaseAll();
  holdPictures(items);
  const labels = items.map((item) => item.label);
  const aside = heldOut(labels, settings.seed);
  if (variant.split_block > 0) {
    await cached(items, variant, tell);
    await prefix?.release(); // its memory goes to what trains
    prefix = null;
    if (stopWanted) return null;
  }
  const pictures = new Map(items.map((item) => [item.id, item.rgb]));
  const floats = streamFloats(manifest, variant);
  const streamOf = (places) =>
    variant.split_block === 0
      ? imagesOf(places.map((place) => pictures.get(items[place].id)))
      : joined(places.map((place) => cache.get(`${variant.name} ${items[place].id}`)), floats);
  const first = start?.state.step ?? 0;
  const schedule = scheduleOf(labels.length - aside.size, settings, first);
  if (start && start.totalSteps !== schedule.totalSteps) {
    throw new PageError("The pictures are not those of the training that was kept: start a new training with them.");
  }
  session = await openTraining(ort, files, manifest, variant, { optimizer: settings.optimizer, schedule, budget });
  if (start) await session.setParameters(new Float32Array(start.parameters));
  const noteKept = await keepPictures({ items, classNames });
  const record = (state, epoch, right) => ({
    variant: variant.name, classNames, settings, state, epoch, right, aside: aside.size,
    totalSteps: schedule.totalSteps, names: items.map((item) => item.name), savedAt: Date.now(),
  });
  trained = record(start?.state ?? { step: 0, steps: [] }, start?.epoch ?? 0, start?.right ?? null);
  const began = performance.now();
  const state = await train({
    session, manifest, settings: { ...settings, classes: classNames.length }, stopped: () => stopWanted,
    data: { labels, aside, streamOf },
    from: start?.state,
    told: {
      step(event) {
        const seconds = (performance.now() - began) / 1000;
        const secondsLeft = (seconds / (event.step - first)) * (event.total - event.step);
        return tell({ told: "step", ...event, secondsLeft, ...memory() });
      },
      async epoch({ epoch, state, right }) {
        trained = record(state, epoch, right);
        const saved = await keepParameters();
        await tell({ told: "epoch", epoch, right, aside: aside.size, saved, ...memory() });
      },
    },
  });
  // Stopped between two epochs: what was learnt since the last one is in the session and, as an epoch's part, kept too.
  trained = { ...trained, state };
  const saved = await keepParameters();
  return { ...summary(), stopped: stopWanted && state.step < schedule.totalSteps, saved, noteKept };
}

let picturesHeld = 0;

function holdPictures(items) {
  budget.release(picturesHeld);
  picturesHeld = 0;
  const bytes = items.reduce((sum, item) => sum + item.rgb.byteLength, 0);
  budget.hold(bytes, `${items.length} pictures`);
  picturesHeld = bytes;
}

async function keepPictures(value) {
  try {
    await keep("pictures", key, value);
    return null;
  } catch (error) {
    return `The pictures could not be kept in this browser (${error?.name ?? error}).`;
  }
}

// Whether it worked: a private window or a full disk must not end a training.
async function keepParameters() {
  try {
    const parameters = (await session.parameters()).buffer;
    await keep("parameters", key, { ...trained, parameters });
    return true;
  } catch (error) {
    if (error?.fatal) throw error;
    return false;
  }
}

function summary() {
  if (trained === null) return null;
  const { variant, classNames, settings, epoch, right, aside, totalSteps, savedAt, state } = trained;
  return { variant, classNames, settings, epoch, right, aside, totalSteps, savedAt, step: state.step };
}

// ----------------------------------------------------------------------------------------------------------- messages

// Parameters into a session that only predicts (or is trained further).
async function bringBack() {
  const record = await kept("parameters", key);
  if (!record) throw new PageError("Nothing is kept in this browser.");
  await runtime();
  await releaseAll();
  const variant = variantNamed(manifest, record.variant);
  const schedule = { peakRate: 0, warmupSteps: 0, totalSteps: 1 };
  session = await openTraining(ort, files, manifest, variant, { optimizer: "sgd", schedule, budget });
  await session.setParameters(new Float32Array(record.parameters));
  const { parameters, ...rest } = record;
  trained = rest;
  const pictures = await kept("pictures", key).catch(() => null);
  return { ...summary(), items: pictures?.items ?? [] };
}

async function predict({ blob, name }) {
  if (session === null) throw new PageError("Train first, or bring back what was kept: then there is something to predict with.");
  const { rgb, width, height } = await pixelsOf(blob, name, manifest.preprocess, budget);
  const { variant } = session;
  const images = imagesOf([rgb]);
  const stream = variant.split_block === 0 ? images : await (await prefixOf(variant)).features(images);
  const [logits] = await session.logits(stream);
  return { rgb, width, height, shares: softmax(logits, trained.classNames.length), classNames: trained.classNames };
}

const tasks = {
  async open() {
    page = JSON.parse(new TextDecoder().decode(await fetched("page.json")));
    const text = await fetched("manifest.json");
    manifest = readManifest(new TextDecoder().decode(text));
    key = self.crypto?.subtle ? hex(new Uint8Array(await crypto.subtle.digest("SHA-256", text))) : manifest.model;
    budget = new Budget(page.cap_bytes);
    const found = await kept("parameters", key).catch(() => null);
    const { parameters, state, ...about } = found ?? {};
    return { page, manifest, kept: found ? { ...about, step: state.step } : null, threads: threads(), ...memory() };
  },
  prepare: ({ blob, name }) => pixelsOf(blob, name, manifest.preprocess, budget),
  train: trainOn,
  async stop() {
    stopWanted = true;
  },
  predict,
  bringBack,
  async parameters() {
    if (session === null) throw new PageError("There are no parameters yet: train first.");
    return { values: await session.parameters(), variant: session.variant.name };
  },
  // What was done, step by step: losses, tokens, which pictures.
  async record() {
    if (trained === null) throw new PageError("There is no training yet.");
    return trained;
  },
  async forget() {
    await forget(key);
  },
};

let busy = Promise.resolve(); // one task at a time; a wish to stop goes past them

self.onmessage = ({ data: { id, task, ...request } }) => {
  const answer = async () => {
    try {
      postMessage({ id, value: await tasks[task](request) });
    } catch (error) {
      const said = inWords(error, "working", budget);
      postMessage({ id, error: { message: said.message, fatal: said.fatal } });
    }
  };
  if (task === "stop") answer();
  else busy = busy.then(answer);
};
