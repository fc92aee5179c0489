// The classes and their pictures: what the first card shows, and what training is given.

import { described } from "./core/preprocess.js";
import { at, draw, show } from "./view.js";

export class Pictures {
  // `prepare(file)` -> {rgb, width, height}; `failed(error)`; `begun()` before pictures are added, `changed()` after
  // every change; `shoot(taken)`: the camera.
  constructor(manifest, { prepare, failed, begun, changed, shoot }) {
    Object.assign(this, { manifest, prepare, failed, begun, changed, shoot });
    this.classes = []; // {name, items: [{id, name, rgb, width, height}], element}
    this.nextId = 1;
    this.shown = null;
    this.fixed = manifest.classes.length > 0;
    at("add-class").onclick = () => this.addClass().querySelector(".name").focus();
    at("remove").onclick = () => this.remove(this.shown);
    at("sees-how").textContent = described(manifest.preprocess);
    this.reset(this.fixed ? manifest.classes : ["", ""]);
  }

  reset(names) {
    this.classes = [];
    at("classes").replaceChildren();
    names.forEach((name) => this.addClass(name));
    this.look(null);
  }

  get most() {
    return this.manifest.shape.classes;
  }

  get names() {
    return this.classes.map((each, place) => each.name.trim() || `class ${place + 1}`);
  }

  get items() {
    return this.classes.flatMap((each, label) => each.items.map((item) => ({ ...item, label })));
  }

  addClass(name = "") {
    const element = at("class-template").content.firstElementChild.cloneNode(true);
    const own = { name, items: [], element };
    const [label, input] = [element.querySelector("label"), element.querySelector(".name")];
    const [files, filesLabel] = [element.querySelector(".files"), element.querySelector(".button")];
    const id = this.nextId++;
    input.id = `class-${id}`;
    label.htmlFor = input.id;
    input.value = name;
    input.readOnly = this.fixed;
    input.oninput = () => {
      own.name = input.value;
      this.update();
    };
    files.id = `files-${id}`;
    filesLabel.htmlFor = files.id;
    files.onchange = async () => {
      const chosen = [...files.files];
      files.value = ""; // or the same file could not be chosen again
      await this.add(own, chosen);
    };
    element.querySelector(".shoot").onclick = () => this.shoot((file) => this.add(own, [file]));
    element.querySelector(".drop").onclick = () => {
      this.classes.splice(this.classes.indexOf(own), 1);
      element.remove();
      this.look(null);
      this.update();
      at("add-class").focus();
    };
    this.classes.push(own);
    at("classes").append(element);
    this.update();
    return element;
  }

  async add(own, files) {
    this.begun();
    for (const file of files) {
      try {
        const found = await this.prepare(file);
        this.put(own, { id: crypto.randomUUID?.() ?? String(Math.random()), name: file.name, ...found });
      } catch (error) {
        this.failed(error);
        if (error.fatal) return;
      }
    }
  }

  put(own, item) {
    own.items.push(item);
    const button = document.createElement("button");
    const canvas = document.createElement("canvas");
    draw(canvas, item.rgb, this.manifest.preprocess);
    canvas.ariaHidden = "true"; // the button has the name
    button.type = "button";
    button.append(canvas);
    button.setAttribute("aria-label", `${item.name}: what the model sees`);
    button.setAttribute("aria-pressed", "false");
    button.onclick = () => {
      this.look(item);
      at("sees").open = true;
      at("sees").scrollIntoView({ block: "nearest" });
    };
    item.button = button;
    own.element.querySelector(".thumbs").append(button);
    if (this.shown === null) this.look(item);
    this.update();
  }

  look(item) {
    this.shown?.button.setAttribute("aria-pressed", "false");
    this.shown = item;
    show(at("sees"), item !== null);
    if (item === null) return;
    item.button.setAttribute("aria-pressed", "true");
    const { width_px: width, height_px: height } = this.manifest.preprocess;
    draw(at("sees-canvas"), item.rgb, this.manifest.preprocess);
    const before = item.width ? `${item.width} × ${item.height} pixels, ` : "";
    at("sees-name").textContent = `${item.name}: ${before}seen as ${width} × ${height}`;
  }

  remove(item) {
    for (const own of this.classes) own.items = own.items.filter((each) => each !== item);
    item.button.remove();
    this.look(this.classes.flatMap((own) => own.items)[0] ?? null);
    this.update();
  }

  // What an earlier session kept.
  restore(names, items) {
    this.reset(names);
    for (const { label, ...item } of items) this.put(this.classes[label], item);
  }

  update() {
    const few = this.classes.length <= 2;
    this.classes.forEach(({ element, items }, place) => {
      const name = this.names[place];
      element.querySelector("label").textContent =
        `Class ${place + 1}: ${items.length === 1 ? "1 picture" : `${items.length} pictures`}`;
      element.querySelector(".thumbs").setAttribute("aria-label", `Pictures of ${name}`);
      element.querySelector(".button").setAttribute("aria-label", `Add pictures to ${name}`);
      element.querySelector(".shoot").setAttribute("aria-label", `Camera pictures for ${name}`);
      element.querySelector(".drop").setAttribute("aria-label", `Remove the class ${name}`);
      show(element.querySelector(".drop"), !this.fixed && !few);
    });
    show(at("add-class"), !this.fixed && this.classes.length < this.most);
    this.changed();
  }

  // Why training can't begin yet; empty where it can.
  get lacking() {
    const names = this.names;
    const twice = names.find((name, place) => names.indexOf(name) !== place);
    if (twice !== undefined) return `Two classes are called ${twice}: give one another name.`;
    const withPictures = this.classes.filter((each) => each.items.length > 0).length;
    if (withPictures < 2) return "Add pictures to at least two classes.";
    const empty = this.classes.findIndex((each) => each.items.length === 0);
    return empty >= 0 && !this.fixed ? `${names[empty]} has no pictures yet: add some, or remove the class.` : "";
  }
}
