// Small things that draw. No state.

import { MIB } from "./core/errors.js";

export const at = (id) => document.getElementById(id);

export function show(element, shown) {
  element.hidden = !shown;
}

// RGB bytes on a canvas of exactly that many pixels.
export function draw(canvas, rgb, { width_px: width, height_px: height }) {
  canvas.width = width;
  canvas.height = height;
  const image = new ImageData(width, height);
  for (let pixel = 0; pixel < width * height; pixel++) {
    image.data.set([rgb[pixel * 3], rgb[pixel * 3 + 1], rgb[pixel * 3 + 2], 255], pixel * 4);
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

export function curve(svg, caption, losses) {
  const known = losses.filter(Number.isFinite);
  if (known.length < 2) return false;
  const most = Math.max(...known);
  const points = losses.flatMap((loss, step) =>
    Number.isFinite(loss) ? [`${(320 * step) / (losses.length - 1)},${84 - 78 * (loss / (most || 1))}`] : [],
  );
  const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  line.setAttribute("points", points.join(" "));
  svg.replaceChildren(line);
  caption.textContent = `Loss of each step: ${known[0].toFixed(3)} at first, ${known.at(-1).toFixed(3)} now.`;
  return true;
}

export function guesses(list, classNames, shares) {
  const order = shares.map((_, place) => place).sort((one, other) => shares[other] - shares[one]);
  list.replaceChildren(
    ...order.map((place) => {
      const item = document.createElement("li");
      const line = document.createElement("span");
      const name = document.createElement("span");
      const share = document.createElement("span");
      name.textContent = classNames[place];
      share.textContent = percent(shares[place]);
      line.append(name, share);
      const bar = document.createElement("progress");
      bar.max = 1;
      bar.value = shares[place];
      bar.setAttribute("aria-label", `${classNames[place]}: ${percent(shares[place])}`);
      item.append(line, bar);
      return item;
    }),
  );
  return order[0];
}

export function percent(share) {
  return `${Math.round(100 * share)} %`;
}

export function mib(bytes) {
  return `${Math.round(bytes / MIB)} MiB`;
}

export function duration(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  if (seconds < 90) return `${Math.ceil(seconds)} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

export function save(name, content, type) {
  const address = URL.createObjectURL(new Blob([content], { type }));
  const link = document.createElement("a");
  link.href = address;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}
