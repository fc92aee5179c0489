// The artifacts' graphs in ONNX Runtime: the frozen prefix, and what trains. Knows no page: Node runs it in the tests.
//
// `ort`: the module of onnxruntime-web's training build. `files(path)`: a file of the artifacts as Uint8Array.

import { PageError, inWords } from "./errors.js";
import { allTokens } from "./tokens.js";
import { parameterCount, streamFloats, streamShape } from "./manifest.js";
import { withSchedule } from "./schedule.js";

// SGD's graph has an output without a shape, of which the runtime would warn in every step.
const QUIET = { logSeverityLevel: 3 };

// Each image's share of the step's loss, put on its class.
export function targetsOf(labels, classes, images) {
  const targets = new Float32Array(labels.length * classes);
  labels.forEach((label, place) => {
    if (!Number.isInteger(label) || label < 0 || label >= classes) {
      throw new PageError(`A label is out of range: ${label}; this model has classes 0 to ${classes - 1}.`);
    }
    targets[place * classes + label] = 1 / images;
  });
  return targets;
}

// A variant in training: the largest thing in memory. `schedule`: see schedule.js.
export async function openTraining(ort, files, manifest, variant, { optimizer, schedule, budget }) {
  const graphs = manifest.optimizers[optimizer];
  if (graphs === undefined) {
    throw new PageError(`The artifacts have no optimizer ${optimizer}: ${Object.keys(manifest.optimizers).join(", ")}.`);
  }
  const options = {
    checkpointState: await files(variant.checkpoint),
    trainModel: await files(variant.training_graph),
    evalModel: await files(variant.eval_graph),
    optimizerModel: withSchedule(await files(graphs.scheduled), schedule),
  };
  const guarded = (doing, work) => guard(doing, budget, work);
  const session = await guarded("loading what trains", () => ort.TrainingSession.create(options, QUIET));
  const wanted = variant.inputs.map((input) => input.name);
  if (session.trainingInputNames.join() !== wanted.join()) {
    throw new PageError(
      `The training graph takes ${session.trainingInputNames.join(", ")} and the manifest says ${wanted.join(", ")}. ` +
        "Export the artifacts again.",
    );
  }
  const count = parameterCount(variant);

  async function run(kind, stream, targets, tokens) {
    const feeds = feedsOf(ort, manifest, variant, stream, targets, tokens);
    const names = kind === "runEvalStep" ? session.evalOutputNames : session.trainingOutputNames;
    const found = await session[kind](feeds, QUIET);
    return named(found, names, variant.outputs);
  }

  return {
    variant,
    // One optimizer step over micro-batches [{stream, labels}]; `tokens`: patch tokens that enter each block.
    // A loss that is no number changes nothing.
    step: (parts, tokens) =>
      guarded("training", async () => {
        const images = parts.reduce((sum, part) => sum + part.labels.length, 0);
        const found = { loss: 0, correct: 0, images, deltas: Array(manifest.shape.depth).fill(0), updated: false };
        await session.lazyResetGrad();
        for (const { stream, labels } of parts) {
          const targets = targetsOf(labels, manifest.shape.classes, images);
          const outputs = await run("runTrainStep", stream, targets, tokens);
          found.loss += outputs.loss.data[0];
          found.correct += correctOf(outputs.logits, labels);
          const deltas = outputs.deltas?.data ?? [];
          const first = found.deltas.length - deltas.length;
          deltas.forEach((delta, block) => (found.deltas[first + block] += (labels.length / images) * delta));
          if (!Number.isFinite(found.loss)) {
            await session.lazyResetGrad();
            return { ...found, loss: NaN };
          }
        }
        await session.runOptimizerStep(QUIET);
        return { ...found, updated: true };
      }),
    // Logits, one Float32Array an image, on all tokens or on `tokens`.
    logits: (stream, tokens = allTokens(manifest)) =>
      guarded("predicting", async () => {
        const images = stream.length / streamFloats(manifest, variant);
        const targets = new Float32Array(images * manifest.shape.classes);
        const { logits } = await run("runEvalStep", stream, targets, tokens);
        const classes = manifest.shape.classes;
        return Array.from({ length: images }, (_, at) => logits.data.slice(at * classes, (at + 1) * classes));
      }),
    // Every parameter of the variant, in the manifest's order: what `edgetune import-params` takes.
    parameters: () =>
      guarded("reading the parameters", async () => (await session.getContiguousParameters(false)).data),
    setParameters: (values) =>
      guarded("loading parameters", async () => {
        if (values.length !== count) {
          throw new PageError(
            `Kept parameters don't fit: ${values.length} values, and ${variant.name} has ${count}. They are of other artifacts.`,
          );
        }
        await session.loadParametersBuffer(new Uint8Array(values.buffer, values.byteOffset, values.byteLength), false);
      }),
    release: () => session.release(),
  };
}

// The blocks below the split, for inference. Its weights are in the artifacts' weights file, which is let go of again.
export async function openPrefix(ort, files, manifest, variant, { budget }) {
  const [graph, weights] = [await files(variant.prefix_graph), await files(manifest.weights)];
  const session = await guard("loading the frozen part", budget, () =>
    ort.InferenceSession.create(graph, {
      executionProviders: ["wasm"],
      externalData: [{ path: manifest.weights, data: weights }],
      // Weights laid out anew for products would be a second copy of them.
      extra: { session: { disable_prepacking: "1" } },
    }),
  );
  const inputs = variant.prefix_inputs.map((input) => input.name);
  return {
    // images: float32 (B, 3, H, W) -> what enters the suffix, (B, P + N, D)
    features: (images) =>
      guard("computing the frozen part", budget, async () => {
        const { height_px: high, width_px: wide } = manifest.preprocess;
        const count = images.length / (3 * high * wide);
        const given = {
          images: new ort.Tensor("float32", images, [count, 3, high, wide]),
          tokens: tokensTensor(ort, allTokens(manifest)),
        };
        const found = await session.run(Object.fromEntries(inputs.map((name) => [name, given[name]])));
        return found[variant.prefix_outputs[0]].data;
      }),
    release: () => session.release(),
  };
}

async function guard(doing, budget, work) {
  try {
    return await work();
  } catch (error) {
    throw inWords(error, doing, budget);
  }
}

// In the order of the graph's inputs: the runtime goes by place, not by name. Shapes are checked here, since its own
// errors are bare numbers.
function feedsOf(ort, manifest, variant, stream, targets, tokens) {
  const sides = streamShape(manifest, variant);
  const images = targets.length / manifest.shape.classes;
  if (stream.length !== images * sides.reduce((size, side) => size * side, 1)) {
    throw new PageError(`${stream.length} values are no ${images} images of ${sides.join(" × ")}.`);
  }
  const most = manifest.shape.patch_tokens;
  const falls = tokens.every((count, block) => count >= 1 && count <= (tokens[block - 1] ?? most));
  if (tokens.length !== manifest.shape.depth || !falls) {
    throw new PageError(`Token counts ${tokens.join(", ")} don't fit ${manifest.shape.depth} blocks of ${most}.`);
  }
  const given = {
    [variant.inputs[0].name]: () => new ort.Tensor("float32", stream, [images, ...sides]),
    targets: () => new ort.Tensor("float32", targets, [images, manifest.shape.classes]),
    tokens: () => tokensTensor(ort, tokens),
  };
  return Object.fromEntries(variant.inputs.map(({ name }) => [name, given[name]()]));
}

function tokensTensor(ort, tokens) {
  return new ort.Tensor("int64", BigInt64Array.from(tokens, BigInt), [tokens.length]);
}

// The runtime names an eval graph's outputs by the training graph's names: they go by place, too.
function named(found, names, outputs) {
  const values = Object.values(found);
  return Object.fromEntries(outputs.map((name) => [name, values[names.indexOf(name)] ?? found[name]]));
}

function correctOf(logits, labels) {
  const classes = logits.dims[1];
  const right = labels.filter((label, place) => {
    const row = logits.data.subarray(place * classes, (place + 1) * classes);
    return row.indexOf(Math.max(...row)) === label;
  });
  return right.length;
}

export function softmax(logits, among = logits.length) {
  const values = Array.from(logits.slice(0, among));
  const most = Math.max(...values);
  const powers = values.map((value) => Math.exp(value - most));
  const sum = powers.reduce((total, value) => total + value, 0);
  return powers.map((value) => value / sum);
}
