// What one slot attends to after each iteration.

function drawAttention() {
  const maps = data.attention;
  if (!maps) return;
  let nearest = 0;
  maps.frames.forEach((t, k) => {
    const here = data.frames[state.frame];
    if (Math.abs(t - here) < Math.abs(maps.frames[nearest] - here)) nearest = k;
  });
  const t = maps.frames[nearest], all = bytes(maps.data[nearest]), area = maps.height * maps.width;
  let frame = 0;
  data.frames.forEach((s, k) => { if (Math.abs(s - t) < Math.abs(data.frames[frame] - t)) frame = k; });
  $("slotname").textContent = `${state.slot + 1} of ${maps.slots}`;
  $("attended").textContent = `Frame ${t}: attention is kept for ${maps.frames.length} frames of the video.`
    + (data.layers.semantic ? " Click the picture to choose the slot that is strongest there." : "");
  [...$("iterations").querySelectorAll("canvas")].forEach((canvas, i) => {
    const context = canvas.getContext("2d"), shade = surface(maps.width, maps.height), pen = shade.getContext("2d");
    const pixels = pen.createImageData(maps.width, maps.height), from = (i * maps.slots + state.slot) * area;
    for (let k = 0; k < area; k++) pixels.data[4 * k + 3] = 0.85 * (255 - all[from + k]);
    pen.putImageData(pixels, 0, 0);
    if (!images[frame].complete) { images[frame].onload = draw; return; }
    context.drawImage(images[frame], 0, 0, canvas.width, canvas.height);
    context.drawImage(shade, 0, 0, canvas.width, canvas.height);
  });
}

// The slot that is strongest at a place of the current frame, given as shares of width and height.
function slotAt(x, y) {
  const layer = data.layers.semantic;
  if (!layer || !data.attention) return state.slot;
  const column = Math.min(layer.width - 1, Math.floor(x * layer.width));
  const row = Math.min(layer.height - 1, Math.floor(y * layer.height));
  return Math.min(data.attention.slots, indexMap(layer, state.frame)[row * layer.width + column]) - 1;
}

// A place on the first object that is seen in the first frame, as shares of width and height.
function middleOfFirst() {
  const layer = data.layers.objects, map = layer ? indexMap(layer, 0) : [], first = data.objects.find(o => o.area[0]);
  const at = [];
  map.forEach((id, k) => { if (first && id === first.id) at.push(k); });
  const k = at[at.length >> 1];
  return k === undefined ? [0.5, 0.5] : [(k % layer.width + 0.5) / layer.width, (Math.floor(k / layer.width) + 0.5) / layer.height];
}

function chooseSlot(slot) { state.slot = Math.max(0, slot); $("slot").value = state.slot; drawAttention(); }
