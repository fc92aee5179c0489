// The page's own modules in Node, driven by the tests: `node core.mjs JOB < request.json > answer.json`.

import fs from "node:fs";
import path from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";

const core = path.join(path.dirname(fileURLToPath(import.meta.url)), "../../edgetune/web/page/core");
const load = (name) => import(pathToFileURL(path.join(core, name)).href);
const floats = (file) => {
  const bytes = fs.readFileSync(file);
  return new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
};

const jobs = {
  // Raw RGB files -> what `prepare` makes of them, one after the other in `out`.
  async prepare({ pictures, out }) {
    const { prepare, normalise } = await load("preprocess.js");
    const made = [];
    for (const { file, width, height, preprocess } of pictures) {
      const rgb = fs.readFileSync(file);
      const rows = (top, count) => {
        const rgba = new Uint8Array(width * count * 4).fill(255);
        for (let pixel = 0; pixel < width * count; pixel++) {
          rgba.set(rgb.subarray((top * width + pixel) * 3, (top * width + pixel) * 3 + 3), pixel * 4);
        }
        return rgba;
      };
      const pixels = prepare({ width, height, rows }, preprocess);
      const values = normalise(pixels, preprocess, new Float32Array(pixels.length));
      made.push(Buffer.from(pixels), Buffer.from(values.buffer));
    }
    fs.writeFileSync(out, Buffer.concat(made));
    return {};
  },

  // Deltas of each step -> the tokens that each step sees.
  async tokens({ manifest, variant, alpha, deltas }) {
    const { initialBudgets, moved, tokensOf } = await load("tokens.js");
    const chosen = manifest.variants.find((each) => each.name === variant);
    let state = initialBudgets(manifest, chosen);
    const tokens = [tokensOf(state, manifest, chosen)];
    for (const each of deltas) {
      state = moved(state, each, alpha, manifest.adaptive.token_floor[variant]);
      tokens.push(tokensOf(state, manifest, chosen));
    }
    return { tokens, budgets: state.budgets };
  },

  // Steps of given batches and selections: losses, deltas, and the parameters after each.
  async steps({ artifacts, ort, variant, optimizer, schedule, batches, cap_mib: cap, each_from: eachFrom, out }) {
    const { runtime, manifest, files, budget } = await opened(artifacts, ort, cap);
    const { openPrefix, openTraining } = await load("session.js");
    const { variantNamed, streamFloats } = await load("manifest.js");
    const chosen = variantNamed(manifest, variant);
    const given = batches.map((batch) => ({ ...batch, stream: floats(batch.images) }));
    if (chosen.prefix_graph !== null) {
      const prefix = await openPrefix(runtime, files, manifest, chosen, { budget });
      for (const batch of given) batch.stream = await prefix.features(batch.stream);
      await prefix.release();
    }
    const size = streamFloats(manifest, chosen);
    const session = await openTraining(runtime, files, manifest, chosen, { optimizer, schedule, budget });
    const found = [];
    const parameters = [];
    for (const { stream, labels, tokens, cut } of given) {
      if (eachFrom) await session.setParameters(floats(eachFrom));
      const part = cut ?? labels.length;
      const parts = [];
      for (let at = 0; at < labels.length; at += part) {
        const some = labels.slice(at, at + part);
        parts.push({ stream: stream.slice(at * size, (at + some.length) * size), labels: some });
      }
      found.push(await session.step(parts, tokens));
      parameters.push(Buffer.from((await session.parameters()).buffer));
    }
    const logits = (await session.logits(given[0].stream)).map((row) => [...row]);
    fs.writeFileSync(out, Buffer.concat(parameters));
    return { steps: found, logits, heap_bytes: budget.heapBytes };
  },

  // The whole loop, as the worker runs it.
  async train({ artifacts, ort, variant, settings, images, labels, out, interrupted_at: interrupted }) {
    const { runtime, manifest, files, budget } = await opened(artifacts, ort);
    manifest.adaptive.token_multiple = 1; // with 16 tokens, multiples of 8 would hide what happens
    const { openPrefix, openTraining } = await load("session.js");
    const { variantNamed, streamFloats } = await load("manifest.js");
    const { heldOut, joined, scheduleOf, train } = await load("train.js");
    const chosen = variantNamed(manifest, variant);
    const prefix = await openPrefix(runtime, files, manifest, chosen, { budget });
    const all = await prefix.features(floats(images));
    await prefix.release();
    const size = streamFloats(manifest, chosen);
    const aside = heldOut(labels, settings.seed);
    const streamOf = (places) => joined(places.map((place) => all.subarray(place * size, (place + 1) * size)), size);
    const data = { labels, aside, streamOf };
    const epochs = [];
    const told = { step() {}, epoch: ({ epoch, right }) => epochs.push({ epoch, right }) };
    // From where an earlier session ended, to the end or until so many steps are done.
    const go = async (from, parameters, end) => {
      const schedule = scheduleOf(labels.length - aside.size, settings, from?.step);
      const session = await openTraining(runtime, files, manifest, chosen, { ...settings, schedule, budget });
      if (parameters) await session.setParameters(parameters);
      let done = from?.step ?? 0;
      const stopped = () => done++ >= end;
      const state = await train({ session, manifest, data, settings, from, told, stopped });
      const values = await session.parameters();
      await session.release();
      return [state, values];
    };
    try {
      let [state, values] = await go(undefined, null, interrupted ?? Infinity);
      if (interrupted) [state, values] = await go(structuredClone(state), values, Infinity);
      fs.writeFileSync(out, Buffer.from(values.buffer));
      return { state, epochs, aside: [...aside] };
    } catch (error) {
      return { failed: error.message };
    }
  },

  // Parameters read and loaded: what the module put on its stack, and what it freed.
  async frees({ artifacts, ort, variant }) {
    const found = { on_stack: [], freed: [] };
    globalThis.onStack = (place) => found.on_stack.push(place);
    globalThis.freed = (place) => found.freed.push(place);
    const { runtime, manifest, files, budget } = await opened(artifacts, ort);
    const { openTraining } = await load("session.js");
    const { variantNamed } = await load("manifest.js");
    const schedule = { peakRate: 1e-3, warmupSteps: 0, totalSteps: 10 };
    const given = { optimizer: "sgd", schedule, budget };
    const session = await openTraining(runtime, files, manifest, variantNamed(manifest, variant), given);
    await session.setParameters(await session.parameters());
    return found;
  },

  // Errors in words: the message of each thing that goes wrong.
  async errors({ artifacts, ort, cases, cap_mib: cap }) {
    const { runtime, manifest, files, budget } = await opened(artifacts, ort, cap);
    const { openTraining, targetsOf } = await load("session.js");
    const { checkedFile, readManifest, variantNamed } = await load("manifest.js");
    const { withSchedule } = await load("schedule.js");
    const schedule = { peakRate: 1e-3, warmupSteps: 0, totalSteps: 10 };
    const open = (variant) =>
      openTraining(runtime, files, manifest, variantNamed(manifest, variant), { optimizer: "sgd", schedule, budget });
    const tries = {
      label: () => targetsOf([0, manifest.shape.classes], manifest.shape.classes, 2),
      version: () => readManifest(JSON.stringify({ ...manifest, runtime: "1.20.0" })),
      format: () => readManifest(JSON.stringify({ ...manifest, format_version: 2 })),
      json: () => readManifest("{"),
      variant: () => open("upper-99"),
      short: () => checkedFile(manifest, manifest.weights, async () => new Uint8Array(3)),
      changed: () => checkedFile(manifest, manifest.weights, async () => new Uint8Array(manifest.files[manifest.weights].bytes)),
      schedule: () => withSchedule(new Uint8Array([58, 200, 1]), schedule),
      kept: async () => (await open("head")).setParameters(new Float32Array(3)),
      shape: async () => (await open("head")).step([{ stream: new Float32Array(5), labels: [0] }], all()),
      tokens: async () => (await open("all")).step([{ stream: image(), labels: [0] }], all().map((_, at) => at + 1)),
      memory: async () => (await open("all")).step([{ stream: image(512), labels: Array(512).fill(0) }], all()),
    };
    const all = () => Array(manifest.shape.depth).fill(manifest.shape.patch_tokens);
    const image = (count = 1) => new Float32Array(count * 3 * manifest.preprocess.height_px * manifest.preprocess.width_px);
    const found = {};
    for (const name of cases) {
      try {
        await tries[name]();
        found[name] = null;
      } catch (error) {
        found[name] = { message: error.message, words: error.name === "PageError", fatal: error.fatal };
      }
    }
    return { ...found, heap_bytes: budget.heapBytes };
  },
};

// As the page's runtime.js has it. What the module frees is told to `globalThis.freed`, where that is a function.
function wasmPaths(ortWeb) {
  const at = (...parts) => JSON.stringify(pathToFileURL(path.join(...parts)).href);
  const name = "ort-training-wasm-simd-threaded";
  const text = `
    import factory from ${at(ortWeb, `${name}.mjs`)};
    import { keepingTheStack } from ${at(core, "heap.js")};
    const watched = async (options) => {
      const module = await factory(options);
      module._free(module._malloc(8));
      const { _free: free, stackAlloc } = module;
      module.stackAlloc = (size) => { const place = stackAlloc(size); globalThis.onStack?.(place); return place; };
      module._free = (place) => { globalThis.freed?.(place); free(place); };
      return module;
    };
    export default keepingTheStack(watched);`;
  return { mjs: `data:text/javascript,${encodeURIComponent(text)}`, wasm: path.join(ortWeb, `${name}.wasm`) };
}

async function opened(artifacts, ortWeb, capMib) {
  const { Budget, capRuntimeMemory } = await load("memory.js");
  const { checkedFile, readManifest } = await load("manifest.js");
  const budget = new Budget(capMib ? capMib * 2 ** 20 : null);
  capRuntimeMemory(budget);
  const runtime = await import(pathToFileURL(path.join(ortWeb, "ort.training.wasm.min.mjs")).href);
  runtime.env.wasm.numThreads = 1;
  runtime.env.wasm.wasmPaths = wasmPaths(ortWeb);
  const manifest = readManifest(fs.readFileSync(path.join(artifacts, "manifest.json"), "utf8"));
  const read = async (name) => new Uint8Array(fs.readFileSync(path.join(artifacts, name)));
  return { runtime, manifest, budget, files: (name) => checkedFile(manifest, name, read) };
}

const answer = await jobs[process.argv[2]](JSON.parse(fs.readFileSync(0, "utf8")));
// JSON has no NaN, which is what a lost step's loss is.
const text = JSON.stringify(answer, (_, value) => (Number.isNaN(value) ? "NaN" : value));
process.stdout.write(text, () => process.exit(0));
