// Pillow's resize of 8-bit RGB, to the bit: filters widened by the scale, weights of 22 bits, one direction after the
// other, rounded in between. A test holds the two together.

const PRECISION_BITS = 22;
const HALF = 1 << (PRECISION_BITS - 1);
const BAND_PIXELS = 2 ** 20;

function sinc(x) {
  return x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI);
}

const FILTERS = {
  box: { support: 0.5, weight: (x) => (x > -0.5 && x <= 0.5 ? 1 : 0) },
  bilinear: { support: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) },
  hamming: {
    support: 1,
    weight(x) {
      const at = Math.abs(x);
      if (at === 0) return 1;
      if (at >= 1) return 0;
      const angle = at * Math.PI;
      return (Math.sin(angle) / angle) * (0.54 + 0.46 * Math.cos(angle));
    },
  },
  bicubic: {
    support: 2,
    weight(x) {
      const a = -0.5;
      const at = Math.abs(x);
      if (at < 1) return ((a + 2) * at - (a + 3)) * at * at + 1;
      return at < 2 ? (((at - 5) * at + 8) * at - 4) * a : 0;
    },
  },
  lanczos: { support: 3, weight: (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0) },
};

export const INTERPOLATIONS = ["nearest", ...Object.keys(FILTERS)];

// For each output pixel where its weights begin in the input, and the weights themselves.
function coefficients(size, from, to, outSize, name) {
  if (name === "nearest") return nearest(size, from, to, outSize);
  const filter = FILTERS[name];
  const scale = Math.fround(to - from) / outSize;
  const widened = Math.max(1, scale);
  const support = filter.support * widened;
  const found = [];
  for (let place = 0; place < outSize; place++) {
    const centre = from + (place + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - support + 0.5));
    const end = Math.min(size, Math.trunc(centre + support + 0.5));
    const weights = new Float64Array(Math.max(0, end - first));
    let sum = 0;
    for (let x = 0; x < weights.length; x++) {
      weights[x] = filter.weight((x + first - centre + 0.5) * (1 / widened));
      sum += weights[x];
    }
    const whole = new Int32Array(weights.length);
    for (let x = 0; x < weights.length; x++) {
      const exact = (sum === 0 ? weights[x] : weights[x] / sum) * (1 << PRECISION_BITS);
      whole[x] = Math.trunc(exact < 0 ? exact - 0.5 : exact + 0.5);
    }
    found.push({ first, weights: whole });
  }
  return found;
}

function nearest(size, from, to, outSize) {
  const scale = Math.fround(to - from) / outSize;
  const found = [];
  let at = from + scale * 0.5;
  for (let place = 0; place < outSize; place++) {
    const first = Math.min(size - 1, Math.max(0, Math.floor(at)));
    found.push({ first, weights: Int32Array.of(1 << PRECISION_BITS) });
    at += scale;
  }
  return found;
}

function clipped(sum) {
  const value = sum >> PRECISION_BITS;
  return value < 0 ? 0 : value > 255 ? 255 : value;
}

// `source`: {width, height, rows(top, count) -> RGBA bytes}: read a band at a time, so that a photograph is never in
// memory twice. `box`: [left, top, right, bottom] of it. Returns RGB bytes, height by width.
export function resize(source, width, height, interpolation, box) {
  const [left, top, right, bottom] = (box ?? [0, 0, source.width, source.height]).map(Math.fround); // as Pillow has them
  const across = coefficients(source.width, left, right, width, interpolation);
  const down = coefficients(source.height, top, bottom, height, interpolation);
  return box === undefined && columnsFirst(source, width, height)
    ? byColumnsFirst(source, across, down)
    : byRowsFirst(source, across, down);
}

// Since Pillow 13 a picture that loses much more of its height than of its width is made lower first.
function columnsFirst(source, width, height) {
  return source.height - height > 2 * Math.max(0, source.width - width);
}

function byRowsFirst(source, across, down) {
  const firstRow = down[0].first;
  const lastRow = Math.max(...down.map((each) => each.first + each.weights.length));
  const line = across.length * 3;
  const narrow = new Uint8Array((lastRow - firstRow) * line);
  const band = Math.max(1, Math.floor(BAND_PIXELS / source.width));
  for (let row = firstRow; row < lastRow; row += band) {
    const count = Math.min(band, lastRow - row);
    rowsResized(source.rows(row, count), 4, source.width, count, across, narrow, (row - firstRow) * line);
  }
  const out = new Uint8Array(down.length * line);
  down.forEach(({ first, weights }, row) => rowOf(narrow, first - firstRow, weights, 3, across.length, out, row * line));
  return out;
}

function byColumnsFirst(source, across, down) {
  const line = source.width * 3;
  const low = new Uint8Array(down.length * line);
  down.forEach(({ first, weights }, row) => {
    rowOf(source.rows(first, weights.length), 0, weights, 4, source.width, low, row * line);
  });
  const out = new Uint8Array(down.length * across.length * 3);
  rowsResized(low, 3, source.width, down.length, across, out, 0);
  return out;
}

// Each row of `pixels` (of `channels` bytes a pixel) made as wide as `across` is, as RGB into `out` from `start`.
function rowsResized(pixels, channels, sourceWidth, count, across, out, start) {
  let to = start;
  for (let y = 0; y < count; y++) {
    for (const { first, weights } of across) {
      let red = HALF, green = HALF, blue = HALF;
      let from = (y * sourceWidth + first) * channels;
      for (const weight of weights) {
        red += pixels[from] * weight;
        green += pixels[from + 1] * weight;
        blue += pixels[from + 2] * weight;
        from += channels;
      }
      out[to++] = clipped(red);
      out[to++] = clipped(green);
      out[to++] = clipped(blue);
    }
  }
}

// One row of the result: the weighted rows from `firstRow` of `pixels`, as RGB into `out` from `start`.
function rowOf(pixels, firstRow, weights, channels, width, out, start) {
  const line = width * channels;
  let to = start;
  for (let x = 0; x < width; x++) {
    for (let channel = 0; channel < 3; channel++) {
      let sum = HALF;
      let from = firstRow * line + x * channels + channel;
      for (const weight of weights) {
        sum += pixels[from] * weight;
        from += line;
      }
      out[to++] = clipped(sum);
    }
  }
}
