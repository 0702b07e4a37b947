// Draws on example photos. Runs in gr.HTML's js_on_load: `element`, `props`, `watch` and `trigger` are gradio's.
// props.photos: [{number, name, uri, drawing}] from Python; props.value: {drawings: {number: {kind, shapes}}} to Python.
const TINT = "#E69F00";
const KINDS = {
  mask: ["Whole object", "Draw a line around the object, or paint it. The eraser takes away.", ["outline", "brush", "eraser"]],
  scribble: ["Scribble", "Draw one or two strokes on the object; they need not cover it.", ["brush", "eraser"]],
  box: ["Box", "Drag a box from corner to corner around the object.", ["box"]],
  point: ["Point", "Tap on the object, once or a few times.", ["point"]],
  label: ["Only the photo", "Nothing to draw: the photo shows the object somewhere. The least sure way.", []],
};
const TOOLS = { outline: "Outline", brush: "Brush", eraser: "Eraser", box: "Box", point: "Point" };
const MOST_POINTS = 2000;

const root = element.querySelector(".fss");
let drawings = {}, current = null, tool = "outline", brush = 5, live = null, at = null, picture = null;

const photo = () => (props.photos || []).find((one) => one.number === current);
const drawing = () => drawings[current];
const button = (text, pressed, click) => {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  if (pressed !== null) made.setAttribute("aria-pressed", String(pressed));
  made.addEventListener("click", click);
  return made;
};
const group = (label, ...children) => {
  const made = document.createElement("div");
  made.className = "fss-groups";
  made.setAttribute("role", "group");
  made.setAttribute("aria-label", label);
  made.append(...children);
  return made;
};

function send() {
  props.value = { drawings: JSON.parse(JSON.stringify(drawings)) };
}

function takePhotos() {
  const kept = {};
  for (const one of props.photos || []) kept[one.number] = drawings[one.number] || one.drawing || { kind: "mask", shapes: [] };
  const added = Object.keys(kept).map(Number).filter((number) => !(number in drawings));
  drawings = kept;
  if (added.length) current = added[0];
  else if (!(current in kept)) current = Number(Object.keys(kept)[0]) || null;
  send();
  choose(current);
}

function choose(number) {
  current = number;
  live = at = picture = null;
  if (photo()) {
    if (!KINDS[drawing().kind][2].includes(tool)) tool = KINDS[drawing().kind][2][0] || null;
    const loading = new Image();
    loading.onload = () => { if (current === number) { picture = loading; build(); } };
    loading.src = photo().uri;
  } else build();
}

function build() {
  root.replaceChildren();
  if (!photo() || !picture) {
    const empty = document.createElement("div");
    empty.className = "fss-empty";
    empty.textContent = "Your example photo comes here, to be marked.";
    root.append(empty);
    return;
  }
  if (props.photos.length > 1) root.append(thumbnails());
  const kinds = Object.entries(KINDS).map(([kind, [name]]) =>
    button(name, drawing().kind === kind, () => {
      drawing().kind = kind;
      tool = KINDS[kind][2][0] || null;
      send();
      build();
    }));
  root.append(group("How the object is shown", ...kinds));
  const hint = document.createElement("p");
  hint.className = "fss-hint";
  hint.textContent = KINDS[drawing().kind][1];
  root.append(hint, toolbar(), stage());
  paint();
}

function thumbnails() {
  const all = props.photos.map((one, place) => {
    const made = button("", one.number === current, () => choose(one.number));
    made.setAttribute("aria-label", `Example ${place + 1}: ${one.name}`);
    const small = document.createElement("img");
    small.src = one.uri;
    small.alt = "";
    const badge = document.createElement("span");
    const marked = drawings[one.number].shapes.length || drawings[one.number].kind === "label";
    badge.textContent = marked ? "✓" : String(place + 1);
    made.append(small, badge);
    return made;
  });
  const made = group("Example photos", ...all);
  made.classList.add("fss-photos");
  return made;
}

function toolbar() {
  const names = KINDS[drawing().kind][2], parts = [];
  if (names.length > 1) {
    for (const name of names) parts.push(button(TOOLS[name], tool === name, () => { tool = name; build(); }));
  }
  if (tool === "brush" || tool === "eraser") {
    const label = document.createElement("label");
    label.className = "fss-size";
    const slider = document.createElement("input");
    Object.assign(slider, { type: "range", min: 1, max: 20, step: 1, value: brush });
    slider.addEventListener("input", () => { brush = Number(slider.value); });
    label.append("Size", slider);
    parts.push(label);
  }
  const undo = button("Undo", null, () => { drawing().shapes.pop(); send(); build(); });
  const clear = button("Clear", null, () => { drawing().shapes = []; send(); build(); });
  undo.disabled = clear.disabled = !drawing().shapes.length;
  if (names.length) parts.push(undo, clear);
  parts.push(button("Remove photo", null, () => trigger("remove", { number: current })));
  return group("Tools", ...parts);
}

function stage() {
  const made = document.createElement("div"), canvas = document.createElement("canvas");
  made.className = "fss-stage";
  canvas.width = picture.naturalWidth;
  canvas.height = picture.naturalHeight;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${photo().name}, to draw on`);
  if (!tool) canvas.className = "fss-still";
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    const x = ((event.clientX - box.left) * canvas.width) / box.width;
    const y = ((event.clientY - box.top) * canvas.height) / box.height;
    const round = (value, most) => Math.round(10 * Math.min(Math.max(value, 0), most)) / 10;
    return [round(x, canvas.width), round(y, canvas.height)];
  };
  canvas.addEventListener("pointerdown", (event) => {
    if (!tool || event.button !== 0) return;
    event.preventDefault();
    canvas.setPointerCapture(event.pointerId);
    const radius = Math.round((10 * brush * Math.min(canvas.width, canvas.height)) / 200) / 10;
    live = { tool, points: [place(event)], radius };
    paint();
  });
  canvas.addEventListener("pointermove", (event) => {
    at = tool === "brush" || tool === "eraser" ? place(event) : null;
    if (live) extend(live, place(event));
    if (live || at) paint();
  });
  canvas.addEventListener("pointerleave", () => { at = null; paint(); });
  canvas.addEventListener("pointerup", finish);
  canvas.addEventListener("pointercancel", () => { live = null; paint(); });
  made.append(canvas);
  return made;
}

function extend(shape, point) {
  const last = shape.points[shape.points.length - 1];
  if (shape.tool === "point") shape.points = [point];
  else if (shape.tool === "box") shape.points = [shape.points[0], point];
  else if (Math.hypot(point[0] - last[0], point[1] - last[1]) >= 1.5 && shape.points.length < MOST_POINTS) shape.points.push(point);
}

function finish() {
  if (!live) return;
  const least = { outline: 3, box: 2 }[live.tool] || 1;
  if (live.points.length >= least) drawing().shapes.push(live);
  live = null;
  send();
  build();
}

function trace(ink, points) {
  ink.beginPath();
  points.forEach(([x, y], number) => (number ? ink.lineTo(x, y) : ink.moveTo(x, y)));
  if (points.length === 1) ink.lineTo(points[0][0] + 0.01, points[0][1]);
}

function paint() {
  const canvas = root.querySelector("canvas");
  if (!canvas) return;
  const ink = canvas.getContext("2d"), { width, height } = canvas;
  ink.drawImage(picture, 0, 0);
  const layer = new OffscreenCanvas(width, height), marks = layer.getContext("2d");
  marks.lineCap = marks.lineJoin = "round";
  marks.fillStyle = marks.strokeStyle = TINT;
  const line = Math.max(2, Math.min(width, height) / 120), tools = KINDS[drawing().kind][2];
  for (const shape of [...drawing().shapes, ...(live ? [live] : [])]) {
    if (!tools.includes(shape.tool)) continue;
    const points = shape.points, [first, last] = [points[0], points[points.length - 1]];
    marks.globalCompositeOperation = shape.tool === "eraser" ? "destination-out" : "source-over";
    trace(marks, points);
    marks.lineWidth = shape.tool === "outline" ? line : 2 * shape.radius;
    if (shape.tool === "brush" || shape.tool === "eraser" || shape === live && shape.tool === "outline") marks.stroke();
    else if (shape.tool === "outline") marks.fill();
    else if (shape.tool === "box") {
      marks.lineWidth = line;
      marks.strokeRect(first[0], first[1], last[0] - first[0], last[1] - first[1]);
    } else {
      marks.beginPath();
      marks.arc(last[0], last[1], 2.2 * line, 0, 7);
      marks.fill();
    }
  }
  ink.globalAlpha = tools.includes("box") || tools.includes("point") ? 1 : 0.6;
  ink.drawImage(layer, 0, 0);
  ink.globalAlpha = 1;
  if (at) {
    ink.beginPath();
    ink.arc(at[0], at[1], (brush * Math.min(width, height)) / 200, 0, 7);
    ink.lineWidth = 3;
    ink.strokeStyle = "#000";
    ink.stroke();
    ink.lineWidth = 1.5;
    ink.strokeStyle = "#fff";
    ink.stroke();
  }
}

watch("photos", takePhotos);
takePhotos();
