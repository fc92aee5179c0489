// The rate of every step, written into the optimizer graph.
//
// The runtime for browsers has no call that sets a rate: it always feeds 0.001. So the graph that comes with the
// artifacts computes the rate of each step from constants in it, and these are put in place here for the run at hand:
// linear up to `peakRate` over `warmupSteps`, then a cosine to zero at `totalSteps`.

import { PageError } from "./errors.js";

const FIXED_RATE = 0.001;
const [GRAPH, INITIALIZER, NAME, FLOATS, RAW] = [7, 5, 8, 4, 9]; // field numbers of onnx.proto
const [VARINT, FIXED64, BYTES, FIXED32] = [0, 1, 2, 5];

// A copy of the graph with the run's schedule. `stepsDone`: of this schedule, by an earlier session, whose count is gone.
export function withSchedule(graph, { peakRate, warmupSteps, totalSteps, stepsDone = 0 }) {
  const copy = Uint8Array.from(graph);
  const values = {
    schedule_scale: peakRate / FIXED_RATE,
    schedule_warmup: warmupSteps,
    schedule_ramp: Math.max(1, warmupSteps),
    schedule_rest: Math.max(1, totalSteps - warmupSteps),
    schedule_begun: stepsDone,
  };
  const places = scalarPlaces(copy);
  const view = new DataView(copy.buffer);
  for (const [name, value] of Object.entries(values)) {
    if (!places.has(name)) throw new PageError(`The optimizer graph has no ${name}: export the artifacts again.`);
    view.setFloat32(places.get(name), value, true);
  }
  return copy;
}

// Where in a model's bytes each float scalar among its initializers is.
function scalarPlaces(bytes) {
  const places = new Map();
  for (const graph of fields(bytes, 0, bytes.length, GRAPH)) {
    for (const tensor of fields(bytes, graph.start, graph.end, INITIALIZER)) {
      let name = "";
      let place = -1;
      for (const field of fields(bytes, tensor.start, tensor.end)) {
        if (field.number === NAME) name = new TextDecoder().decode(bytes.subarray(field.start, field.end));
        const values = field.number === FLOATS || field.number === RAW;
        if (values && field.end - field.start === 4) place = field.start;
      }
      if (place >= 0) places.set(name, place);
    }
  }
  return places;
}

// The fields of one protobuf message: {number, start, end} of each one's content.
function* fields(bytes, start, end, only) {
  let at = start;
  const varint = () => {
    let value = 0;
    for (let shift = 0; ; shift += 7) {
      if (at >= end || shift > 63) throw new PageError("The optimizer graph is damaged: export the artifacts again.");
      const byte = bytes[at++];
      value += (byte & 127) * 2 ** shift;
      if (byte < 128) return value;
    }
  };
  while (at < end) {
    const tag = varint();
    const [number, kind] = [Math.floor(tag / 8), tag % 8];
    let size;
    if (kind === VARINT) {
      varint();
      continue;
    } else if (kind === BYTES) size = varint();
    else if (kind === FIXED32) size = 4;
    else if (kind === FIXED64) size = 8;
    if (size === undefined || at + size > end) {
      throw new PageError("The optimizer graph is damaged: export the artifacts again.");
    }
    if (only === undefined || number === only) yield { number, start: at, end: at + size };
    at += size;
  }
}
