// The frame with what is drawn over it.

function indexMap(layer, frame) {
  const code = bytes(layer.data[frame]), runs = code.length / 3, map = new Uint8Array(layer.width * layer.height);
  for (let k = 0, at = 0; k < runs; k++) {
    const end = at + code[runs + 2 * k] + 256 * code[runs + 2 * k + 1];
    map.fill(code[k], at, end);
    at = end;
  }
  return map;
}

// Writes the number of every object that is large enough at the pixel of it that is nearest to its middle.
function drawNumbers(context, layer, map, hidden) {
  const { width } = layer, count = new Float64Array(256), x = new Float64Array(256), y = new Float64Array(256);
  map.forEach((id, k) => { count[id]++; x[id] += k % width; y[id] += Math.floor(k / width); });
  const best = new Float64Array(256).fill(Infinity), place = new Int32Array(256);
  map.forEach((id, k) => {
    const distance = (k % width - x[id] / count[id]) ** 2 + (Math.floor(k / width) - y[id] / count[id]) ** 2;
    if (distance < best[id]) { best[id] = distance; place[id] = k; }
  });
  const size = Math.max(11, context.canvas.height / 18), scale = context.canvas.width / width;
  Object.assign(context, { font: `600 ${size}px system-ui, sans-serif`, textAlign: "center", textBaseline: "middle",
    lineWidth: size / 4, lineJoin: "round", strokeStyle: "black", fillStyle: "white" });
  for (let id = 1; id < 256; id++) {
    if (hidden.has(id) || count[id] * scale * scale < (1.2 * size) ** 2) continue;
    const at = [id, (place[id] % width + 0.5) * scale, (Math.floor(place[id] / width) + 0.5) * scale];
    context.strokeText(...at); context.fillText(...at);
  }
}

function layerPicture(layer, map, hidden) {
  const { width, height } = layer;
  const canvas = surface(width, height), context = canvas.getContext("2d");
  const pixels = context.createImageData(width, height), fill = Math.round(2.55 * $("opacity").value);
  const words = new Uint32Array(pixels.data.buffer), ink = data.colors.map(([r, g, b]) => r | g << 8 | b << 16);
  const outlined = 2 * width >= data.width;
  for (let y = 0, k = 0; y < height; y++) for (let x = 0; x < width; x++, k++) {
    const id = map[k];
    if (!id || hidden.has(id)) continue;
    const edge = outlined && ((x + 1 < width && map[k + 1] !== id) || (x && map[k - 1] !== id)
      || (y + 1 < height && map[k + width] !== id) || (y && map[k - width] !== id));
    words[k] = ink[id] | (edge && fill ? 255 : fill) << 24;
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}

function drawPicture() {
  const canvas = $("picture"), context = canvas.getContext("2d"), image = images[state.frame];
  if (!image.complete) { image.onload = draw; return; }
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  const layer = data.layers[state.layer];
  if (!layer) return;
  context.imageSmoothingEnabled = false;
  const hidden = state.layer === "objects" ? state.hidden : new Set();
  const map = indexMap(layer, state.frame);
  context.drawImage(layerPicture(layer, map, hidden), 0, 0, canvas.width, canvas.height);
  if (state.layer === "objects") drawNumbers(context, layer, map, hidden);
}
