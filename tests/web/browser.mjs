// The page in headless Chromium, driven by the tests: `node browser.mjs < request.json > answer.json`.
// The request is a list of acts, done one after the other in one tab; what each found comes back in a list.

import fs from "node:fs";
import path from "node:path";
import { pathToFileURL } from "node:url";

const request = JSON.parse(fs.readFileSync(0, "utf8"));
const { chromium } = await import(pathToFileURL(path.join(request.packages, "playwright-core", "index.mjs")).href);
const flags = [
  "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
];
// A new profile: a folder of its own that goes with the browser.
const browser = await chromium.launch({ executablePath: request.chromium, args: flags });
const context = await browser.newContext({
  viewport: { width: 390, height: 844 }, colorScheme: request.scheme ?? "light", acceptDownloads: true,
});
context.setDefaultTimeout(30_000);
const page = await context.newPage();
const complaints = [];
const strangers = [];
page.on("console", (message) => message.type() === "error" && complaints.push(message.text()));
page.on("pageerror", (error) => complaints.push(String(error)));
context.on("request", (each) => {
  const own = /^(blob|data):/.test(each.url()) || each.url().startsWith(request.url);
  if (!own) strangers.push(each.url());
});

const phase = () => page.textContent("#phase");
const ended = () =>
  page.waitForFunction(
    () => !document.querySelector("#running").hidden && document.querySelector("#stop").hidden &&
      /^(Trained|Stopped|Training ended)/.test(document.querySelector("#phase").textContent),
  );

const acts = {
  async open() {
    await page.goto(`${request.url}?threads=1`);
    await page.waitForFunction(() => document.querySelector(".choice") || !document.querySelector("#notice").hidden);
    return { model: await page.textContent("#model"), kept: await keptText(), isolated: await page.evaluate("crossOriginIsolated") };
  },
  async pictures({ classes }) {
    for (const [place, { name, files }] of classes.entries()) {
      if (place >= (await page.locator(".class").count())) await page.click("#add-class");
      await page.locator(".class .name").nth(place).fill(name);
      const before = await page.locator(".thumbs button").count();
      await page.locator(".class .files").nth(place).setInputFiles(files);
      await page.waitForFunction(
        (count) => document.querySelectorAll(".thumbs button").length === count || !document.querySelector("#notice").hidden,
        before + files.length,
      );
    }
    return { lacking: await page.textContent("#plan"), can: await page.isEnabled("#train") };
  },
  // What the model sees of every picture, as RGB bytes.
  crops: () =>
    page.evaluate(() =>
      [...document.querySelectorAll(".thumbs canvas")].map((canvas) => {
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return [...data].filter((_, at) => at % 4 !== 3);
      }),
    ),
  async settings({ variant, prunes, ...fields }) {
    await page.evaluate(() => document.querySelectorAll("details").forEach((each) => (each.open = true)));
    if (variant) await page.check(`#variant-${variant}`);
    if (fields.optimizer) await page.selectOption("#optimizer", fields.optimizer);
    for (const name of ["epochs", "rate", "batch"]) if (fields[name]) await page.fill(`#${name}`, String(fields[name]));
    if (prunes !== undefined) await page.setChecked("#prunes", prunes);
    return { plan: await page.textContent("#plan") };
  },
  async train({ stop_at: stopAt }) {
    if (stopAt) {
      // In the page itself: a click from here would come when it comes, on a busy machine after the last step.
      await page.evaluate((step) => {
        const phase = document.querySelector("#phase");
        const watch = new MutationObserver(() => {
          if (!(Number(/step (\d+) of/.exec(phase.textContent)?.[1]) >= step)) return;  // NaN before the first
          watch.disconnect();
          document.querySelector("#stop").click();
        });
        watch.observe(phase, { childList: true, characterData: true, subtree: true });
      }, stopAt);
    }
    await page.click("#train");
    await ended();
    return figures();
  },
  async go_on() {
    await page.click("#go-on");
    await ended();
    return figures();
  },
  async bring_back() {
    await page.click("#bring-back");
    await page.waitForSelector("#take:not([hidden])");
    return { pictures: await page.locator(".thumbs button").count(), can_go_on: await page.isVisible("#go-on") };
  },
  async forget() {
    await page.click("#forget");
    await page.waitForSelector("#kept", { state: "hidden" });
  },
  async guess({ file }) {
    await page.setInputFiles("#try-file", file);
    await page.waitForFunction(() => !document.querySelector("#guess").hidden || !document.querySelector("#notice").hidden);
    const shares = await page.locator("#guess-list progress").evaluateAll((bars) => bars.map((bar) => bar.value));
    const names = await page.locator("#guess-list span span:first-child").allTextContents();
    return { notice: await noticeText(), text: await page.textContent("#guess-text"), shares, names };
  },
  async download({ button, to }) {
    const [download] = await Promise.all([page.waitForEvent("download"), page.click(button)]);
    await download.saveAs(to);
    return { name: download.suggestedFilename(), import_line: await page.textContent("#import-line") };
  },
  async camera({ shots }) {
    const before = await page.locator(".thumbs button").count();
    await page.locator(".class .shoot").first().click();
    await page.waitForSelector("#camera[open]");
    await page.waitForFunction(() => document.querySelector("#video").videoWidth > 0);
    for (let shot = 1; shot <= shots; shot++) {
      await page.click("#shoot");
      await page.waitForFunction((count) => document.querySelectorAll(".thumbs button").length === count, before + shot);
    }
    await page.click("#camera-done");
    return { taken: (await page.locator(".thumbs button").count()) - before };
  },
  async notice() {
    return { notice: await noticeText() };
  },
  // Whether anything sticks out sideways at a width, and which controls have no name for a screen reader.
  async layout({ width }) {
    await page.setViewportSize({ width, height: 844 });
    await page.evaluate(() => document.querySelectorAll("details").forEach((each) => (each.open = true)));
    return page.evaluate(() => {
      const named = (each) =>
        each.ariaLabel || each.textContent.trim() || each.labels?.[0]?.textContent.trim() || each.getAttribute("aria-labelledby");
      const visible = (each) => each.checkVisibility();
      const controls = [...document.querySelectorAll("button, input, select, canvas:not([aria-hidden]), progress, meter, svg[role]")].filter(visible);
      const small = [...document.querySelectorAll("button, .button, select")].filter(visible).filter((each) => each.getBoundingClientRect().height < 40);
      return {
        overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
        nameless: controls.filter((each) => !named(each)).map((each) => each.outerHTML.slice(0, 120)),
        small: small.filter((each) => !each.closest(".thumbs")).map((each) => each.outerHTML.slice(0, 120)),
        ground: getComputedStyle(document.body).backgroundColor,
      };
    });
  },
  async screenshot({ to, full }) {
    await page.screenshot({ path: to, fullPage: full ?? false });
  },
};

async function figures() {
  const text = (id) => page.textContent(`#${id}`);
  return {
    phase: await phase(), loss: await text("loss"), tokens: await text("tokens"), heap: await text("heap"),
    right: await text("right"), said: await text("said"), notice: await noticeText(), saved: await text("saved"),
  };
}

async function noticeText() {
  return (await page.isVisible("#notice")) ? page.textContent("#notice") : null;
}

async function keptText() {
  return (await page.isVisible("#kept")) ? page.textContent("#kept-text") : null;
}

const found = [];
try {
  for (const { act, ...given } of request.acts) found.push((await acts[act](given)) ?? null);
  const answer = JSON.stringify({ found, complaints, strangers });
  await new Promise((resolve) => process.stdout.write(answer, resolve));
} catch (error) {
  const said = `${error.message}\nnotice: ${await noticeText().catch(() => "?")}; ${await phase().catch(() => "?")}`;
  fs.writeSync(2, `${said}\n${complaints.join("\n")}\ndone: ${JSON.stringify(found).slice(0, 2000)}\n`);
  process.exitCode = 1;
} finally {
  await browser.close();
}
