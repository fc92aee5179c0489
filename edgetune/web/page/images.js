// From a picture's file to the pixels that the model sees, by the browser's own decoders.

import { PageError, mebibytes } from "./core/errors.js";
import { prepare } from "./core/preprocess.js";

const MOST_PIXELS = 89_478_485; // as Pillow's limit: past it a file is a bomb and no photograph

// {rgb, width, height}: RGB bytes at the model's size, and how large the picture was, upright.
export async function pixelsOf(blob, name, preprocess, budget) {
  if (blob.size === 0) throw new PageError(`${name} is an empty file. Choose another picture.`);
  let bitmap;
  try {
    // The file's own values: no colour profile, no alpha multiplied in; turned as its EXIF says.
    bitmap = await createImageBitmap(blob, {
      colorSpaceConversion: "none",
      premultiplyAlpha: "none",
      imageOrientation: "from-image",
    });
  } catch {
    throw new PageError(
      `${name} is no picture that this browser can read, or it is broken. JPEG, PNG and WebP always work.`,
    );
  }
  try {
    const { width, height } = bitmap;
    if (width * height > MOST_PIXELS) {
      throw new PageError(`${name} has ${width} × ${height} pixels, which is too large. Make it smaller.`);
    }
    budget.check(width * height * 4, `${name} (${width} × ${height}, ${mebibytes(width * height * 4)} while it is read)`);
    return { rgb: prepare(sourceOf(bitmap), preprocess), width, height };
  } finally {
    bitmap.close();
  }
}

// A bitmap's rows on demand, on white where it is transparent: only one band of it is ever copied.
function sourceOf(bitmap) {
  let canvas = null;
  return {
    width: bitmap.width,
    height: bitmap.height,
    rows(top, count) {
      if (canvas === null || canvas.height !== count) canvas = new OffscreenCanvas(bitmap.width, count);
      const context = canvas.getContext("2d", { willReadFrequently: true, colorSpace: "srgb" });
      context.imageSmoothingEnabled = false;
      context.fillStyle = "#fff";
      context.fillRect(0, 0, bitmap.width, count);
      context.drawImage(bitmap, 0, -top);
      return context.getImageData(0, 0, bitmap.width, count).data;
    },
  };
}
