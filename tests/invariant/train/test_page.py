"""report.html and samples.jsonl: what a run showed is kept, nothing of it runs in a browser, and a resume goes back with it."""

import html
import json
import re
from dataclasses import replace

from tests.runs import command, further, metrics, stopped_at
from train.config_toml import read_settings, to_plain
from train.reports.log import Metrics, read_metrics
from train.reports.page import MOST, write_page
from train.runs.checkpoint import write_settings


def page_of(run, **values) -> str:
    given = {"summary": "done", "phases": {"forward": 1.0}, "seconds": 4.0, "steps": 3} | values
    return write_page(run, read_settings(run), **given).read_text(encoding="utf-8")


def test_a_run_has_a_page_of_what_it_was(finished, tmp_path):
    run = tmp_path / "run"
    said = command(*further(options_of(run, finished)), "--init", finished, "--steps", 20, "--sample-every", 10)
    assert said.code == 0, said.err
    page = (run / "report.html").read_text(encoding="utf-8")
    plain = html.unescape(page)
    best = json.loads((run / "best.json").read_text())
    assert f"validation loss {best['loss']:.4f}" in plain and f"page     {run / 'report.html'}" in said.out
    assert all(line in plain for line in said.out.splitlines() if line.startswith(("text ", "network ", "machine ", "best ")))
    for row in read_metrics(run / "samples.jsonl"):
        assert row["text"] in plain and f"Step {row['step']}: {row['title']}" in plain
        assert all(f"    | {line}" in said.out for line in row["text"].split("\n"))
    assert [row["step"] for row in read_metrics(run / "samples.jsonl")] == [10, 20]
    differ = set(re.findall(r"<td>([a-z]\w*\.[a-z]\w*)</td>", page))
    assert {"run.steps", "run.init", "data.corpus", "report.sample_every"} <= differ, differ
    assert not {"report.keep", "optimizer.beta1", "recorded.torch"} & differ, "what is as by default"
    for row in metrics(run):
        if row["split"] == "validation":
            assert f"<td>{row['loss']:.4g}</td>" in page
    first = metrics(run)[0]
    assert (first["step"], first["split"]) == (0, "before") and f"before the first step: loss {first['loss']:.4f}" in said.out
    assert f"<td>{first['loss']:.4g}</td>" in page
    assert re.search(r"<td>report.sample_every</td><td>10</td><td>200</td>", page)
    assert (run / "config.toml").read_text() in plain
    adapted = read_settings(finished)
    adapted = replace(adapted, run=replace(adapted.run, adapter="lora"), lora=replace(adapted.lora, r=5))
    write_settings(tmp_path, to_plain(adapted), "")
    other = write_page(tmp_path, adapted, "", {}, 1.0, 1).read_text()
    assert "<td>lora.r</td><td>5</td><td>8</td>" in other and "lora.alpha" not in other.partition("<details>")[0]
    assert {"forward", "backward", "optimizer", "validation"} <= set(re.findall(r"<tr><td>([a-z ]+)</td>", page))


def options_of(run, finished) -> list:
    settings = read_settings(finished)
    return ["--corpus", *settings.data.corpus, "--cache", settings.data.cache, "--out", run, "--threads", 1, "--device", "cpu"]


def test_text_of_a_run_is_text_on_its_page(finished):
    bad = "<script>alert(1)</script> & \x1b[31m {{ 7 * 7 }}"
    samples = Metrics(finished, 10**9)
    samples.write_sample(5, bad, bad)
    samples.close()
    try:
        page = page_of(finished, summary=bad + "\udcff")
    finally:
        (finished / "samples.jsonl").unlink()
        (finished / "report.html").unlink()
    assert "<script" not in page and page.count(html.escape(bad)) == 3 and ">49<" not in page
    assert "default-src 'none'; img-src data:" in page and not re.search(r"(src|href)=\"(?!data:)", page)


def test_the_tables_end(finished, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text((finished / "config.toml").read_text())
    rows = [{"step": s, "split": "validation", "loss": 1.0 + s} for s in range(1, 3 * MOST)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "samples.jsonl").write_text("".join(json.dumps({"step": s, "title": "a", "text": "b"}) + "\n" for s in range(90)))
    page = page_of(run)
    assert f"the last {MOST} of {3 * MOST - 1}" in page and page.count("<details") == MOST + 1
    assert "Step 89: a" in page and "Step 49: a" not in page and "Not drawn" in page


def test_a_resume_goes_back_with_its_samples(finished, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    given = ["--init", finished, "--steps", 40, "--sample-every", 5, "--log-every", 1, "--save-every", 20]
    assert command(*options_of(other, finished), *given).code == 0
    stopped_at(33, *options_of(run, finished), *given)
    with (run / "samples.jsonl").open("a") as file:
        file.write(json.dumps({"step": 35, "title": "of a session that was lost", "text": ""}) + "\n" + '{"step": 3')
    assert command("--resume", run).code == 0

    def kept(folder):
        return [{k: v for k, v in row.items() if k != "time"} for row in read_metrics(folder / "samples.jsonl")]

    assert kept(run) == kept(other) and [row["step"] for row in kept(run)] == list(range(5, 41, 5))
