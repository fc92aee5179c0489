// The training loop: what `docs/phones.md` has in words. Knows no page and no files.

import { PageError } from "./errors.js";
import { rounded } from "./preprocess.js";
import { initialBudgets, allTokens, keptShare, moved, tokensOf } from "./tokens.js";
import { streamFloats } from "./manifest.js";

// A loss that is no number this many steps in a row won't become one again.
const MOST_LOST_STEPS = 3;
const WARMUP_SHARE = 0.1;

export function stepsOf(images, { batch, epochs }) {
  const perEpoch = Math.max(1, Math.ceil(images / batch));
  return { perEpoch, total: perEpoch * epochs };
}

export function scheduleOf(images, settings, stepsDone = 0) {
  const { total } = stepsOf(images, settings);
  return { peakRate: settings.rate, warmupSteps: rounded(WARMUP_SHARE * total), totalSteps: total, stepsDone };
}

// Places 0 to count-1 in the order of one epoch: a function of seed and epoch alone.
export function epochOrder(count, seed, epoch) {
  const order = Array.from({ length: count }, (_, place) => place);
  const random = generator(seed * 65537 + epoch);
  for (let last = count - 1; last > 0; last--) {
    const other = Math.floor(random() * (last + 1));
    [order[last], order[other]] = [order[other], order[last]];
  }
  return order;
}

// mulberry32, which is public domain: shuffling needs no better one.
function generator(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

// One image in five of every class that has five is kept aside, to see how well the model does on what it never saw.
export function heldOut(labels, seed) {
  const aside = new Set();
  const byClass = new Map();
  for (const place of epochOrder(labels.length, seed, -1)) {
    const seen = byClass.get(labels[place]) ?? [];
    seen.push(place);
    byClass.set(labels[place], seen);
  }
  for (const places of byClass.values()) {
    places.slice(0, Math.floor(places.length / 5)).forEach((place) => aside.add(place));
  }
  return aside;
}

// Train to the last epoch, or until `stopped()`.
//
// `data`: {labels, aside (a Set of places), streamOf(places) -> Float32Array}. `from`: {step, budgets, lastDeltas, steps}
// of an earlier session. `told`: {step(event), epoch(event)}, both may be async. Returns the state to go on from.
export async function train({ session, manifest, data, settings, from, told, stopped = () => false }) {
  const { variant } = session;
  const places = data.labels.map((_, place) => place).filter((place) => !data.aside.has(place));
  if (places.length === 0) throw new PageError("There is nothing to train on: add pictures first.");
  const { perEpoch, total } = stepsOf(places.length, settings);
  const prunes = settings.prunes && manifest.adaptive !== null;
  const alpha = manifest.adaptive?.settings.alpha ?? settings.rate * settings.batch;
  const floor = manifest.adaptive?.token_floor[variant.name];
  const state = { step: 0, steps: [], ...(prunes ? initialBudgets(manifest, variant) : {}), ...from };
  let lost = 0;
  while (state.step < total && !stopped()) {
    const [epoch, at] = [Math.floor(state.step / perEpoch), state.step % perEpoch];
    const order = epochOrder(places.length, settings.seed, epoch).map((place) => places[place]);
    const seen = order.slice(at * settings.batch, (at + 1) * settings.batch);
    const tokens = prunes ? tokensOf(state, manifest, variant) : allTokens(manifest);
    const found = await session.step(partsOf(seen, data, settings.microBatch), tokens);
    if (prunes && found.updated) Object.assign(state, moved(state, found.deltas, alpha, floor));
    lost = found.updated ? 0 : lost + 1;
    state.step += 1;
    const kept = keptShare(tokens, manifest, variant);
    state.steps.push({ loss: found.loss, tokens, places: seen, correct: found.correct });
    await told.step({ step: state.step, total, epoch: epoch + 1, ...found, kept });
    if (lost >= MOST_LOST_STEPS) {
      throw new PageError(
        `The loss was no number in ${MOST_LOST_STEPS} steps in a row: the training diverged. Try a lower learning rate.`,
      );
    }
    if (state.step % perEpoch === 0) {
      const right = data.aside.size === 0 ? null : await rightAmong([...data.aside], session, data, settings);
      await told.epoch({ epoch: epoch + 1, state, right, aside: data.aside.size });
    }
  }
  return state;
}

function partsOf(places, data, microBatch) {
  const parts = [];
  for (let start = 0; start < places.length; start += microBatch) {
    const part = places.slice(start, start + microBatch);
    parts.push({ stream: data.streamOf(part), labels: part.map((place) => data.labels[place]) });
  }
  return parts;
}

async function rightAmong(places, session, data, { microBatch, classes }) {
  let right = 0;
  for (const { stream, labels } of partsOf(places, data, microBatch)) {
    const logits = await session.logits(stream);
    // Classes that have no name yet can't be meant.
    right += labels.filter((label, at) => {
      const own = logits[at].subarray(0, classes);
      return own.indexOf(Math.max(...own)) === label;
    }).length;
  }
  return right;
}

// Streams of single images put together to one batch.
export function joined(streams, floats) {
  const whole = new Float32Array(streams.length * floats);
  streams.forEach((stream, place) => whole.set(stream, place * floats));
  return whole;
}
