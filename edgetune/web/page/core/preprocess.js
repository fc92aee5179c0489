// From a picture to a model's input, as edgetune/data/preprocess.py does it: the same sizes, the same pixels.

import { resize } from "./resample.js";

// Past this many times the resized square, only what the crop keeps is computed.
const LARGEST_RESIZE = 32;

// Python's round: halves go to the even side.
export function rounded(value) {
  const low = Math.floor(value);
  const rest = value - low;
  if (rest !== 0.5) return rest < 0.5 ? low : low + 1;
  return low % 2 === 0 ? low : low + 1;
}

function scaledSize(preprocess) {
  return [Math.floor(preprocess.width_px / preprocess.crop_pct), Math.floor(preprocess.height_px / preprocess.crop_pct)];
}

// [width, height] that a picture is resized to before the crop.
export function resizedSize(width, height, preprocess) {
  const [scaledWidth, scaledHeight] = scaledSize(preprocess);
  if (preprocess.crop_mode === "squash") return [scaledWidth, scaledHeight];
  if (preprocess.crop_mode === "center" && scaledWidth === scaledHeight) {
    const [short, long] = width <= height ? [width, height] : [height, width];
    const newLong = Math.trunc((scaledWidth * long) / short);
    return width <= height ? [scaledWidth, newLong] : [newLong, scaledWidth];
  }
  const ratios = [width / scaledWidth, height / scaledHeight];
  const ratio = preprocess.crop_mode === "border" ? Math.max(...ratios) : Math.min(...ratios);
  return [Math.max(1, rounded(width / ratio)), Math.max(1, rounded(height / ratio))];
}

// RGB bytes (height_px, width_px, 3) of `source` (see resample.js).
export function prepare(source, preprocess) {
  const { width, height } = source;
  const whole = resizedSize(width, height, preprocess);
  const [scaledWidth, scaledHeight] = scaledSize(preprocess);
  let size = whole;
  let box;
  if (whole[0] * whole[1] > LARGEST_RESIZE * scaledWidth * scaledHeight) {
    size = [Math.min(whole[0], preprocess.width_px), Math.min(whole[1], preprocess.height_px)];
    box = sourceBox([width, height], whole, size);
  }
  return crop(resize(source, size[0], size[1], preprocess.interpolation, box), size[0], size[1], preprocess);
}

// Where in the source the middle `kept` pixels of the resized picture come from.
function sourceBox(size, whole, kept) {
  const left = rounded((whole[0] - kept[0]) / 2);
  const top = rounded((whole[1] - kept[1]) / 2);
  const [perX, perY] = [size[0] / whole[0], size[1] / whole[1]];
  const right = Math.min(size[0], (left + kept[0]) * perX);
  return [left * perX, top * perY, right, Math.min(size[1], (top + kept[1]) * perY)];
}

// The middle of a picture; what is smaller is padded, black or (mode "border") with the mean colour.
function crop(rgb, width, height, preprocess) {
  const { width_px: wide, height_px: high } = preprocess;
  const missingX = Math.max(0, wide - width);
  const missingY = Math.max(0, high - height);
  const left = rounded((width + missingX - wide) / 2) - Math.floor(missingX / 2);
  const top = rounded((height + missingY - high) / 2) - Math.floor(missingY / 2);
  const fill = preprocess.crop_mode === "border" ? preprocess.mean.map((mean) => rounded(255 * mean)) : [0, 0, 0];
  const out = new Uint8Array(wide * high * 3);
  for (let y = 0, to = 0; y < high; y++) {
    for (let x = 0; x < wide; x++, to += 3) {
      const [fromX, fromY] = [x + left, y + top];
      const inside = fromX >= 0 && fromX < width && fromY >= 0 && fromY < height;
      const from = (fromY * width + fromX) * 3;
      for (let channel = 0; channel < 3; channel++) out[to + channel] = inside ? rgb[from + channel] : fill[channel];
    }
  }
  return out;
}

// Write RGB bytes into `out` as float32 (3, H, W): scaled to 0..1, mean subtracted, divided by std.
export function normalise(rgb, preprocess, out, start = 0) {
  const pixels = preprocess.width_px * preprocess.height_px;
  for (let channel = 0; channel < 3; channel++) {
    const mean = Math.fround(preprocess.mean[channel]);
    const std = Math.fround(preprocess.std[channel]);
    for (let pixel = 0; pixel < pixels; pixel++) {
      const share = Math.fround(rgb[pixel * 3 + channel] / 255);
      out[start + channel * pixels + pixel] = Math.fround(share - mean) / std;
    }
  }
  return out;
}

// How it is done, for a reader.
export function described(preprocess) {
  const [wide, high] = scaledSize(preprocess);
  const size = `${preprocess.width_px} × ${preprocess.height_px}`;
  const how = {
    center: `The shorter side becomes ${Math.min(wide, high)} pixels (${preprocess.interpolation}); the middle ${size} are kept.`,
    squash: `Squeezed to ${wide} × ${high} pixels (${preprocess.interpolation}); the middle ${size} are kept.`,
    border: `The longer side becomes ${Math.max(wide, high)} pixels (${preprocess.interpolation}), padded to ${size}.`,
  }[preprocess.crop_mode];
  const numbers = (values) => values.map((value) => +value.toFixed(3)).join(", ");
  return `${how} Then the mean (${numbers(preprocess.mean)}) is subtracted and divided by ${numbers(preprocess.std)}.`;
}
