// manifest.json of the artifacts: read, and checked against what this page can run.

import { PageError } from "./errors.js";

export const RUNTIME_VERSION = "1.19.2";

export function readManifest(text) {
  let manifest;
  try {
    manifest = JSON.parse(text);
  } catch {
    throw new PageError("manifest.json is damaged: it is no JSON. Export the artifacts again.");
  }
  const found = `format ${manifest?.format_version} (${manifest?.kind}), runtime ${manifest?.runtime}`;
  if (
    manifest?.format_version !== 1 ||
    manifest.kind !== "onnxruntime-training" ||
    manifest.runtime !== RUNTIME_VERSION
  ) {
    throw new PageError(
      `These artifacts are of another version: ${found}. This page trains from format 1 (onnxruntime-training), runtime ` +
        `${RUNTIME_VERSION}. Export them, or the page, again.`,
    );
  }
  for (const name of ["shape", "preprocess", "variants", "optimizers", "files", "schedule", "classes"]) {
    if (!manifest[name]) throw new PageError(`manifest.json is damaged: it lacks ${name}. Export the artifacts again.`);
  }
  return manifest;
}

export function variantNamed(manifest, name) {
  const found = manifest.variants.find((variant) => variant.name === name);
  if (found === undefined) {
    const names = manifest.variants.map((variant) => variant.name).join(", ");
    throw new PageError(`The artifacts hold no variant ${name}: ${names}.`);
  }
  return found;
}

export function parameterCount(variant, { trainedOnly = false } = {}) {
  const counted = variant.parameters.filter((each) => each.trained || !trainedOnly);
  return counted.reduce((sum, each) => sum + each.shape.reduce((size, side) => size * side, 1), 0);
}

// Floats that one image has where the variant's graph begins.
export function streamShape(manifest, variant) {
  const { shape, preprocess } = manifest;
  if (variant.split_block === 0) return [3, preprocess.height_px, preprocess.width_px];
  return [shape.prefix_tokens + shape.patch_tokens, shape.width];
}

export function streamFloats(manifest, variant) {
  return streamShape(manifest, variant).reduce((size, side) => size * side, 1);
}

// A file of the artifacts by `fetchBytes(path)`, checked: one that was cut short loads as something else.
export async function checkedFile(manifest, path, fetchBytes) {
  const entry = manifest.files[path];
  if (entry === undefined) throw new PageError(`${path} is not listed in manifest.json. Export the artifacts again.`);
  const bytes = await fetchBytes(path);
  if (bytes.byteLength !== entry.bytes) {
    throw new PageError(
      `${path} is damaged: ${bytes.byteLength} bytes instead of ${entry.bytes}. Copy the folder again, or load the page anew.`,
    );
  }
  if (globalThis.crypto?.subtle) {
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
    if (hex(digest) !== entry.sha256) {
      throw new PageError(`${path} is damaged: its bytes are not those that were exported. Copy the folder again.`);
    }
  }
  return bytes;
}

export function hex(bytes) {
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
