// Curves, or areas of the objects, over time.

// CSS pixels of the timeline before the first frame, room for the scale of the curves where there are any, and after the last.
const before = Object.keys(data.curves).length ? 30 : 4, after = 4;

function drawTimeline() {
  const canvas = $("timeline"), ratio = window.devicePixelRatio || 1, context = canvas.getContext("2d");
  const width = canvas.width = Math.round(canvas.clientWidth * ratio);
  const height = canvas.height = Math.round(canvas.clientHeight * ratio);
  const last = Math.max(1, data.length - 1), x = t => before * ratio + t / last * (width - (before + after) * ratio);
  const line = (points, style, dash) => {
    context.beginPath(); context.strokeStyle = style; context.lineWidth = 2 * ratio; context.setLineDash(dash);
    let pen = false;
    for (const [t, value] of points) {
      if (value === null) { pen = false; continue; }
      const y = height - 4 * ratio - value * (height - 8 * ratio);
      pen ? context.lineTo(x(t), y) : context.moveTo(x(t), y);
      pen = true;
    }
    context.stroke(); context.setLineDash([]);
  };
  const curves = Object.values(data.curves);
  for (const value of curves.length ? [0, 0.5, 1] : []) {
    const y = height - 4 * ratio - value * (height - 8 * ratio);
    context.fillStyle = css("--line");
    context.fillRect(x(0), y, x(last) - x(0), ratio);
    context.fillStyle = css("--quiet"); context.font = `${11 * ratio}px system-ui, sans-serif`;
    context.textBaseline = value === 1 ? "top" : value ? "middle" : "bottom"; context.textAlign = "right";
    context.fillText(String(100 * value), (before - 6) * ratio, y);
  }
  if (curves.length) curves.forEach((values, k) =>
    line(values.map((v, t) => [t, v]), curveColor(k), k % 2 ? [6 * ratio, 3 * ratio] : []));
  else {
    const visible = data.objects.filter(o => !state.hidden.has(o.id));
    const most = Math.max(1e-6, ...visible.flatMap(o => o.area));
    for (const o of visible)
      line(o.area.map((v, k) => [data.frames[k], v ? v / most : null]), color(o.id), []);
  }
  context.fillStyle = css("--ink");
  context.fillRect(x(data.frames[state.frame]) - ratio / 2, 0, Math.max(1, ratio), height);
}

function drawLegend(t) {
  const keys = [...$("legend").querySelectorAll("output")];
  Object.values(data.curves).forEach((values, k) =>
    keys[k].textContent = values[t] === null ? "not judged" : (100 * values[t]).toFixed(1));
}
