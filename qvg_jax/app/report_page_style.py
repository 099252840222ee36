"""How report.html looks, and the script that cuts the arms out of its video."""

__all__ = ["CSS", "SCRIPT"]

CSS = """
h1 { font-size: 22px; } .headlines { padding-left: 1.1rem; font-size: 17px; font-weight: 600; }
.warning { border-left: 4px solid #b85c12; padding-left: .7rem; }
.viewer { margin: 1.2rem 0; } .viewer video { display: none; }
.viewer canvas, .alone { width: 100%; display: block; border-radius: 8px; background: #111317;
  image-rendering: pixelated; touch-action: pan-y; cursor: ew-resize; }
.row { display: flex; flex-wrap: wrap; gap: .6rem 1rem; align-items: center; margin-top: .6rem; }
.row input[type=range] { flex: 1; min-width: 8rem; }
.row select, .row button { font: inherit; padding: .2rem .6rem; }
:focus-visible { outline: 3px solid #1f77d0; outline-offset: 2px; }
.frame { width: 150px; max-width: none; image-rendering: pixelated; display: block; }
.strip td, .strip th { padding: 2px 4px; border: 0; font-weight: normal; }
pre { background: #f4f5f7; padding: .7rem 1rem; border-radius: 8px; overflow-x: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; }
"""

SCRIPT = """
const viewer = document.querySelector('.viewer');
if (viewer) {
  const about = JSON.parse(viewer.dataset.about), part = name => viewer.querySelector(name);
  const video = part('video'), canvas = part('canvas'), pen = canvas.getContext('2d');
  const [wipe, time, play, frame] = ['#wipe', '#time', '#play', '#frame'].map(part);
  const sides = ['#left', '#right'].map(part);
  const box = about.views[0].box;
  canvas.width = box[2] - box[0]; canvas.height = box[3] - box[1];
  pen.imageSmoothingEnabled = false;
  const label = (text, x, align) => {
    pen.font = `600 ${Math.max(10, canvas.width / 32)}px system-ui, sans-serif`;
    pen.textAlign = align; pen.textBaseline = 'top';
    pen.lineWidth = 4; pen.strokeStyle = '#111317'; pen.fillStyle = '#fff';
    pen.strokeText(text, x, 8); pen.fillText(text, x, 8);
  };
  const draw = () => {
    const split = Math.round(canvas.width * wipe.value / 100);
    sides.forEach((side, i) => {
      const view = about.views[side.value];
      pen.save(); pen.beginPath();
      pen.rect(i ? split : 0, 0, i ? canvas.width - split : split, canvas.height); pen.clip();
      pen.drawImage(video, view.box[0], view.box[1], canvas.width, canvas.height,
        0, 0, canvas.width, canvas.height);
      label(view.name, i ? canvas.width - 8 : 8, i ? 'right' : 'left');
      pen.restore();
    });
    pen.fillStyle = '#fff'; pen.fillRect(split - 1, 0, 2, canvas.height);
    const n = Math.min(about.first + Math.floor(video.currentTime * about.fps + .01),
      about.tour + about.frames - 1);
    frame.textContent = n < about.tour ? `real frame ${n + 1} of ${about.tour}`
      : `generated frame ${n - about.tour + 1} of ${about.frames}`;
    if (video.duration && document.activeElement !== time)
      time.value = 1000 * video.currentTime / video.duration;
  };
  const move = event => {
    const place = canvas.getBoundingClientRect();
    wipe.value = 100 * (event.clientX - place.left) / place.width; draw();
  };
  canvas.addEventListener('pointerdown', event => {
    canvas.setPointerCapture(event.pointerId); move(event);
  });
  canvas.addEventListener('pointermove', event => event.buttons && move(event));
  for (const input of [wipe, ...sides]) input.addEventListener('input', draw);
  time.addEventListener('input', () => {
    video.currentTime = time.value / 1000 * (video.duration || 0);
  });
  play.addEventListener('click', () => video.paused ? video.play() : video.pause());
  const loop = () => { draw(); if (!video.paused) requestAnimationFrame(loop); };
  video.addEventListener('play', () => { play.textContent = 'pause'; loop(); });
  video.addEventListener('pause', () => { play.textContent = 'play'; });
  for (const name of ['loadeddata', 'seeked']) video.addEventListener(name, draw);
}
"""
