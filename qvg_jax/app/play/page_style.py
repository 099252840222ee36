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
.title { font-size: 20px; font-weight: 600; }
.name { font-size: 12px; letter-spacing: .06em; text-transform: uppercase; color: var(--dim); }
.dim { color: var(--dim); font-size: 13px; line-height: 1.4; }
.number { font-variant-numeric: tabular-nums; }
.big { font-size: 44px; font-weight: 600; line-height: 1; color: var(--blue); }
.frame { border-radius: 12px; overflow: hidden; border: 1px solid var(--line); width: 100%;
         max-width: calc((100vh - 260px) * var(--aspect)); margin: 0 auto; }
.frame img, .view img { image-rendering: pixelated; display: block; }
.controls { display: grid; grid-template-columns: auto minmax(180px, 1fr) 176px 156px; gap: 16px;
            align-items: center; }
.view { border-radius: 6px; overflow: hidden; width: 100%; max-width: 176px;
        height: 104px; margin-top: 4px; }
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
       display: flex; align-items: center; justify-content: center; font-weight: 600;
       cursor: pointer; user-select: none; touch-action: none; }
.key.down { background: var(--blue); color: #111317; border-color: var(--blue); }
@media (max-width: 1000px) { .controls { grid-template-columns: auto 1fr; }
  .board { grid-template-columns: minmax(0, 1fr); } }
"""

# What a page cannot do from Python: keep arrow keys from scrolling, give the keyboard back after
# a click on a button, and notice that it has gone to another window while a key is down.
SCRIPT = """<script>
addEventListener('keydown', e => {
  const typing = ['INPUT', 'TEXTAREA'].includes(document.activeElement?.tagName);
  if (!typing && (e.key.startsWith('Arrow') || e.key === ' ')) e.preventDefault();
});
addEventListener('click', () => {
  if (document.activeElement?.tagName === 'BUTTON') document.activeElement.blur();
});
addEventListener('blur', () => emitEvent('away'));
document.addEventListener('visibilitychange', () => document.hidden && emitEvent('away'));
</script>"""
