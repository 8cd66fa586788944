"""An agreement as a page."""

from collections.abc import Mapping
from typing import Any

from nvfp4check.report import agree_plots as plots
from nvfp4check.report import agree_points as points
from nvfp4check.report import agree_rows as table
from nvfp4check.report import agree_words as words
from nvfp4check.report.agree_text import MARK, SHARES, tables
from nvfp4check.report.page import render_page

#: Tone of the banner for each verdict.
_TONES = {"pass": "pass", "fail": "fail", "undecided": "incomplete"}


def agree_html(document: Mapping[str, Any]) -> str:
    """Return the page."""
    logits, parting = document["logits"], points.parting_layer(document)
    lines = [plots.error_plot(document)]
    bars = []
    if logits:
        lines.append(plots.position_plot(document))
        bars = [plots.kl_plot(document), plots.prompt_plot(document)]
    said = [
        words.divergence_sentence(document),
        words.routing_sentence(document),
        words.bounds_sentence(document),
        words.cache_sentence(document),
        words.split_sentence(document),
        words.versus_sentence(document),
    ]
    return render_page(
        "agree.html.j2",
        tone=_TONES.get(document["verdict"], "incomplete"),
        verdict=document["verdict"],
        title=words.title(document),
        runs=words.run_rows(document),
        criteria=list(words.criteria_sentences(document)),
        said=[sentence for sentence in said if sentence],
        problems=list(words.problem_sentences(document)),
        lines=[plot for plot in lines if plot is not None],
        bars=bars,
        heat=plots.flip_map(document),
        tables=[table for table in tables(document) if table[2]],
        points=points.point_rows(document),
        point_headers=points.POINT_HEADERS,
        point_legend=points.POINT_LEGEND,
        parting=parting,
        parting_points=points.point_rows(document, parting) if parting is not None else [],
        prompts=table.prompt_rows(document) if logits else [],
        prompt_headers=table.PROMPT_HEADERS,
        notes=list(words.logit_notes(document)) if logits else [],
        legend=[MARK, SHARES] if document["layers"] else [],
        blind=list(words.blind_sentences(document)),
    )
