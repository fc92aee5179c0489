// Pictures from the camera, as PNG files.

import { PageError } from "./core/errors.js";
import { at } from "./view.js";

// Opens the dialog; `taken(file)` is called for each picture. Ends when it is closed.
export async function camera(taken) {
  if (!navigator.mediaDevices?.getUserMedia) {
    throw new PageError("The camera needs this page from localhost or over HTTPS. Choose picture files instead.");
  }
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: { ideal: "environment" } } });
  } catch (error) {
    const why = { NotAllowedError: "it was not allowed", NotFoundError: "there is none" }[error.name] ?? error.message;
    throw new PageError(`The camera can't be used: ${why}. Choose picture files instead.`);
  }
  const [dialog, video] = [at("camera"), at("video")];
  let count = 0;
  try {
    video.srcObject = stream;
    at("camera-count").textContent = "";
    dialog.showModal();
    await video.play();
    at("shoot").onclick = async () => {
      const canvas = document.createElement("canvas");
      canvas.width = video.videoWidth;
      canvas.height = video.videoHeight;
      canvas.getContext("2d").drawImage(video, 0, 0);
      const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
      if (blob === null) return; // no frame yet
      count += 1;
      at("camera-count").textContent = count === 1 ? "1 picture taken." : `${count} pictures taken.`;
      taken(new File([blob], `camera-${Date.now()}.png`, { type: "image/png" }));
    };
    at("camera-done").onclick = () => dialog.close();
    await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  } finally {
    if (dialog.open) dialog.close();
    video.srcObject = null;
    stream.getTracks().forEach((track) => track.stop());
  }
}
