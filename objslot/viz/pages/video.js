"use strict";
const $ = id => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const count = data.frames.length;
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const color = id => `rgb(${data.colors[id].join(",")})`;
const curveColor = k => css(k % 2 ? "--ink" : "--accent");
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
const surface = (width, height) => Object.assign(document.createElement("canvas"), { width, height });

const state = { frame: 0, layer: Object.keys(data.layers)[0] || "none", hidden: new Set(), slot: 0, timer: null };
const images = data.pictures.map(uri => Object.assign(new Image(), { src: uri }));

__FILE video_picture.js__

__FILE video_timeline.js__

__FILE video_attention.js__

function draw() {
  const t = data.frames[state.frame];
  $("seek").value = state.frame;
  $("place").textContent = `frame ${t} of ${data.length}, ${(t / data.fps).toFixed(1)} s`;
  drawPicture(); drawTimeline(); drawLegend(t); drawAttention();
}

function go(frame) { state.frame = Math.min(count - 1, Math.max(0, frame)); draw(); }

function play() {
  if (state.timer) { clearInterval(state.timer); state.timer = null; }
  else state.timer = setInterval(() => go((state.frame + 1) % count), 1000 * data.length / count / data.fps);
  $("play").setAttribute("aria-pressed", String(!!state.timer));
  $("play").textContent = state.timer ? "Pause" : "Play";
}

function toggle(id, shown) {
  shown ? state.hidden.delete(id) : state.hidden.add(id);
  const box = $("object-" + id);
  if (box) box.checked = shown;
}

function choose(name) {
  state.layer = name;
  for (const button of $("layers").children) button.setAttribute("aria-pressed", String(button.dataset.layer === name));
  draw();
}

function button(parent, text, action) {
  const made = Object.assign(document.createElement("button"), { type: "button", textContent: text, onclick: action });
  return $(parent).appendChild(made);
}

function build() {
  if (data.objects.some(o => o.foreground))
    data.objects.filter(o => !o.foreground).forEach(o => state.hidden.add(o.id));
  document.title = data.name + " · objslot";
  $("title").textContent = data.name;
  for (const fact of data.facts) $("facts").appendChild(document.createElement("p")).textContent = fact;
  $("picture").width = data.width; $("picture").height = data.height;
  $("seek").max = count - 1;
  for (const [name, layer] of Object.entries(data.layers))
    button("layers", layer.title, () => choose(name)).dataset.layer = name;
  button("layers", "Frame only", () => choose("none")).dataset.layer = "none";
  for (const [name, t] of Object.entries(data.marks)) button("marks", `${name}: frame ${t}`, () => {
    let nearest = 0;
    data.frames.forEach((s, k) => { if (Math.abs(s - t) < Math.abs(data.frames[nearest] - t)) nearest = k; });
    go(nearest);
  });
  Object.keys(data.curves).forEach((name, k) => {
    const key = $("legend").appendChild(document.createElement("span"));
    key.append((k % 2 ? "╌╌ " : "── ") + name + ": ", document.createElement("output"), "\u2003");
    key.style.color = `var(${k % 2 ? "--ink" : "--accent"})`;
  });
  if (!Object.keys(data.curves).length) $("legend").textContent = "Area of each object over time. Drag to scrub.";
  const found = data.objects.filter(o => o.foreground), split = found.length && found.length < data.objects.length;
  if (!data.objects.length) $("objects").textContent = "No object was found.";
  else if (!found.length) $("objects").insertAdjacentHTML("beforebegin", "<p class=quiet>Nothing stands out: all tracks.</p>");
  for (const o of data.objects) {
    const label = document.createElement("label"), swatch = document.createElement("span"), score = document.createElement("span");
    const box = Object.assign(document.createElement("input"), { type: "checkbox", checked: !state.hidden.has(o.id), id: "object-" + o.id });
    const ground = split && !o.foreground, scored = o.score !== null && o.score !== undefined;
    box.onchange = () => { toggle(o.id, box.checked); draw(); };
    swatch.className = "swatch"; swatch.style.background = color(o.id);
    score.className = "score"; score.textContent = scored ? o.score.toFixed(2).replace("-0.00", "0.00") : "";
    if (scored) $("scored").hidden = false;
    label.append(box, swatch, `${ground ? "Background" : "Object"} ${o.id}`, score);
    $(ground ? "background" : "objects").appendChild(document.createElement("li")).appendChild(label);
  }
  $("ground").hidden = !split;
  $("ground").querySelector("summary").textContent = `Background, ${data.objects.length - found.length} tracks`;
  if (data.attention) {
    $("attention").hidden = false;
    $("slot").max = data.attention.slots - 1;
    state.slot = Math.max(0, slotAt(...middleOfFirst())); $("slot").value = state.slot;
    for (let i = 0; i < data.attention.iterations; i++) {
      const figure = $("iterations").appendChild(document.createElement("figure"));
      figure.append(surface(data.width, data.height));
      figure.appendChild(document.createElement("figcaption")).textContent = `after iteration ${i + 1}`;
    }
  }
}

function listen() {
  $("seek").oninput = event => go(+event.target.value);
  $("opacity").oninput = draw;
  $("slot").oninput = event => chooseSlot(+event.target.value);
  $("picture").onclick = event => {
    const box = $("picture").getBoundingClientRect();
    chooseSlot(slotAt((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height));
  };
  $("play").onclick = play;
  const scrub = event => {
    if (event.type === "pointermove" && !event.buttons) return;
    const box = $("timeline").getBoundingClientRect();
    go(Math.round((event.clientX - box.left - before) / (box.width - before - after) * (count - 1)));
  };
  $("timeline").onpointerdown = $("timeline").onpointermove = scrub;
  window.onresize = draw;
  document.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = event.shiftKey ? 10 : 1, slider = ["opacity", "slot"].includes(event.target.id);
    const names = [...Object.keys(data.layers), "none"], digit = "1234567890".indexOf(event.key);
    if (event.key === "ArrowLeft" && !slider) go(state.frame - step);
    else if (event.key === "ArrowRight" && !slider) go(state.frame + step);
    else if (event.key === "Home" && !slider) go(0);
    else if (event.key === "End" && !slider) go(count - 1);
    else if (event.key === " " && !["BUTTON", "INPUT"].includes(event.target.tagName)) play();
    else if (event.key === " " && event.target.id === "seek") play();
    else if (event.key.toLowerCase() === "m") choose(names[(names.indexOf(state.layer) + 1) % names.length]);
    else if (digit === 9) { const show = state.hidden.size > 0; data.objects.forEach(o => toggle(o.id, show)); draw(); }
    else if (data.objects.some(o => o.id === digit + 1)) { toggle(digit + 1, state.hidden.has(digit + 1)); draw(); }
    else return;
    event.preventDefault();
  });
}

build(); listen(); choose(state.layer);
