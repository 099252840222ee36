"""How the page of `qvg play` looks, and the little it does in the browser by itself."""

__all__ = ["CSS", "SCRIPT"]

CSS = """
:root { --ink: #f0f1f3; --dim: #9ea4ae; --line: #2c3038; --card: #191c22; --blue: #5cb4ff; }
body { background: #111317; color: var(--ink); }
.nicegui-content { padding: 18px 22px; max-width: 1500px; margin: 0 auto; width: 100%; }
.board { display: grid; grid-template-columns: minmax(0, 1fr) 360px; gap: 18px; width: 100%; }
.stack { display: flex; flex-direction: column; gap: 14px; min-width: 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
        padding: 14px 16px; width: 100%; }
.line { display: flex; align-items: center; gap: 12px; width: 100%; flex-wrap: wrap; }
.push { margin-left: auto; }
.title { font-size: 20px; font-weight: 600; line-height: 1.3; margin: 0; }
.name { font-size: 12px; letter-spacing: .06em; text-transform: uppercase; color: var(--dim); }
.dim { color: var(--dim); font-size: 13px; line-height: 1.4; }
.number { font-variant-numeric: tabular-nums; }
.big { font-size: 44px; font-weight: 600; line-height: 1; color: var(--blue); }
.frame { border-radius: 12px; overflow: hidden; border: 1px solid var(--line); width: 100%;
         max-width: max(280px, calc((100vh - 420px) * var(--aspect))); margin: 0 auto;
         position: relative; aspect-ratio: var(--aspect); }
.frame img, .view img { image-rendering: pixelated; display: block; width: 100%; height: 100%; }
.twin { position: absolute; inset: 0; clip-path: inset(0 calc(100% - var(--wipe, 50%)) 0 0); }
.twin::after { content: ""; position: absolute; inset: 0 auto 0 calc(var(--wipe, 50%) - 2px);
               width: 2px; background: #fff; }
.twin.behind img { opacity: .35; }
.tag { position: absolute; top: 8px; padding: 2px 8px; border-radius: 6px; font-size: 13px;
       background: #111317cc; }
.tag.left { left: 8px; } .tag.right { right: 8px; }
.wipe label { display: flex; align-items: center; gap: 10px; }
.wipe input { flex: 1; min-width: 100px; accent-color: var(--blue); }
.controls { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: 16px;
            align-items: center; }
.places { display: flex; flex-wrap: wrap; gap: 16px; align-items: flex-start; }
.places > div { flex: 1 1 150px; max-width: 260px; }
.map { max-width: 220px; margin-top: 4px; }
.view { border-radius: 6px; overflow: hidden; width: 100%; max-width: 195px;
        aspect-ratio: var(--aspect); margin: 4px 0; }
.legend > div { display: flex; gap: 8px; align-items: baseline; margin-top: 4px; }
.swatch { flex: none; width: 14px; height: 10px; border-radius: 2px; border: 1px solid #5a616c; }
.swatch.real { background: #7a818d99; } .swatch.made { background: #5cb4ff55; }
.first { background: var(--blue) !important; color: #111317 !important; font-weight: 600; }
.long { font-size: 17px; font-weight: 600; margin-top: 4px; }
.place { padding: 4px 12px; border-radius: 999px; font-size: 13px; font-weight: 600; }
.place:empty { display: none; }
.place.real { background: #30343c; color: #d5d9e0; }
.place.remembered { background: #173a2a; color: #7ee2ac; }
.place.mixed { background: #1c3350; color: #9fd0ff; }
.place.invented { background: #42285a; color: #e2bfff; }
.chip { padding: 4px 12px; border-radius: 999px; background: var(--line); font-size: 13px; }
.chip.ready { background: #173a2a; color: #7ee2ac; }
.chip.tour, .chip.starting, .chip.busy { background: #3a3217; color: #f0d37a; }
.chip.ended { background: #4a1d1d; color: #ffb0a8; }
.track { height: 12px; border-radius: 6px; background: var(--line); width: 100%; }
.fill { height: 100%; border-radius: 6px; background: var(--blue); transition: width .2s; }
.fill.plain { background: #7a818d; }
.fill.room { background: #3f5f80; }
.keys { display: grid; grid-template-columns: repeat(3, 46px); gap: 6px; }
.key { height: 46px; border-radius: 9px; border: 1px solid #434955; background: #22262e;
       display: flex; flex-direction: column; align-items: center; justify-content: center;
       font: inherit; color: inherit; padding: 0; line-height: 1.15; font-weight: 600;
       cursor: pointer; user-select: none; touch-action: none; }
.key .letter { font-size: 11px; color: var(--dim); } .key.down .letter { color: inherit; }
.key.wide { grid-column: 1 / -1; height: 34px; flex-direction: row; gap: 8px; }
:focus-visible { outline: 3px solid var(--blue) !important; outline-offset: 2px; }
.first:focus-visible { outline-color: #fff !important; }
.key.down { background: var(--blue); color: #111317; border-color: var(--blue); }
@media (max-width: 1000px) { .board { grid-template-columns: minmax(0, 1fr); }
  .frame { max-width: calc(70vh * var(--aspect)); } }
@media (max-width: 560px) { .controls { grid-template-columns: minmax(0, 1fr); }
  .nicegui-content { padding: 12px; } .keys { grid-template-columns: repeat(3, 1fr); } }
"""

# What a page cannot do from Python: keep arrow keys from scrolling, give the keyboard back after
# a click on a button (one that was reached by the keyboard keeps it, and Enter and the space bar press it),
# move the line between two pictures, and notice that it has gone to another window while a key is down.
SCRIPT = """<script>
addEventListener('keydown', e => {
  const typing = ['INPUT', 'TEXTAREA'].includes(document.activeElement?.tagName);
  if (!typing && (e.key.startsWith('Arrow') || e.key === ' ')) e.preventDefault();
});
const onButton = () => document.activeElement?.tagName === 'BUTTON';
for (const type of ['keydown', 'keyup'])
  addEventListener(type, e => { if (e.key === ' ' && onButton()) e.stopPropagation(); }, true);
addEventListener('click', e => {
  if (e.detail) return onButton() && document.activeElement.blur();
  const pad = e.target.closest('.key');
  for (const type of pad ? ['pointerdown', 'pointerup'] : []) pad.dispatchEvent(new Event(type));
});
addEventListener('input', e => {
  if (e.target.id === 'wipe')
    document.documentElement.style.setProperty('--wipe', `${e.target.value}%`);
});
addEventListener('pointerup', e => e.target.id === 'wipe' && e.target.blur());
addEventListener('blur', () => emitEvent('away'));
document.addEventListener('visibilitychange', () => document.hidden && emitEvent('away'));
</script>"""
