// What of the model may train under the cap: the variants' memory as it was measured when they were exported.
//
// Those figures are of a native process, so they are a guide here; what holds the cap is memory.js.

import { parameterCount, streamFloats } from "./manifest.js";

const FLOAT_BYTES = 4;
const STATE_COPIES = { adamw: 2, sgd: 0 };

// Bytes of a training step at a batch, all tokens: a straight line through what was measured, never below the smallest.
function peakAt(points, batch) {
  const share = Math.max(...points.map((point) => point.tokens_share));
  const line = points.filter((point) => point.tokens_share === share).sort((one, other) => one.batch - other.batch);
  const [first, last] = [line[0], line.at(-1)];
  if (first.batch === last.batch) return last.bytes;
  const slope = Math.max(0, (last.bytes - first.bytes) / (last.batch - first.batch));
  return Math.max(first.bytes, last.bytes + slope * (batch - last.batch));
}

// Bytes that the page would have in use beside what it has now: null where nothing was measured.
export function neededBytes(manifest, variant, { microBatch, optimizer, pictures }) {
  if (!variant.measured?.train?.length) return null;
  const state = STATE_COPIES[optimizer] * parameterCount(variant, { trainedOnly: true }) * FLOAT_BYTES;
  const cached = variant.split_block === 0 ? 0 : pictures * streamFloats(manifest, variant) * FLOAT_BYTES;
  return peakAt(variant.measured.train, microBatch) + state + cached;
}

// The largest micro-batch (the batch halved as often as need be) that has room; 0 where none has.
export function microBatch(manifest, variant, { batch, optimizer, pictures, roomBytes }) {
  for (let size = batch; size >= 1; size = size === 1 ? 0 : Math.ceil(size / 2)) {
    const bytes = neededBytes(manifest, variant, { microBatch: size, optimizer, pictures });
    if (bytes === null || bytes <= roomBytes) return size;
  }
  return 0;
}

// What is chosen unasked: the most that fits with a frozen part below, which is computed once; else the most that fits.
export function preferred(variants, fits) {
  const fitting = variants.filter((variant) => fits(variant) && !variant.embeddings_train);
  return fitting.find((variant) => variant.split_block > 0) ?? fitting[0] ?? variants.at(-1);
}
