// A canvas to draw on by mouse, finger or keys; each change is sent as a data URL.
const canvas = element.querySelector("canvas"), ink = canvas.getContext("2d");
const colour = element.querySelector("[name=colour]"), width = element.querySelector("[name=width]");
const file = element.querySelector("[type=file]"), PAUSE = 150; // milliseconds between two sends
let last = null, timer = null, at = [160, 160];

function send() {
  if (timer === null)
    timer = setTimeout(() => {
      timer = null;
      trigger("input", { drawn: canvas.toDataURL("image/png") });
    }, PAUSE);
}

function wipe() {
  ink.fillStyle = "white";
  ink.fillRect(0, 0, canvas.width, canvas.height);
  send();
}

function line(from, to) {
  ink.strokeStyle = colour.value;
  ink.lineWidth = Number(width.value);
  ink.lineCap = "round";
  ink.beginPath();
  ink.moveTo(...from);
  ink.lineTo(...to);
  ink.stroke();
  send();
}

function place(event) {
  const box = canvas.getBoundingClientRect();
  const x = (event.clientX - box.left) / box.width, y = (event.clientY - box.top) / box.height;
  return [x * canvas.width, y * canvas.height];
}

canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  last = at = place(event);
  line(last, last);
});
canvas.addEventListener("pointermove", (event) => {
  if (last === null) return;
  line(last, place(event));
  last = at = place(event);
});
for (const end of ["pointerup", "pointercancel"])
  canvas.addEventListener(end, () => (last = null));

const MOVES = { ArrowLeft: [-16, 0], ArrowRight: [16, 0], ArrowUp: [0, -16], ArrowDown: [0, 16] };
canvas.addEventListener("keydown", (event) => {
  const move = MOVES[event.key];
  if (move) {
    const to = at.map((value, axis) => Math.min(320, Math.max(0, value + move[axis])));
    line(at, to);
    at = to;
  } else if (event.key === " ") line(at, at);
  else if (event.key === "Delete" || event.key === "Backspace") wipe();
  else return;
  event.preventDefault();
});

element.querySelector("button").addEventListener("click", wipe);
file.addEventListener("change", async () => {
  if (!file.files.length) return;
  try {
    ink.drawImage(await createImageBitmap(file.files[0]), 0, 0, canvas.width, canvas.height);
    send();
  } finally {
    file.value = "";
  }
});
wipe();
