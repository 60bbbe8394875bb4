"""`report.html`: a run on one page, with nothing to load from elsewhere. Settings, curves, samples, where time went."""

import base64
import tomllib
from dataclasses import replace
from pathlib import Path

from jinja2 import Environment

from train.config import TrainConfig
from train.config_toml import to_plain
from train.reports.compare import shown
from train.reports.curves import named_scores
from train.reports.log import METRICS, SAMPLES, format_duration, read_metrics
from train.runs.checkpoint import SETTINGS, write_atomically

PAGE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }}</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
  img { width: 100%; height: auto }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f4f4f4; padding: .7rem; border-radius: .3rem }
  table { border-collapse: collapse; width: 100% }
  td, th { text-align: left; padding: .15rem .8rem .15rem 0; border-bottom: 1px solid #ddd; overflow-wrap: anywhere }
  td.number { text-align: right; white-space: nowrap }
  .bar { background: #4c78a8; height: .8rem }
  summary { cursor: pointer }
</style>
</head>
<body>
<h1>{{ name }}</h1>
<pre>{{ summary }}</pre>
<h2>Curves</h2>
{% if curves %}
<img src="data:image/png;base64,{{ curves }}" alt="{{ verdict }}">
{% else %}
<p>Not drawn: matplotlib is not installed.</p>
{% endif %}
<h2>Validations{{ ", the last %d of %d" % (most, count) if count > most }}</h2>
<table>
<tr>{% for key in columns %}<th>{{ key.replace("_", " ") }}</th>{% endfor %}</tr>
{% for row in validations %}
<tr>{% for key in columns %}<td>{{ shown(row.get(key, "")) }}</td>{% endfor %}</tr>
{% endfor %}
</table>
<h2>Samples</h2>
{% for sample in samples %}
<details{{ " open" if loop.first }}><summary>Step {{ sample.step }}: {{ sample.title }}</summary>
<pre>{{ sample.text }}</pre></details>
{% else %}
<p>None: the task has none, or --sample-every is 0.</p>
{% endfor %}
<h2>Where time went</h2>
<p>The last session: {{ duration(seconds) }} for {{ steps }} steps.</p>
<table>
{% for phase, part in phases.items() %}
<tr><td>{{ phase }}</td><td class="number">{{ "%.1f" % part }} s</td>
<td class="number">{{ "%.0f" % (100 * part / seconds) }} %</td>
<td style="width: 50%"><div class="bar" style="width: {{ "%.1f" % (100 * part / seconds) }}%"></div></td></tr>
{% endfor %}
</table>
<h2>Settings</h2>
<table>
<tr><th>setting</th><th>value</th><th>default</th></tr>
{% for key, value, default in changed %}
<tr><td>{{ key }}</td><td>{{ shown(value) }}</td><td>{{ shown(default) }}</td></tr>
{% endfor %}
</table>
<details><summary>All settings ({{ settings_file }})</summary><pre>{{ toml }}</pre></details>
</body>
</html>
""")
MOST = 40  # rows of a table, and samples
COLUMNS = ("step", "loss", "perplexity", "bits_per_byte", "masked_accuracy", "accuracy", "macro_f1", "exact_match")


def write_page(run: Path, config: TrainConfig, summary: str, phases: dict[str, float], seconds: float, steps: int) -> Path:
    """Write RUN/report.html from the run's own files. `phases`: seconds of the last session by phase, of `seconds` in all."""
    rows = read_metrics(run / METRICS)
    validations = [row for row in rows if row["split"] in ("before", "validation")]
    text = (run / SETTINGS).read_text(encoding="utf-8")
    default = type(config)()
    has = tomllib.loads(text)
    usual = to_plain(replace(default, run=replace(default.run, adapter=config.run.adapter)))  # with the adapter's own defaults
    changed = [
        (f"{group}.{name}", value, usual.get(group, {}).get(name, "not set"))
        for group, values in has.items()
        for name, value in values.items()
        if group != "recorded" and value != usual.get(group, {}).get(name)
    ]
    picture = run / "curves.png"
    rest = max(0.0, seconds - sum(phases.values()))
    page = PAGE.render(
        name=run.resolve().name,
        summary=summary,
        curves=base64.b64encode(picture.read_bytes()).decode() if picture.is_file() else "",
        verdict="training and validation loss over the steps",
        columns=[*(key for key in COLUMNS if any(key in row for row in validations)), *named_scores(validations)],
        validations=validations[-MOST:],
        count=len(validations),
        most=MOST,
        samples=[row for row in read_metrics(run / SAMPLES) if "text" in row][: -MOST - 1 : -1],
        phases=phases | {"the rest": rest},
        seconds=max(seconds, 1e-9),
        steps=steps,
        changed=changed,
        settings_file=SETTINGS,
        toml=text,
        shown=shown,
        duration=format_duration,
    )
    page = page.encode(errors="surrogateescape").decode(errors="replace")  # a file name may hold bytes that are not UTF-8
    write_atomically(run / "report.html", page)
    return run / "report.html"
